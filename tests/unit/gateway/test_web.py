"""Bodies over HTTP: what becomes of rows, and how much is taken. The services behind are made up."""

from __future__ import annotations

import json
import threading
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any, cast

import httpx
import pyarrow as pa
import pytest

from hibug2.v1 import dataset_pb2, model_pb2
from services.gateway import web
from services.gateway.web import make_app

LIMIT = 50_000


class Door:
    """Takes every upload and remembers the tables."""

    def __init__(self) -> None:
        self.tables: list[pa.Table] = []

    async def CreateDataset(self, parts: Any, metadata: Any) -> Any:  # noqa: N802
        self._take(parts)
        return dataset_pb2.CreateDatasetResponse()

    async def AddScores(self, parts: Any, metadata: Any) -> Any:  # noqa: N802
        self._take(parts)
        return model_pb2.AddScoresResponse()

    def _take(self, parts: Any) -> None:
        _, *chunks = parts
        self.tables.append(pa.ipc.open_stream(b"".join(chunk.arrow for chunk in chunks)).read_all())


@pytest.fixture
def door() -> Door:
    return Door()


@pytest.fixture
async def http(door: Door) -> AsyncIterator[httpx.AsyncClient]:
    app = make_app(cast("Any", SimpleNamespace(datasets=door, models=door)), LIMIT)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway") as client:
        yield client


def row(name: str, **more: Any) -> dict[str, Any]:
    return {"instance_id": name, "image_uri": f"file:///{name}.png", **more}


async def create(http: httpx.AsyncClient, *rows: dict[str, Any], **more: Any) -> httpx.Response:
    body = json.dumps({"dataset_id": "d", "instances": rows, **more})  # httpx itself refuses NaN and half a pair
    return await http.post("/v1/datasets", content=body, headers={"content-type": "application/json"})


async def score(http: httpx.AsyncClient, *rows: dict[str, Any]) -> httpx.Response:
    return await http.put("/v1/datasets/d/models/m/scores", json={"scores": rows})


async def test_a_column_that_the_first_row_lacks_is_kept(http: httpx.AsyncClient, door: Door) -> None:
    assert (await create(http, row("a"), row("b", label="cat", split="pool"), row("c", pose="up"))).status_code == 201
    assert (await score(http, {"instance_id": "a"}, {"instance_id": "b", "score": 0.5})).status_code == 200
    instances, scores = door.tables
    assert instances.column_names == ["instance_id", "image_uri", "label", "split", "pose"]
    assert instances.column("label").to_pylist() == [None, "cat", None]
    assert instances.column("split").to_pylist() == [None, "pool", None]
    assert instances.column("pose").to_pylist() == [None, None, "up"]
    assert scores.to_pylist() == [{"instance_id": "a", "score": None}, {"instance_id": "b", "score": 0.5}]


@pytest.mark.parametrize("value", [2**70, -(2**90), "\ud800", [1, "x"], {"a": "\udfff"}, {"a": [2**80]}])
async def test_a_value_that_no_column_holds_is_refused_by_its_name(
    http: httpx.AsyncClient, door: Door, value: Any
) -> None:
    answer = await create(http, row("a"), row("b", weight=value))
    assert answer.status_code == 400
    (violation,) = answer.json()["error"]["violations"]
    assert violation["field"] == "instances.weight"
    assert not door.tables


async def test_a_row_that_is_none_is_refused_by_its_number(http: httpx.AsyncClient, door: Door) -> None:
    answer = await create(http, row("a"), cast("Any", "image_uri"))
    assert answer.status_code == 400
    assert answer.json()["error"]["violations"][0]["field"] == "instances[1]"
    assert not door.tables


async def test_deep_values_are_refused(http: httpx.AsyncClient) -> None:
    deep: Any = 1
    for _ in range(400):
        deep = [deep]
    assert (await create(http, row("a", weight=deep))).status_code == 400


@pytest.mark.parametrize(
    "more", [{"dataset_id": "\ud800"}, {"dataset_id": float("nan")}, {"instances": "\ud800"}, {"task": "poetry"}]
)
async def test_what_is_told_of_a_misshapen_body_can_be_sent(http: httpx.AsyncClient, more: dict[str, Any]) -> None:
    answer = await create(http, **more)
    assert answer.status_code == 422
    (found,) = answer.json()["detail"]
    assert found["loc"][:2] == ["body", next(iter(more))]


async def test_a_column_whose_name_is_no_text_is_refused(http: httpx.AsyncClient) -> None:
    answer = await create(http, row("a", **{"\ud800": 1}))
    assert answer.status_code == 400
    assert answer.json()["error"]["violations"][0]["field"] == "instances.\ud800"


async def test_rows_that_share_no_column_are_not_spread_out(http: httpx.AsyncClient, door: Door) -> None:
    answer = await score(http, *({f"c{i}": 1} for i in range(300)))
    assert answer.status_code == 400
    (violation,) = answer.json()["error"]["violations"]
    assert violation["field"] == "scores"
    assert "300 rows of 300 columns" in violation["description"]
    assert not door.tables


async def test_a_body_that_says_it_is_too_large_is_not_read(http: httpx.AsyncClient, door: Door) -> None:
    answer = await create(http, *(row(f"i{i}") for i in range(2000)))
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "RESOURCE_EXHAUSTED"
    assert f"more than {LIMIT} bytes" in answer.json()["error"]["message"]
    assert not door.tables


async def test_a_body_that_does_not_say_how_large_it_is_is_read_up_to_the_limit(
    http: httpx.AsyncClient, door: Door
) -> None:
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        yield b'{"dataset_id": "'
        while sent < 100 * LIMIT:
            sent += 1000
            yield b"d" * 1000

    answer = await http.post("/v1/datasets", content=endless(), headers={"content-type": "application/json"})
    assert answer.status_code == 413
    assert f"more than {LIMIT} bytes" in answer.json()["error"]["message"]
    assert LIMIT <= sent <= LIMIT + 2000
    assert not door.tables


async def test_a_body_in_chunks_below_the_limit_is_taken(http: httpx.AsyncClient, door: Door) -> None:
    body = json.dumps({"dataset_id": "d", "instances": [row("a")]}).encode()

    async def chunks() -> AsyncIterator[bytes]:
        for start in range(0, len(body), 7):
            yield body[start : start + 7]

    answer = await http.post("/v1/datasets", content=chunks(), headers={"content-type": "application/json"})
    assert answer.status_code == 201
    assert door.tables[0].num_rows == 1


async def test_bodies_are_read_beside_the_event_loop(http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    at_work: list[str] = []
    for module, name in ((web.json, "loads"), (web, "_upload")):
        work = getattr(module, name)

        def noted(*given: Any, name: str = name, work: Any = work, **more: Any) -> Any:
            if threading.current_thread() is not threading.main_thread():
                at_work.append(name)
            return work(*given, **more)

        monkeypatch.setattr(module, name, noted)
    assert (await create(http, row("a"))).status_code == 201
    assert at_work == ["loads", "_upload"]
