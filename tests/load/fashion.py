"""The images that repair is proved on: Fashion-MNIST, split anew by each seed, with a model and its error slices."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from sklearn.pipeline import Pipeline

from deploy.local.demo import load
from deploy.local.demo_data.make import CLASSES, SOURCE, read_idx
from deploy.local.demo_model import predict, train
from services.attribute.catalogue import catalogue_measures, measured_attributes
from services.enumeration.engine import enumerate_slices
from services.enumeration.error_slices import find_error_slices
from services.enumeration.families import extents_of, families
from services.enumeration.lattice import Slices
from services.enumeration.statistics import slice_significance
from services.repair.methods import ErrorSlices, Question, Units
from services.repair.selection import Pool
from shared.errors import NotFound
from shared.images.measures import MEASURES as KINDS
from shared.images.measures import measure
from shared.schema import MAIN_OBJECT, UNKNOWN, Attribute, Category, Schema, Tagger, Task

MIN_COUNT, MAX_DEPTH, MARGIN = 10, 3, 0.2
# The default of `slices_and_margin` was chosen on the first part of the images, what is told is about the others.
CHOSEN_ON, ORDER_SEED = 30_000, 7
NAMES = np.array(CLASSES, dtype=object)
MEASURES = catalogue_measures(Task.CLASSIFICATION, has_boxes=False)

Floats = NDArray[np.float64]
Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Images:
    """(n, 28, 28) uint8, their classes (n,) and measures (n, len(MEASURES))."""

    pixels: NDArray[np.uint8]
    classes: NDArray[np.int64]
    measures: Floats


def package_images() -> Images:
    """The images of Debian's package that nothing was chosen on; NotFound says how to get it."""
    if not SOURCE.is_dir():
        raise NotFound(
            f"{SOURCE} is not there: run `apt install dataset-fashion-mnist` (30 MB, Debian and Ubuntu), or take "
            "--quick, which does with the 17,000 images that are committed"
        )
    pixels = np.concatenate([read_idx(SOURCE / f"{part}-images-idx3-ubyte.gz") for part in ("train", "t10k")])
    classes = np.concatenate([read_idx(SOURCE / f"{part}-labels-idx1-ubyte.gz") for part in ("train", "t10k")])
    rest = np.random.default_rng(ORDER_SEED).permutation(len(pixels))[CHOSEN_ON:]
    return _measured(pixels[rest], classes[rest].astype(np.int64))


def committed_images() -> Images:
    """The images of the demo."""
    _, splits = load()
    pixels = np.concatenate([split.images for split in splits.values()])
    labels = [label for split in splits.values() for label in split.labels]
    return _measured(pixels, np.array([CLASSES.index(label) for label in labels]))


def _measured(pixels: NDArray[np.uint8], classes: NDArray[np.int64]) -> Images:
    with ProcessPoolExecutor(2) as workers:
        parts = list(workers.map(_measure, np.array_split(pixels, 40)))
    return Images(pixels, classes, np.concatenate(parts))


def _measure(pixels: NDArray[np.uint8]) -> Floats:
    return np.array([measure(np.repeat(image[:, :, None], 3, axis=2), None, MEASURES) for image in pixels])


def _codes(values: Floats, attribute: Attribute) -> NDArray[np.uint16]:
    """(n,) what the measured tagger says, from measures that were taken once for all seeds."""
    codes = np.full(len(values), UNKNOWN, np.uint16)
    known = np.isfinite(values)
    assert attribute.measure is not None
    tags = KINDS[attribute.measure.name].tags
    if tags:
        codes[known] = np.array([attribute.code(tag) for tag in tags], np.uint16)[values[known].astype(int)]
    else:
        codes[known] = np.searchsorted(attribute.measure.edges, values[known], side="right")
    return codes


class World:
    """One seed's splits, the model trained on the first, and its error slices on the second."""

    def __init__(self, images: Images, sizes: Mapping[str, int], seed: int) -> None:
        self.images, self.seed = images, seed
        order = np.random.default_rng(seed).permutation(len(images.pixels))
        bounds = np.cumsum(list(sizes.values()))
        self.rows = dict(zip(sizes, np.split(order, bounds)[:-1], strict=True))
        self.model = self.fit(np.empty(0, np.int64))
        fitted = measured_attributes(images.measures[self.rows["validation"]], MEASURES, Task.CLASSIFICATION, False)
        main = Attribute(MAIN_OBJECT, Category.MAIN_OBJECT, tuple(CLASSES), Tagger.GIVEN)
        self.schema = Schema(Task.CLASSIFICATION, tuple(CLASSES), (main, *fitted))
        self.tag_counts = np.array([len(a.tags) for a in self.schema.attributes])
        self.right = self.scores(self.model, "validation")
        self.slices: Slices = enumerate_slices(
            self.tags("validation"), self.tag_counts, self.right[:, None], min_count=MIN_COUNT, max_depth=MAX_DEPTH
        )
        mean, loss = float(self.right.mean()), float((1 - self.right).sum())
        found = find_error_slices(self.slices, 0, mean, loss, margin=MARGIN)
        p_value, _ = slice_significance(self.slices, 0, self.right, min_scored=MIN_COUNT)
        items = self.slices.items[found.index]
        extents = extents_of(self.tags("validation"), self.tag_counts, items)
        self.errors = ErrorSlices(
            items=items,
            mean=found.mean,
            drop=found.drop,
            count=self.slices.count[found.index],
            p_value=p_value[found.index],
            family=families(extents, items).representative + 1,
        )

    def fit(self, added: Rows) -> Pipeline:
        """The model trained on the training images and the pool's at `added`, by their true classes."""
        rows = np.concatenate([self.rows["train"], self.rows["pool"][added]])
        return train(self.images.pixels[rows], NAMES[self.images.classes[rows]].tolist())

    def scores(self, model: Pipeline, split: str) -> Floats:
        """(n,) 1 where the model is right about an image of `split`, else 0."""
        rows = self.rows[split]
        said, _ = predict(model, self.images.pixels[rows])
        return (np.array(said, dtype=object) == NAMES[self.images.classes[rows]]).astype(np.float64)

    def tags(self, split: str, classes: NDArray[np.int64] | None = None) -> NDArray[np.uint16]:
        """(n, A) tag codes of `split`; the class is the true one where `classes` does not say another."""
        rows = self.rows[split]
        measures = self.images.measures[rows]
        columns = [
            _codes(measures[:, MEASURES.index(a.measure.name)], a)
            for a in self.schema.attributes
            if a.measure is not None
        ]
        own = self.images.classes[rows] if classes is None else classes
        return np.column_stack([own.astype(np.uint16), *columns])

    def members(self, split: str) -> NDArray[np.bool_]:
        """(E, n) which images of `split` lie in each error slice, by their true class."""
        extents = extents_of(self.tags(split), self.tag_counts, self.errors.items)
        held = np.unpackbits(extents.words.view(np.uint8), axis=1, count=extents.n_rows, bitorder="little")
        return held.astype(bool)

    @cached_property
    def probabilities(self) -> Floats:
        """(pool, classes) in the order of CLASSES."""
        _, found = predict(self.model, self.images.pixels[self.rows["pool"]])
        order = [list(self.model.classes_).index(name) for name in CLASSES]
        return found[:, order]

    @cached_property
    def question(self) -> Question:
        """What the methods see of the pool: no class but what the model says."""
        p = self.probabilities
        ids = [f"{row:05d}" for row in self.rows["pool"]]
        vectors = [
            self.images.pixels[self.rows[split]].reshape(-1, 28 * 28).astype(np.float32) / 255
            for split in ("pool", "train")
        ]
        return Question(
            pool=Pool(ids, self.tags("pool", p.argmax(axis=1)), self.tag_counts),
            units=Units(ids, np.arange(len(ids))),
            errors=self.errors,
            class_column=0,
            confidences=pa.nulls(len(ids), pa.float64()),
            probabilities=pa.array(p.tolist(), pa.list_(pa.float32())),
            vectors=lambda: (vectors[0], vectors[1]),
        )
