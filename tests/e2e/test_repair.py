"""Picks by every method, their files, what to collect and what a repair brought, through the gateway."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest

from hibug2 import Client, picks_file
from hibug2.errors import HiBug2Error
from hibug2.repair import PickRules
from hibug2.v1 import repair_pb2, run_pb2

METHODS = [name.removeprefix("SELECTION_METHOD_").lower() for name in repair_pb2.SelectionMethod.keys()[1:]]
BUDGET = 40


def with_probabilities(images: Path) -> pa.Table:
    """The predictions of v1, with probabilities that its two best classes share."""
    said = pyarrow.csv.read_csv(images / "v1.csv")
    labels = said["predicted"].to_pylist()
    classes = sorted(set(labels))
    rng = np.random.default_rng(0)
    rows = np.zeros((len(labels), len(classes)))
    for row, label in enumerate(labels):
        best = classes.index(label)
        rows[row, best] = rng.uniform(0.51, 1)
        rows[row, (best + 1) % len(classes)] = 1 - rows[row, best]
    return said.append_column("probabilities", pa.array(rows.tolist()))


@pytest.fixture(scope="module")
def finished(platform: Any, images: Path) -> run_pb2.Run:
    with platform.client() as client:
        client.create_dataset("coats", images / "manifest.csv")
        client.add_scores("coats", "v1", with_probabilities(images))
        client.add_scores("coats", "v2", images / "v2.csv")
        return client.run("coats", "v1", budget=BUDGET)


@pytest.fixture(scope="module")
def pool(images: Path) -> list[dict[str, Any]]:
    rows = pyarrow.csv.read_csv(images / "manifest.csv").to_pylist()
    return [row for row in rows if row["split"] == "pool"]


def test_every_method_picks_from_the_pool_in_one_call(client: Client, finished: run_pb2.Run, pool: Any) -> None:
    made = client.select(finished, rivals=METHODS)
    told = {row["method"]: row for row in made.methods.to_pylist()}
    assert set(told) == set(METHODS)
    assert (made.pool_count, made.pick_count) == (len(pool), told["lowest_mean"]["pick_count"])
    seen = set()
    for method in METHODS:
        picks = client.selected(made, method).to_pylist()
        assert 0 < len(picks) == told[method]["pick_count"] <= made.pick_count
        assert len({p["instance_id"] for p in picks}) == len(picks)
        assert all(pool[p["pool_index"]]["id"] == p["instance_id"] for p in picks)
        assert all(bool(p["tags"]) == bool(p["slice_rank"]) for p in picks)
        seen.add(tuple(p["instance_id"] for p in picks))
    assert len(seen) > 5
    assert client.picks(finished).equals(client.selected(made))


def test_rules_hold_and_a_second_call_finds_the_first(client: Client, finished: run_pb2.Run, pool: Any) -> None:
    left_out = [row["id"] for row in pool[::2]]
    rules = PickRules(class_quota=6, exclude=left_out, without_near_copies=True, spread=True, one_per_family=True)
    made = client.select(finished, budget=30, rules=rules)
    picks = client.selected(made).to_pylist()
    labels = [p["predicted_label"] for p in picks]
    assert picks
    assert max(labels.count(label) for label in set(labels)) <= 6
    assert not {p["instance_id"] for p in picks} & set(left_out)
    assert client.select(finished, budget=30, rules=rules).name == made.name


def test_embeddings_are_read_from_a_file(client: Client, finished: run_pb2.Run, pool: Any, images: Path) -> None:
    rows = pa.table({"instance_id": [r["id"] for r in pool], "embedding": [[float(i)] for i in range(len(pool))]})
    pyarrow.parquet.write_table(rows, images / "embeddings.parquet")
    uri = (images / "embeddings.parquet").as_uri()
    made = client.select(finished, "k_center", budget=2, rules=PickRules(embeddings=uri))
    first, second = (p["pool_index"] for p in client.selected(made).to_pylist())
    assert second == (0 if first >= len(pool) / 2 else len(pool) - 1)
    with pytest.raises(HiBug2Error, match="outside the places images may be read from"):
        client.select(finished, "k_center", rules=PickRules(embeddings="file:///etc/passwd"))


def test_what_is_wrong_is_said(client: Client, finished: run_pb2.Run) -> None:
    with pytest.raises(HiBug2Error, match="budget: is 0"):
        client.select(finished, budget=0)
    with pytest.raises(HiBug2Error, match="no tagged instance is in the split 'train'"):
        client.select(finished, split="train")
    with pytest.raises(HiBug2Error, match="class_quota"):
        client.select(finished, rules=PickRules(class_quota=-1))


def test_the_pool_indexes_select_the_picks(client: Client, finished: run_pb2.Run, pool: Any, tmp_path: Path) -> None:
    picks = client.picks(finished)
    picks_file.writer(tmp_path / "p.index.json")(picks, tmp_path / "p.index.json")
    chosen = [pool[i]["id"] for i in json.loads((tmp_path / "p.index.json").read_text())]
    assert chosen == picks["instance_id"].to_pylist()


def test_what_to_collect_is_what_the_pool_lacks(client: Client, finished: run_pb2.Run) -> None:
    needs = client.data_needs(finished, wanted=1000).to_pylist()
    worst = {row["rank"]: row for row in client.slices(finished).to_pylist()}
    assert needs
    assert [n["slice_rank"] for n in needs] == sorted(n["slice_rank"] for n in needs)
    for need in needs:
        assert need["tags"] == worst[need["slice_rank"]]["tags"]
        assert need["slice_mean"] == worst[need["slice_rank"]]["mean"]
        assert need["pool_count"] + need["missing_count"] == 1000
        assert str(need["missing_count"]) in need["description"]
    assert len(client.data_needs(finished, wanted=1)) <= len(needs)


def test_a_repair_is_told_by_where_it_helped(client: Client, finished: run_pb2.Run) -> None:
    made = client.select(finished, rivals=["margin"])
    found = client.compare_repair(finished, {"v2": f"{made.name}#margin"}, repaired=[1, 2]).to_pylist()
    assert found[1]["method"] == "margin"
    assert found[1]["added_count"] == client.selected(made, "margin").num_rows
    before, after = ({g["group"]: g for g in row["groups"]} for row in found)
    assert {"overall", "failing", "other"} <= set(before) == set(after)
    for name, group in after.items():
        assert group["change"] == pytest.approx(group["mean"] - before[name]["mean"])
        assert group["change_low"] <= group["change"] <= group["change_high"]
    parts = [before[n]["scored_count"] for n in ("matching", "overlapping", "non_overlapping") if n in before]
    assert sum(parts) == before["failing"]["scored_count"]
