"""How far error slices are to be believed, models side by side, the gate, and a hypothesis: through the client only."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.csv
import pytest

from hibug2 import Client
from hibug2.v1 import run_pb2
from tests.e2e.test_pipeline import scores_of


@pytest.fixture(scope="module")
def versions(platform: Any, images: Path) -> tuple[run_pb2.Run, run_pb2.Run]:
    """Runs of two models, v2 right more often, on a dataset of its own."""
    with platform.client() as client:
        client.create_dataset("versions", images / "manifest.csv")
        for model in ("v1", "v2"):
            client.add_scores("versions", model, images / f"{model}.csv")
        return client.run("versions", "v1", budget=20), client.run("versions", "v2", budget=20)


def test_error_slices_carry_their_belief(client: Client, versions: tuple[run_pb2.Run, run_pb2.Run]) -> None:
    run = versions[0]
    rows = client.slices(run).to_pylist()
    assert all(0 <= row["p_value"] <= row["q_value"] <= 1 for row in rows)
    assert run.summary.significant_slice_count == sum(row["q_value"] <= 0.05 for row in rows)
    assert run.summary.HasField("expected_by_chance")
    assert run.summary.expected_by_chance < len(rows)
    for row in rows[:20]:
        assert sum(b["drop"] for b in row["blame"]) == pytest.approx(row["drop"])
    sure = client.slices(run, filter='q_value <= 0.05 AND class = "Shirt"', order_by="error_share desc").to_pylist()
    assert 0 < len(sure) < len(rows)
    assert all({"attribute": "main object", "tag": "Shirt"} in row["tags"] for row in sure)


def test_families_hold_every_error_slice_once(client: Client, versions: tuple[run_pb2.Run, run_pb2.Run]) -> None:
    run = versions[0]
    families = client.families(run).to_pylist()
    members = sorted(rank for family in families for rank in family["member_ranks"])
    assert members == list(range(1, run.summary.error_slice_count + 1))
    assert len(families) == run.summary.family_count
    shares = [f["covered_share"] for f in families if f["cover_rank"]]
    assert shares == sorted(shares)
    assert 0 < shares[-1] <= 1


def test_a_hypothesis_is_scored_as_its_instances_say(
    client: Client, versions: tuple[run_pb2.Run, run_pb2.Run], images: Path
) -> None:
    scores = scores_of(images, "v1")
    manifest = pyarrow.csv.read_csv(images / "manifest.csv").to_pylist()
    chosen = [r["id"] for r in manifest if r["split"] == "validation" and r["label"] in ("Shirt", "Coat")]
    found = client.hypothesis(versions[0], {"main object": ["Shirt", "Coat"]})
    assert found["count"] == len(chosen)
    assert found["mean"] == pytest.approx(np.mean([scores[i] for i in chosen]))
    assert found["p_value"] < 1e-6
    with pytest.raises(Exception, match="Trouserz"):
        client.hypothesis(versions[0], {"main object": ["Trouserz"]})


def test_what_one_half_finds_the_other_confirms(client: Client, versions: tuple[run_pb2.Run, run_pb2.Run]) -> None:
    rows = client.confirm(versions[0]).to_pylist()
    assert rows
    shirts = [row for row in rows if {"attribute": "main object", "tag": "Shirt"} in row["tags"]]
    assert min(row["q_value"] for row in shirts if row["q_value"] is not None) <= 0.05
    assert all(row["found_count"] >= 5 for row in rows)
    assert client.confirm(versions[0], limit=3).num_rows == 3


def test_two_models_side_by_side(client: Client, versions: tuple[run_pb2.Run, run_pb2.Run]) -> None:
    found = client.compare_models(versions)
    assert 0 <= found.average_overlap <= 1
    assert found.changes["fixed"] > 0
    swapped = client.compare_models(versions[::-1])
    assert swapped.changes["new"] == found.changes["fixed"]


def gate(platform: Any, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [Path(sys.executable).parent / "hibug2", "--json", "gate", "--dataset", "versions", *arguments]
    environment = {**os.environ, "HIBUG2_ADDRESS": platform.address}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_the_gate_lets_a_better_version_pass_and_stops_a_worse_one(
    platform: Any, client: Client, versions: tuple[run_pb2.Run, run_pb2.Run], images: Path
) -> None:
    passed = gate(platform, "--baseline", "v1", "--candidate", "v2", "--max-drop", "0.05")
    assert passed.returncode == 0, passed.stderr
    assert json.loads(passed.stdout)["passed"] is True
    # A version that takes every second trouser for a dress is worse there and hardly so overall.
    rows = pyarrow.csv.read_csv(images / "v2.csv").to_pylist()
    labels = {r["id"]: r["label"] for r in pyarrow.csv.read_csv(images / "manifest.csv").to_pylist()}
    worse = [
        {**row, "predicted": "Dress" if labels[row["id"]] == "Trouser" and i % 2 else row["predicted"]}
        for i, row in enumerate(rows)
    ]
    pyarrow.csv.write_csv(pyarrow.Table.from_pylist(worse), images / "v3.csv")
    client.add_scores("versions", "v3", images / "v3.csv")
    stopped = gate(platform, "--baseline", "v2", "--candidate", "v3", "--max-drop", "0.1")
    assert stopped.returncode == 1, stopped.stderr
    reasons = json.loads(stopped.stdout)["violations"]
    assert any({"attribute": "main object", "tag": "Trouser"} in v["tags"] for v in reasons)
    unknown = gate(platform, "--baseline", "v2", "--candidate", "v9", "--max-drop", "0.1")
    assert unknown.returncode == 2
    assert "v9" in unknown.stderr
