from __future__ import annotations

import io
from collections import Counter
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from services.attribute.sample import Sample, given_attributes, sample_rows, take_sample
from services.gateway.datasets import check_instances
from shared.errors import Precondition, Unavailable
from shared.images.reader import ImageReader
from shared.schema import MAIN_OBJECT, Category, Schema, Task, check_schema


def instances(labels: list, splits: list | None = None, uris: list | None = None, **columns: list) -> pa.Table:
    n = len(labels)
    return check_instances(
        pa.table(
            {
                "instance_id": [f"i{i}" for i in range(n)],
                "image_uri": uris or ["x"] * n,
                "label": pa.array(labels, pa.string()),
                "split": pa.array(splits or ["validation"] * n, pa.string()),
                **{name: pa.array(values, pa.string()) for name, values in columns.items()},
            }
        ),
        Task.CLASSIFICATION,
    )


labelled = st.lists(
    st.tuples(st.sampled_from([None, "a", "b", "c"]), st.sampled_from(["train", "validation", "pool"])),
    min_size=1,
    max_size=60,
)


@settings(deadline=None)
@given(labelled, st.integers(1, 40), st.integers(0, 5))
def test_a_sample_is_seen_once_off_the_training_split_and_spread_over_classes(rows, count, seed):
    table = instances([label for label, _ in rows], [split for _, split in rows])
    chosen = sample_rows(table, count, seed)
    eligible = [i for i, (_, split) in enumerate(rows) if split != "train"] or list(range(len(rows)))
    assert chosen.tolist() == sorted(set(chosen.tolist()))
    assert set(chosen.tolist()) <= set(eligible)
    assert len(chosen) == min(count, len(eligible))
    assert sample_rows(table, count, seed).tolist() == chosen.tolist()
    there = Counter(rows[i][0] for i in eligible)
    seen = Counter(rows[i][0] for i in chosen.tolist())
    most = max(seen.values())
    assert all(seen[label] >= min(there[label], most - 1) for label in there)


def test_another_seed_gives_another_sample():
    table = instances(["a"] * 1000)
    assert sample_rows(table, 20, 1).tolist() != sample_rows(table, 20, 2).tolist()


@pytest.fixture
def images(tmp_path: Path) -> tuple[ImageReader, list[str]]:
    for i, level in enumerate((0, 255)):
        Image.new("L", (20, 10), level).save(tmp_path / f"{i}.png")
    return ImageReader((tmp_path.as_uri(),)), [f"{tmp_path.as_uri()}/{i}.png" for i in (0, 1, 2)]


async def test_a_sample_holds_the_images_that_can_be_read(images):
    reader, uris = images
    table = instances(["a", "b", None], uris=uris)
    scores = np.array([0.0, 0.5, 1.0])
    got = take_sample(table, np.array([2, 1, 0]), ["brightness"], reader, scores)
    assert got.values.shape == (2, 1)
    assert got.values[0, 0] > got.values[1, 0]
    assert got.labels == ("b", "a")
    assert got.scores.tolist() == [0.5, 0.0]
    shown = await got.shown(0, 1)
    assert [Image.open(io.BytesIO(jpeg)).size for jpeg in shown] == [(20, 10)] * 2
    assert np.isnan(take_sample(table, np.array([0, 1]), ["brightness"], reader).scores).all()
    with pytest.raises(Precondition, match=r"none of the 1 sampled images .* no such file"):
        take_sample(table, np.array([2]), ["brightness"], reader)
    with pytest.raises(Precondition, match="no images"):
        take_sample(table, np.array([], dtype=np.int64), ["brightness"], reader)


def remove(uri: str) -> None:
    Path(unquote(urlsplit(uri).path)).unlink()


async def test_an_image_that_went_away_is_passed_over_and_storage_that_is_away_is_told(images, monkeypatch):
    reader, uris = images
    got = take_sample(instances(["a"] * 3, uris=uris), np.arange(3), ["brightness"], reader)
    remove(uris[1])
    assert await got.shown(0) is not None
    assert await got.shown(0, 1) is None

    def away(*_):
        raise Unavailable("away")

    monkeypatch.setattr(ImageReader, "open", away)
    with pytest.raises(Unavailable):
        take_sample(instances(["a"]), np.array([0]), ["brightness"], reader)
    with pytest.raises(Unavailable):
        await got.shown(0)


async def test_the_object_is_shown_with_what_is_around_it(tmp_path):
    Image.new("L", (400, 200), 128).save(tmp_path / "wide.png")
    table = instances(["a"], uris=[f"{tmp_path.as_uri()}/wide.png"])
    boxed = table.set_column(table.schema.get_field_index("left_px"), "left_px", pa.array([100.0]))
    for name, value in (("top_px", 50.0), ("width_px", 100.0), ("height_px", 40.0)):
        boxed = boxed.set_column(boxed.schema.get_field_index(name), name, pa.array([value]))
    got = take_sample(boxed, np.array([0]), ["brightness"], ImageReader((tmp_path.as_uri(),)))
    [jpeg] = await got.shown(0)
    assert Image.open(io.BytesIO(jpeg)).size == (200, 80)


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.sampled_from([0.0, 0.4, 1.0, float("nan")])), min_size=1, max_size=40
    ),
    st.integers(1, 50),
    st.integers(0, 5),
)
def test_what_is_looked_at_is_spread_over_classes_and_scores(rows, count, seed):
    labels, scores = tuple(label for label, _ in rows), np.array([score for _, score in rows])
    got = Sample(labels, ("",) * len(rows), (None,) * len(rows), np.empty((len(rows), 0)), scores, ImageReader(()))
    chosen = got.spread(count, seed)
    assert len(set(chosen.tolist())) == len(chosen) == min(count, len(rows))
    mean = np.nanmean(scores) if np.isfinite(scores).any() else 0
    groups = [(label, "" if np.isnan(s) else s < mean) for label, s in rows]
    there, seen = Counter(groups), Counter(groups[i] for i in chosen)
    most = max(seen.values())
    assert all(seen[group] >= min(n, most - 1) for group, n in there.items())


def test_the_class_and_the_columns_that_make_groups_become_attributes():
    table = instances(
        ["bear", "cat", None, "cat"],
        weather=["wet", "dry", None, "wet"],
        one=["x"] * 4,
        note=["a", "b", "c", "d"],
    )
    found = given_attributes(table)
    assert [(a.name, a.category, a.tags) for a in found] == [
        (MAIN_OBJECT, Category.MAIN_OBJECT, ("bear", "cat")),
        ("note", Category.GLOBAL, ("a", "b", "c", "d")),
        ("weather", Category.GLOBAL, ("dry", "wet")),
    ]


def test_a_single_class_and_a_column_of_ids_are_no_attribute():
    n = 200
    assert given_attributes(instances(["bear"] * n, id2=[f"{i}" for i in range(n)])) == ()


anything = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=6) | st.sampled_from(
    ["unknown", "Unknown", "is wet", "main object", "a=b", " a", "x" * 100, ",", "yes", "a\n"]
)


@settings(deadline=None)
@given(
    st.dictionaries(
        anything.filter(lambda name: name not in ("label", "split", "kind", "keypoints")),
        st.lists(anything, min_size=4, max_size=4),
        max_size=4,
    ),
    st.lists(st.sampled_from(["bear", "unknown", "cat", None]), min_size=4, max_size=4),
)
def test_whatever_the_manifest_holds_the_schema_obeys_the_rules(columns, labels):
    found = given_attributes(instances(labels, **columns))
    if found:
        check_schema(Schema(Task.CLASSIFICATION, (), found))
    assert all("unknown" not in {tag.casefold() for tag in a.tags} for a in found)
