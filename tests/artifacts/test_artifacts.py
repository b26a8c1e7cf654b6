"""What a release wrote into the store is read by this one, and what this one writes holds the same."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from services.enumeration.slices import StoredSlices, open_slices
from services.gateway.report.gather import Outcomes, RunRefs, gather
from services.gateway.report.render import render
from services.prediction.ranked import open_ranking
from services.repair.pick import question_of, read_picks
from services.tagging.reuse import attribute_key, known_codes
from services.tagging.shelf import Shelf
from shared.images.reader import ImageReader
from shared.schema import UNKNOWN
from shared.store.artifacts import Artifacts, TagTable, scores_in_order
from shared.store.store import Store
from tests.artifacts import write

RELEASES = sorted(
    (path for path in write.HERE.iterdir() if re.fullmatch(r"\d[\d.]*", path.name)),
    key=lambda path: [int(number) for number in path.name.split(".")],
)


@pytest.fixture(params=RELEASES, ids=lambda path: path.name)
def artifacts(request: pytest.FixtureRequest) -> Artifacts:
    return Artifacts(Store(request.param.as_uri()), write.TEAM)


def validation(artifacts: Artifacts) -> tuple[TagTable, np.ndarray]:
    """Tags and scores of the instances that are ranked: the first of the dataset."""
    table = artifacts.tag_table(write.TAGGING).take(np.arange(write.N))
    return table, scores_in_order(artifacts.scores(artifacts.model(write.DATASET, write.MODEL)), table.instance_ids)


def members(table: TagTable, pairs: list[dict[str, str]]) -> np.ndarray:
    held = np.ones(len(table.codes), bool)
    for pair in pairs:
        at = table.schema.names().index(pair["attribute"])
        held &= table.codes[:, at] == table.schema.attributes[at].code(pair["tag"])
    return held


def test_tags_are_read_with_their_dataset_and_schema(artifacts: Artifacts) -> None:
    instances = artifacts.instances(artifacts.dataset(write.DATASET))
    table = artifacts.tag_table(write.TAGGING)
    assert artifacts.current_schema_id(write.DATASET) == table.schema.schema_id
    assert table.instance_ids.equals(instances.column("instance_id").combine_chunks())
    assert table.codes.shape == (write.N + write.POOL, 4)
    classes = table.schema.attributes[0].tags
    told = [classes[code] if code != UNKNOWN else None for code in table.codes[:, 0]]
    assert told == instances.column("label").to_pylist()
    assert told.count(None) == write.POOL
    weather = [dict(given)["weather"] for given in instances.column("given").to_pylist()]
    assert [table.schema.attributes[1].tags[code] for code in table.codes[:, 1]] == weather
    (dead,) = Shelf(artifacts, write.TAGGING).dead()
    assert table.codes[1, 2:].tolist() == [UNKNOWN, UNKNOWN]
    assert (dead.instance_id, dead.reason) == ("i001", "the image is empty")


def test_tags_are_taken_over_by_another_tagging(artifacts: Artifacts) -> None:
    instances = artifacts.instances(artifacts.dataset(write.DATASET))
    table = artifacts.tag_table(write.TAGGING)
    looked_at = table.schema.attributes[2:]
    keys = [attribute_key(a, "digest", "m", "") for a in looked_at]
    known = known_codes(artifacts, write.DATASET, instances, looked_at, keys)
    assert known.codes.tolist() == table.codes[:, 2:].tolist()
    assert np.flatnonzero(~known.mask.all(axis=1)).tolist() == [1]


def test_slices_and_error_slices_are_those_of_tags_and_scores(artifacts: Artifacts) -> None:
    table, scores = validation(artifacts)
    slices, errors = (open_slices(artifacts, name) for name in (write.ENUMERATION, write.RANKING))
    for row in shown(slices):
        assert row["count"] == members(table, row["tags"]).sum() >= 10
    found = shown(errors)
    assert [row["rank"] for row in found] == list(range(1, len(found) + 1))
    assert len(found) > 1
    for row in found:
        inside = members(table, row["tags"])
        assert row["count"] == inside.sum()
        assert row["mean"] == pytest.approx(scores[inside].mean())
        assert row["drop"] == pytest.approx(scores.mean() - row["mean"])
        assert sum(share["drop"] for share in row["blame"]) == pytest.approx(row["drop"])
        assert 0 <= row["p_value"] <= row["q_value"] <= 1


def shown(stored: StoredSlices) -> list[dict]:
    return stored.arrow(np.arange(len(stored.items)), frozenset()).to_pylist()


def test_predictions_and_picks_are_read_and_can_be_made_of_what_they_stand_on(artifacts: Artifacts) -> None:
    ranked = open_ranking(artifacts, write.RANKING)
    assert len(ranked.enumerated) == artifacts.manifest(write.ENUMERATION).summary["slice_count"]
    assert ranked.scores.tolist() == validation(artifacts)[1].tolist()
    picks, pairs = read_picks(artifacts, write.SELECTION, None)
    assert set(pairs) == {(a.name, tag) for a in ranked.schema.attributes for tag in a.tags}
    question, rows = question_of(artifacts, write.RANKING, "pool", read_file=write.no_file, embeddings_uri="")
    assert len(question.errors) == ranked.error_slices.num_rows
    assert set(picks.column("instance_id").to_pylist()) <= set(rows.column("instance_id").to_pylist())
    assert 0 < picks.num_rows == artifacts.manifest(write.SELECTION).summary["pick_count"]


def test_the_report_of_a_run_is_made(artifacts: Artifacts) -> None:
    refs = RunRefs("runs/r", write.DATASET, write.MODEL, write.RANKING, write.PREDICTION, write.SELECTION)
    found = gather(artifacts, ImageReader(()), refs, Outcomes())
    assert found.instance_count == write.N
    assert found.error_slices
    assert found.predicted_slices
    assert found.repair is not None
    assert found.repair.by_slice
    assert "lying" in render(found)


def test_what_is_written_today_holds_what_the_last_release_wrote(tmp_path: Path) -> None:
    write.write(tmp_path)
    assert form(tmp_path) == form(RELEASES[-1]), (
        f"artifacts hold something else than in {RELEASES[-1].name}: see whether its services can read them, say in "
        "CHANGELOG.md if not (there is no way back then), and keep a set by `python -m tests.artifacts.write`"
    )


def form(folder: Path) -> dict[str, object]:
    """File -> its columns or keys with their types; a name that is a hash is a star."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*.*")):
        name = re.sub(r"[0-9a-f]{16,}", "*", str(path.relative_to(folder)))
        if path.suffix == ".parquet":
            found[name] = pq.read_schema(path).remove_metadata().to_string()
        else:
            found[name] = keys_of(json.loads(path.read_text()))
    return found


def keys_of(value: object) -> object:
    if isinstance(value, dict):
        return {key: keys_of(inner) for key, inner in value.items()}
    return [keys_of(inner) for inner in value] if isinstance(value, list) else type(value).__name__
