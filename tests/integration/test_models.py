"""A gateway on a real socket: what a team sends of its images and its models, who sees it, and how it goes again."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import pyarrow as pa
import pytest

from hibug2.v1 import dataset_pb2, dataset_pb2_grpc, model_pb2, model_pb2_grpc, types_pb2
from services.gateway.config import Settings
from services.gateway.server import start_server
from shared.rpc.arrow import send_table
from shared.rpc.channel import connect
from shared.rpc.context import TEAM_KEY

IDS = ["one", "two", "three", "four"]
MODEL = "datasets/d/models/v1"


class Door:
    """The stubs of one gateway, called as a team."""

    def __init__(self, channel: grpc.aio.Channel, images: Path) -> None:
        self.datasets = dataset_pb2_grpc.DatasetServiceStub(channel)
        self.models = model_pb2_grpc.ModelServiceStub(channel)
        self._images = images

    async def create(self, team: str, dataset: str = "d", uri: str = "", **header: Any) -> dataset_pb2.Dataset:
        """A dataset of IDS; `uri` in place of where the first image lies."""
        uris = [uri or (self._images / "one.png").as_uri(), *((self._images / f"{i}.png").as_uri() for i in IDS[1:])]
        table = pa.table({"instance_id": IDS, "image_uri": uris})
        start = dataset_pb2.DatasetHeader(dataset_id=dataset, task=types_pb2.TASK_CLASSIFICATION, **header)
        sent = messages(dataset_pb2.CreateDatasetRequest, start, table)
        return (await self.datasets.CreateDataset(sent, metadata=as_team(team))).dataset

    async def score(self, team: str, model: str, scores: list[float]) -> model_pb2.Model:
        table = pa.table({"instance_id": IDS[: len(scores)], "score": scores})
        start = model_pb2.ScoresHeader(parent="datasets/d", model_id=model)
        sent = messages(model_pb2.AddScoresRequest, start, table)
        return (await self.models.AddScores(sent, metadata=as_team(team))).model

    async def get(self, team: str, name: str = MODEL) -> model_pb2.Model:
        return (await self.models.GetModel(model_pb2.GetModelRequest(name=name), metadata=as_team(team))).model

    async def delete(self, team: str, name: str = MODEL) -> None:
        await self.models.DeleteModel(model_pb2.DeleteModelRequest(name=name), metadata=as_team(team))

    async def listed(self, team: str) -> list[str]:
        request = model_pb2.ListModelsRequest(parent="datasets/d")
        return [m.name for m in (await self.models.ListModels(request, metadata=as_team(team))).models]


def messages(kind: type, header: Any, table: pa.Table) -> Iterator[Any]:
    yield kind(header=header)
    for chunk in send_table(table):
        yield kind(arrow=chunk)


def as_team(team: str) -> list[tuple[str, str]]:
    return [(TEAM_KEY, team)]


@pytest.fixture
async def door(redis_url: str, tmp_path: Path) -> AsyncIterator[Door]:
    images = tmp_path / "images"
    images.mkdir()
    settings = Settings(
        listen="127.0.0.1:0",
        metrics_port=0,
        http_port=0,
        drain_s=0.1,
        redis_url=redis_url,
        store_url=(tmp_path / "store").as_uri(),
        image_prefixes=(images.as_uri(),),
    )
    running = await start_server(settings)
    async with connect(running.address) as channel:
        yield Door(channel, images)
    await running.stop()


async def refusal(call: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code(), caught.value.details()


async def test_a_model_is_got_deleted_and_gone(door: Door) -> None:
    await door.create("a", skip_image_check=True)
    added = await door.score("a", "v1", [1.0, 0.0, 1.0])
    other = await door.score("a", "v2", [0.5])
    assert added.name == MODEL
    assert (added.scored_count, added.mean_score) == (3, pytest.approx(2 / 3))
    assert await door.get("a") == added
    await door.delete("a")
    for call in (door.get("a"), door.delete("a")):
        code, details = await refusal(call)
        assert code is grpc.StatusCode.NOT_FOUND
        assert "'v1'" in details
    assert await door.listed("a") == [other.name]
    again = await door.score("a", "v1", [1.0, 1.0, 1.0, 1.0])  # the name is free again
    assert await door.get("a") == again
    assert again.digest != added.digest


async def test_another_team_neither_sees_a_model_nor_deletes_it(door: Door) -> None:
    await door.create("a", skip_image_check=True)
    added = await door.score("a", "v1", [1.0])
    await door.create("b", skip_image_check=True)  # names are each team's own
    for call in (door.get("b"), door.delete("b")):
        assert (await refusal(call))[0] is grpc.StatusCode.NOT_FOUND
    assert await door.listed("b") == []
    assert await door.get("a") == added


async def test_what_names_no_model_is_refused(door: Door) -> None:
    await door.create("a", skip_image_check=True)
    await door.score("a", "v1", [1.0])
    for name in ("", "v1", "datasets/d", "datasets/d/models/", "datasets/d/runs/v1", "datasets/../models/v1"):
        for call in (door.get("a", name), door.delete("a", name)):
            assert (await refusal(call))[0] is grpc.StatusCode.INVALID_ARGUMENT
    assert await door.listed("a") == [MODEL]


async def test_images_that_are_not_looked_at_may_be_missing_but_not_elsewhere(door: Door, tmp_path: Path) -> None:
    code, details = await refusal(door.create("a"))  # none of the images is there
    assert (code, "image_uri" in details) == (grpc.StatusCode.INVALID_ARGUMENT, True)
    outside = (tmp_path / "secret.png").as_uri()
    code, details = await refusal(door.create("a", uri=outside, skip_image_check=True))
    assert (code, "secret.png" in details) == (grpc.StatusCode.INVALID_ARGUMENT, True)
    assert (await door.create("a", skip_image_check=True)).instance_count == len(IDS)
