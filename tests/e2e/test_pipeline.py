"""The spine through the client only: images and predictions in, error slices, predictions, picks and a report out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.csv
import pytest

from hibug2 import Client
from hibug2.v1 import run_pb2, types_pb2

REUSED = {run_pb2.STEP_KIND_SCHEMA, run_pb2.STEP_KIND_TAGGING, run_pb2.STEP_KIND_ENUMERATION}


@pytest.fixture(scope="module")
def finished(platform: Any, images: Path) -> run_pb2.Run:
    with platform.client() as client:
        client.create_dataset("bags", images / "manifest.csv")
        client.add_scores("bags", "v1", images / "v1.csv")
        return client.run("bags", "v1", budget=60)


def scores_of(images: Path, model: str) -> dict[str, float]:
    """Validation scores by id, worked out from the files that were sent."""
    manifest = pyarrow.csv.read_csv(images / "manifest.csv").to_pylist()
    said = {row["id"]: row["predicted"] for row in pyarrow.csv.read_csv(images / f"{model}.csv").to_pylist()}
    return {r["id"]: float(said[r["id"]] == r["label"]) for r in manifest if r["split"] == "validation"}


def test_a_run_finds_error_slices_and_says_what_it_found(finished: run_pb2.Run) -> None:
    assert finished.job.state == types_pb2.JOB_STATE_SUCCEEDED
    assert finished.steps[0].kind == run_pb2.STEP_KIND_SCHEMA
    summary = finished.summary
    assert summary.instance_count == 700
    assert summary.slice_count > summary.error_slice_count > 0
    assert summary.predicted_slice_count > 0
    assert 0 < summary.pick_count <= 60


def test_error_slices_are_what_their_instances_say(client: Client, finished: run_pb2.Run, images: Path) -> None:
    scores = scores_of(images, "v1")
    overall = float(np.mean(list(scores.values())))
    assert finished.summary.overall_mean == pytest.approx(overall)
    slices = client.slices(finished).to_pylist()
    assert len(slices) == finished.summary.error_slice_count
    assert [row["mean"] for row in slices] == sorted(row["mean"] for row in slices)
    assert any({"attribute": "main object", "tag": "Shirt"} in row["tags"] for row in slices)
    for row in slices[:10]:
        tags = {pair["attribute"]: pair["tag"] for pair in row["tags"]}
        ids = client.slice_instances(finished, tags)
        mean = float(np.mean([scores[i] for i in ids]))
        assert len(ids) == row["count"] >= 10
        assert mean == pytest.approx(row["mean"])
        assert mean < overall - 0.2
        for left_out in tags:
            parent = client.slice_instances(finished, {a: t for a, t in tags.items() if a != left_out})
            assert mean < np.mean([scores[i] for i in parent])


def test_predicted_slices_were_never_enumerated(client: Client, finished: run_pb2.Run) -> None:
    def key(row: dict[str, Any]) -> frozenset[tuple[str, str]]:
        return frozenset((pair["attribute"], pair["tag"]) for pair in row["tags"])

    enumerated = {key(row) for row in client.slices(finished.enumeration).to_pylist()}
    predicted = [key(row) for row in client.predicted(finished).to_pylist()]
    assert predicted
    assert len(set(predicted)) == len(predicted)
    assert not enumerated & set(predicted)


def test_picks_come_from_the_pool_once_and_say_why(client: Client, finished: run_pb2.Run, images: Path) -> None:
    manifest = pyarrow.csv.read_csv(images / "manifest.csv").to_pylist()
    pool = {row["id"] for row in manifest if row["split"] == "pool"}
    picks = client.picks(finished).to_pylist()
    ids = [row["instance_id"] for row in picks]
    assert len(ids) == len(set(ids)) == finished.summary.pick_count
    assert set(ids) <= pool
    assert all(row["slice_rank"] >= 1 for row in picks)
    random = client.picks(finished, "random")
    assert random.num_rows == len(picks)


def test_the_report_is_one_file_that_loads_nothing(client: Client, finished: run_pb2.Run) -> None:
    html = client.report(finished).decode()
    assert html.lower().startswith("<!doctype html>")
    assert "Shirt" in html
    assert "data:image/webp;base64," in html
    assert 'src="http' not in html
    assert "url(http" not in html


def test_a_second_model_reuses_schema_tags_and_slices(client: Client, finished: run_pb2.Run, images: Path) -> None:
    client.add_scores("bags", "v2", images / "v2.csv")
    second = client.run("bags", "v2", budget=60)
    assert second.schema == finished.schema
    assert second.enumeration == finished.enumeration
    assert {step.kind for step in second.steps if step.job.reused} >= REUSED
    assert second.summary.slice_count == finished.summary.slice_count
    assert second.summary.overall_mean == pytest.approx(float(np.mean(list(scores_of(images, "v2").values()))))
    assert second.ranking != finished.ranking


def test_another_margin_only_ranks_anew(client: Client, finished: run_pb2.Run) -> None:
    wider = client.run("bags", "v1", margin=0.3, budget=60)
    assert {step.kind for step in wider.steps if step.job.reused} >= REUSED
    assert 0 < wider.summary.error_slice_count < finished.summary.error_slice_count


@pytest.mark.parametrize("right", [False, True])
def test_a_model_that_is_always_right_or_always_wrong_has_a_report(
    client: Client, finished: run_pb2.Run, images: Path, right: bool
) -> None:
    model = "right" if right else "wrong"
    scores = pyarrow.table({"instance_id": list(scores_of(images, "v1")), "score": [float(right)] * 700})
    client.add_scores("bags", model, scores)
    run = client.run("bags", model)
    assert (run.job.state, run.summary.overall_mean) == (types_pb2.JOB_STATE_SUCCEEDED, float(right))
    assert f"{100 * right:.1f}%" in client.report(run).decode()


def test_teams_see_only_their_own(platform: Any, finished: run_pb2.Run) -> None:
    with platform.client(team="others") as stranger:
        assert stranger.datasets() == []
        assert stranger.runs() == []
        with pytest.raises(Exception, match="no run"):
            stranger.get_run(finished.name)
