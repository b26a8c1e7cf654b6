"""A report of real artifacts, its numbers counted again by hand."""

from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from services.enumeration.ranking import rank_artifact
from services.enumeration.slices import enumerate_artifact
from services.gateway.report import model as page
from services.gateway.report.gather import MAX_FAMILIES, PICTURES, Outcomes, RunRefs, gather
from services.gateway.report.render import render
from shared.images.reader import ImageReader
from shared.names import Name
from shared.schema import UNKNOWN, Attribute, Category, Schema, Tagger, Task
from shared.store.artifacts import (
    INSTANCES,
    SCORES,
    Artifacts,
    DatasetRecord,
    Manifest,
    ModelRecord,
    Provenance,
    TagTable,
    item_columns,
    tags_to_arrow,
)
from shared.store.store import Store

ROWS, IN_SPLIT = 700, 600
TAGS = (3, 2, 4, 2)
DATASET = "shapes"
SCHEMA = Schema(
    Task.CLASSIFICATION,
    ("thing",),
    tuple(
        Attribute(f"a{i}", Category.GLOBAL, tuple(f"t{t}" for t in range(n)), Tagger.GIVEN) for i, n in enumerate(TAGS)
    ),
)
RANKING = Name(DATASET, "rankings", "r1")


def table() -> tuple[np.ndarray, np.ndarray]:
    """Tags, some unknown, and scores: two planted slices, a few instances not scored, the last rows in the pool."""
    rng = np.random.default_rng(4)
    codes = np.column_stack([rng.integers(0, n, ROWS) for n in TAGS]).astype(np.uint16)
    bad = ((codes[:, 0] == 1) & (codes[:, 1] == 0)) | ((codes[:, 2] == 3) & (codes[:, 3] == 1))
    scores = (rng.random(ROWS) < np.where(bad, 0.4, 0.95)).astype(np.float64)
    scores[rng.choice(ROWS, 20, replace=False)] = np.nan
    scores[IN_SPLIT:] = np.nan
    codes[rng.random(codes.shape) < 0.02] = UNKNOWN
    return codes, scores


def store_artifacts(artifacts: Artifacts, images: Path, permutations: int) -> None:
    """A dataset whose instances are labelled by their row, up to its ranking."""
    codes, scores = table()
    ids = [f"i{row}" for row in range(ROWS)]
    image = BytesIO()
    Image.new("RGB", (8, 8)).save(image, "PNG")
    (images / "i.png").write_bytes(image.getvalue())
    columns = {
        "instance_id": ids,
        "image_uri": [(images / "i.png").as_uri()] * ROWS,
        "label": [str(row) for row in range(ROWS)],
        "split": ["validation"] * IN_SPLIT + ["pool"] * (ROWS - IN_SPLIT),
        "kind": ["object"] * ROWS,
    }
    empty = [None] * ROWS
    instances = pa.table({name: columns.get(name, empty) for name in INSTANCES.names}, schema=INSTANCES)
    part = artifacts.write_instances(DATASET, instances)
    artifacts.write_dataset(
        DatasetRecord(DATASET, Task.CLASSIFICATION, (part,), "d", ROWS, {"validation": IN_SPLIT}, ("thing",), "")
    )
    artifacts.write_schema(DATASET, SCHEMA, Provenance({}))
    tagging = Name(DATASET, "taggings", "t1")
    artifacts.write_part(tagging, "tags", tags_to_arrow(TagTable(pa.array(ids), codes, SCHEMA)))
    artifacts.complete(tagging, Manifest(Provenance({"dataset": "d"}, {"schema": SCHEMA.schema_id}), {}))
    known = {"instance_id": ids, "score": pa.array(scores, from_pandas=True), "predicted_label": ["other"] * ROWS}
    stored = pa.table({name: known.get(name, empty) for name in SCORES.names}, schema=SCORES)
    model = ModelRecord(DATASET, "m", "accuracy", "scores", ROWS, 0.0, "")
    artifacts.write_scores(model, stored)
    enumeration = Name(DATASET, "enumerations", "e1")
    quiet = {"on_progress": lambda *_: None, "cancelled": lambda: False}
    enumerate_artifact(artifacts, enumeration, tagging, "validation", 10, 3, 100_000, **quiet)
    rank_artifact(artifacts, RANKING, enumeration, model, margin=0.2, permutations=permutations, seed=0, **quiet)


def report(folder: Path, permutations: int = 6, prediction: Name | None = None) -> page.ReportData:
    artifacts = Artifacts(Store((folder / "store").as_uri()), "default")
    store_artifacts(artifacts, folder, permutations)
    refs = RunRefs("runs/r", DATASET, "m", RANKING, prediction, None)
    return gather(artifacts, ImageReader((folder.as_uri(),)), refs, Outcomes())


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> page.ReportData:
    return report(tmp_path_factory.mktemp("report"))


def members(pairs: tuple[page.Pair, ...]) -> np.ndarray:
    """The rows of the validation split that hold every pair."""
    codes, _ = table()
    held = np.arange(ROWS) < IN_SPLIT
    for attribute, tag in pairs:
        held &= codes[:, int(attribute[1:])] == int(tag[1:])
    return held


def rows_shown(found: page.ErrorSlice) -> list[int]:
    return [int(picture.caption.partition(" ")[0]) for picture in found.pictures]


def test_each_slice_tells_what_its_rows_say(data: page.ReportData) -> None:
    _, scores = table()
    scored = ~np.isnan(scores)
    assert data.error_slices
    assert data.error_slice_total == len(data.error_slices)
    q = [found.q for found in data.error_slices]
    assert q == sorted(q)
    by_rank = sorted(data.error_slices, key=lambda found: found.rank)
    assert [found.rank for found in by_rank] == list(range(1, len(by_rank) + 1))
    assert [found.mean for found in by_rank] == sorted(found.mean for found in by_rank)
    for found in data.error_slices:
        inside = members(found.pairs)
        assert found.count == inside.sum()
        assert found.mean == pytest.approx(scores[inside & scored].mean())
        assert len(found.blame) == len(found.pairs)
        assert sum(found.blame) == pytest.approx(found.drop)
        assert found.q is not None
        assert 0 <= found.q <= 1
        assert 1 <= found.told_by <= data.error_slice_total
        assert all(inside[row] and scores[row] == 0 for row in rows_shown(found))
    assert data.significant_count == sum(not found.may_be_luck for found in data.error_slices) > 0


def test_families_hold_the_errors_that_they_say(data: page.ReportData) -> None:
    _, scores = table()
    lost = np.nan_to_num(1.0 - scores)
    held = np.zeros(ROWS, dtype=bool)
    assert 1 < len(data.cover.families) <= MAX_FAMILIES
    gains = []
    for family in data.cover.families:
        found = family.told_by
        assert [other.pairs for other in data.error_slices if other.rank == found.rank] == [found.pairs]
        assert family.member_count == sum(other.told_by == found.rank for other in data.error_slices)
        inside = members(found.pairs)
        new = inside & ~held & (lost > 0)
        assert len(found.pictures) == min(PICTURES, new.sum()) > 0
        assert all(new[row] for row in rows_shown(found))
        gains.append(lost[new].sum())
        held |= inside
        assert family.error_share == pytest.approx(lost[held].sum() / lost.sum())
        assert family.instance_share == pytest.approx(held[~np.isnan(scores)].mean())
    assert gains == sorted(gains, reverse=True)


def test_the_cover_says_how_many_hold_a_share(data: page.ReportData) -> None:
    cover = data.cover
    assert cover.family_total == len({found.told_by for found in data.error_slices})
    shares = [family.error_share for family in cover.families]
    assert cover.error_share >= shares[-1]
    for share, number in cover.needed:
        assert number > len(shares) or shares[number - 1] >= share - 1e-9
        assert number == 1 or shares[min(number - 2, len(shares) - 1)] < share
    assert (0.5 in dict(cover.needed)) == (cover.error_share >= 0.5)


def test_doubtful_attributes_are_told_with_each_slice_that_has_them(tmp_path: Path) -> None:
    report(tmp_path)
    artifacts = Artifacts(Store((tmp_path / "store").as_uri()), "default")
    doubts = [{"attribute": f"a{i}", "doubt": "so so" if i == 1 else ""} for i in range(len(TAGS))]
    artifacts.write_quality(Name(DATASET, "taggings", "t1"), {"attributes": doubts})
    prediction = Name(DATASET, "predictions", "p1")
    predicted = {
        **item_columns(np.array([[0, 3], [0, 5]], np.int32)),
        "score": [0.9, 0.8],
        "origin_ranks": [[1], [1]],
        "from_item": [4, 6],
        "to_item": [3, 5],
    }
    artifacts.write_part(prediction, "predicted", pa.table(predicted))
    artifacts.complete(prediction, Manifest(Provenance({}, {"ranking": str(RANKING)}), {}))
    found = report(tmp_path, prediction=prediction)
    slices = [*found.error_slices, *(family.told_by for family in found.cover.families), *found.predicted_slices]
    assert [s.doubtful for s in found.predicted_slices] == [("a1",), ()]
    assert {s.doubtful for s in slices} == {(), ("a1",)}
    assert all(("a1" in s.doubtful) == ("a1" in dict(s.pairs)) for s in slices)
    assert render(found).count("doubtful tags: a1") == sum(bool(s.doubtful) for s in slices)


def test_a_report_is_of_what_was_ranked(tmp_path: Path) -> None:
    before = report(tmp_path)
    artifacts = Artifacts(Store((tmp_path / "store").as_uri()), "default")
    old = artifacts.scores(artifacts.model(DATASET, "m"))
    known = {"instance_id": old["instance_id"], "score": np.ones(ROWS), "predicted_label": ["now"] * ROWS}
    empty = pa.nulls(ROWS)
    new = pa.table({name: known.get(name, empty) for name in SCORES.names}, schema=SCORES)
    artifacts.write_scores(ModelRecord(DATASET, "m", "custom", "anew", ROWS, 1.0, ""), new)
    artifacts.write_dataset(replace(artifacts.dataset(DATASET), digest="grown"))
    refs = RunRefs("runs/r", DATASET, "m", RANKING, None, None)
    found = gather(artifacts, ImageReader((tmp_path.as_uri(),)), refs, Outcomes())
    assert (before.provenance["scores hash"], before.provenance["metric"]) == ("scores", "accuracy")
    said = {name: value for name, value in before.provenance.items() if name != "metric"}
    assert replace(found, made_at=before.made_at) == replace(before, provenance=said)


def test_what_chance_names_is_passed_on_or_left_out(data: page.ReportData, tmp_path: Path) -> None:
    assert data.by_chance is not None
    assert data.by_chance.low <= data.by_chance.mean <= data.by_chance.high
    without = report(tmp_path, permutations=0)
    assert without.by_chance is None
    assert "shuffled" not in render(without)
    assert "shuffled" in render(data)
