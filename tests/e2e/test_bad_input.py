"""Bad input is refused at the door: the field is named, and nothing is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from hibug2 import Client
from hibug2.errors import HiBug2Error


@pytest.fixture(scope="module")
def rows(images: Path) -> list[dict[str, Any]]:
    """Twelve good instances."""
    paths = sorted((images / "images").glob("*.png"))[:12]
    return [
        {"instance_id": f"i{i}", "image_uri": p.as_uri(), "label": "ab"[i % 2], "split": "validation"}
        for i, p in enumerate(paths)
    ]


def refused(act: Callable[[], Any], code: str, field: str, words: str) -> None:
    with pytest.raises(HiBug2Error) as caught:
        act()
    assert caught.value.code == code
    shown = f"{caught.value.message} {caught.value.violations}"
    assert field in shown
    assert words in shown


def changed(rows: list[dict[str, Any]], row: int, **values: Any) -> pa.Table:
    return pa.Table.from_pylist([{**r, **values} if i == row else r for i, r in enumerate(rows)])


DATASETS = {
    "duplicate id": ({"instance_id": "i0"}, "instance_id", "i0"),
    "no id": ({"instance_id": ""}, "instance_id", "empty"),
    "missing image": ({"image_uri": None}, "image_uri", "empty"),
    "unknown split": ({"split": "holdout"}, "split", "holdout"),
    "outside the prefixes": ({"image_uri": "file:///etc/passwd"}, "image_uri", "HIBUG2_IMAGE_PREFIXES"),
}


@pytest.mark.parametrize("fault", DATASETS)
def test_a_wrong_instance(client: Client, rows: list[dict[str, Any]], fault: str) -> None:
    values, field, words = DATASETS[fault]
    refused(lambda: client.create_dataset("bad", changed(rows, 3, **values)), "INVALID_ARGUMENT", field, words)
    assert "datasets/bad" not in [d.name for d in client.datasets()]


def test_an_empty_dataset(client: Client, rows: list[dict[str, Any]]) -> None:
    empty = pa.Table.from_pylist(rows).slice(0, 0)
    with pytest.raises(HiBug2Error) as caught:
        client.create_dataset("bad", empty)
    assert "instances" in str(caught.value) or "row" in str(caught.value)
    assert "datasets/bad" not in [d.name for d in client.datasets()]


def test_images_that_are_none(client: Client, rows: list[dict[str, Any]], images: Path) -> None:
    broken, cut, gone = images / "broken.png", images / "cut.png", images / "gone.png"
    broken.write_bytes(b"no image at all")
    cut.write_bytes(Path(rows[0]["image_uri"].removeprefix("file://")).read_bytes()[:150])
    for path in (broken, cut, gone):
        table = changed(rows, 5, image_uri=path.as_uri())
        refused(
            lambda table=table: client.create_dataset("bad", table),
            "INVALID_ARGUMENT",
            "instances[5].image_uri",
            path.name,
        )
    assert "datasets/bad" not in [d.name for d in client.datasets()]


def test_an_unknown_task(client: Client, rows: list[dict[str, Any]]) -> None:
    refused(
        lambda: client.create_dataset("bad", pa.Table.from_pylist(rows), task="poetry"),
        "INVALID_ARGUMENT",
        "task",
        "classification",
    )


SCORES = {
    "unknown id": ({"instance_id": "nobody"}, "instance_id", "nobody"),
    "NaN": ({"score": float("nan")}, "score", "nan"),
    "above one": ({"score": 1.5}, "score", "1.5"),
    "repeated id": ({"instance_id": "i0"}, "instance_id", "i0"),
}


@pytest.mark.parametrize("fault", SCORES)
def test_a_wrong_score(client: Client, rows: list[dict[str, Any]], fault: str) -> None:
    if "datasets/good" not in [d.name for d in client.datasets()]:
        client.create_dataset("good", pa.Table.from_pylist(rows))
    values, field, words = SCORES[fault]
    scores = [{"instance_id": r["instance_id"], "score": 1.0} for r in rows]
    refused(lambda: client.add_scores("good", "bad", changed(scores, 1, **values)), "INVALID_ARGUMENT", field, words)
    assert "datasets/good/models/bad" not in [m.name for m in client.models("good")]


PARAMETERS = {
    "M below one": ({"min_count": 0}, "min_count"),
    "D below one": ({"depth": 0}, "max_depth"),
    "D above the attributes": ({"depth": 60}, "max_depth"),
    "margin above one": ({"margin": 1.5}, "margin"),
    "no budget": ({"budget": 0}, "budget"),
}


@pytest.mark.parametrize("fault", PARAMETERS)
def test_a_wrong_parameter(client: Client, rows: list[dict[str, Any]], fault: str) -> None:
    if "datasets/known" not in [d.name for d in client.datasets()]:
        client.create_dataset("known", pa.Table.from_pylist(rows))
        scores = pa.table({"instance_id": [r["instance_id"] for r in rows], "score": [0.5] * 12})
        client.add_scores("known", "m", scores)
        client.run("known", "m", depth=1)
    runs = len(client.runs("known"))
    values, field = PARAMETERS[fault]
    refused(lambda: client.run("known", "m", **values), "INVALID_ARGUMENT", field, "")
    assert len(client.runs("known")) == runs


def test_a_run_without_its_dataset_or_model(client: Client, rows: list[dict[str, Any]]) -> None:
    refused(lambda: client.run("nowhere", "m"), "NOT_FOUND", "dataset", "nowhere")
    client.create_dataset("bare", pa.Table.from_pylist(rows))
    refused(lambda: client.run("bare", "ghost"), "NOT_FOUND", "model", "ghost")


def test_a_request_for_ten_million_slices_is_refused_with_the_estimate(client: Client) -> None:
    columns = {f"a{i}": [f"t{(r * (i + 1)) % 3}" for r in range(200)] for i in range(60)}
    table = pa.table({**columns, "score": [1.0] * 200})
    with pytest.raises(HiBug2Error) as caught:
        client.enumerate(table, scores=["score"], depth=5, min_count=1)
    assert caught.value.code == "RESOURCE_EXHAUSTED"
    assert float(caught.value.metadata["estimate"]) > 10_000_000
    assert "min_count" in caught.value.message
