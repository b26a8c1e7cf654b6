import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from deploy.local.demo_data import make


@pytest.fixture(scope="module")
def table() -> pa.Table:
    return pq.read_table(make.OUT)


def test_the_file_is_small_enough_for_a_repository() -> None:
    assert make.OUT.stat().st_size <= 8_000_000


def test_rows_are_those_of_the_readme(table: pa.Table) -> None:
    assert table.column_names == ["id", "split", "label", "image"]
    splits = table["split"].to_pylist()
    assert {split: splits.count(split) for split in set(splits)} == make.SPLITS
    assert set(table["label"].to_pylist()) == set(make.CLASSES)
    readme = Path(make.__file__).with_name("README.md").read_text()
    for split, size in make.SPLITS.items():
        assert f"| {split} | {size:,} |" in readme


def test_ids_and_splits_follow_the_seed(table: pa.Table) -> None:
    rows = zip(table["split"].to_pylist(), table["id"].to_pylist(), strict=True)
    chosen = make.choose(np.random.default_rng(make.SEED))
    assert list(rows) == [(s, f"fashion-{p:05d}") for s, at in chosen.items() for p in np.sort(at)]


@given(st.integers(0, 2**32))
def test_splits_are_apart_and_the_test_split_is_of_the_test_part(seed: int) -> None:
    chosen = make.choose(np.random.default_rng(seed))
    assert {split: len(at) for split, at in chosen.items()} == make.SPLITS
    every = np.concatenate(list(chosen.values()))
    assert len(np.unique(every)) == len(every)
    for split, at in chosen.items():
        assert np.all((at >= make.TRAIN_PART) == (split == "test"))
    assert every.min() >= 0
    assert every.max() < 70_000


def test_every_image_is_a_different_grey_png(table: pa.Table) -> None:
    pixels = set()
    for data in table["image"].to_pylist():
        with Image.open(io.BytesIO(data)) as image:
            assert (image.format, image.mode, image.size) == ("PNG", "L", (28, 28))
            pixels.add(image.tobytes())
    assert len(pixels) == table.num_rows


@given(arrays(np.uint8, (28, 28)))
def test_png_loses_nothing(image: np.ndarray) -> None:
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(make.png(image)))), image)
