"""Which images are looked at, what is measured on them, and which attributes the manifest already holds."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from shared import logs
from shared.errors import HiBug2Error, Precondition, Unavailable
from shared.images.box import Box
from shared.images.measures import measure
from shared.images.reader import ImageReader, crop, resized_jpeg
from shared.schema import MAIN_OBJECT, MAX_TAGS, UNKNOWN_TAG, Attribute, Category, Tagger, is_name

UNSEEN_SPLIT = "train"  # what is debugged is not the training data
SHOWN_SIDE_PX = 768  # longest side of an image that a model is shown
_CROP_MARGIN = 0.5  # of the box on each side: what is around the object is asked about as well
_MAX_GIVEN_TAGS = 100

log = logs.get("attribute.sample")


@dataclass(frozen=True)
class Sample:
    """Instances whose images can be read, n of them, and what is known of each."""

    labels: tuple[str, ...]  # the class, or what stands for it where it is not known
    uris: tuple[str, ...]
    boxes: tuple[Box | None, ...]
    values: npt.NDArray[np.float64]  # (n, m) what was measured, NaN where it cannot be
    scores: npt.NDArray[np.float64]  # (n,) of the model under debugging, NaN where unknown
    reader: ImageReader

    async def shown(self, *indices: int) -> list[bytes] | None:
        """The instances with their surroundings as a model is shown them, JPEGs; None when one cannot be read any more.

        Raises Unavailable when the storage is away.
        """
        try:
            return [await asyncio.to_thread(self._jpeg, i) for i in indices]
        except Unavailable:
            raise
        except HiBug2Error as error:
            log.warning("image passed over", error=str(error))
            return None

    def _jpeg(self, i: int) -> bytes:
        image, box = self.reader.open(self.uris[i]), self.boxes[i]
        return resized_jpeg(image if box is None else crop(image, box, _CROP_MARGIN), SHOWN_SIDE_PX)

    def spread(self, count: int, seed: int) -> npt.NDArray[np.int64]:
        """At most `count` instances, spread over classes and, where scores are known, over good and bad ones."""
        side = np.full(len(self.labels), "", dtype="<U6")
        known = np.isfinite(self.scores)
        if known.any():
            side[known] = np.where(self.scores[known] < self.scores[known].mean(), "worse", "better")
        groups = [f"{label}\n{s}" for label, s in zip(self.labels, side, strict=True)]
        return np.sort(_in_turns(np.array(groups, dtype=str), np.random.default_rng(seed))[:count])


def sample_rows(instances: pa.Table, count: int, seed: int) -> npt.NDArray[np.int64]:
    """At most `count` rows of the splits other than train (of train when there is nothing else), spread over classes.

    Classes take turns, each in a seeded order of its own, so that a rare class is seen as well.
    """
    eligible = np.flatnonzero(pc.not_equal(instances.column("split"), UNSEEN_SPLIT).to_numpy())
    if not eligible.size:
        eligible = np.arange(instances.num_rows)
    labels = pc.fill_null(instances.column("label"), "").take(pa.array(eligible)).to_numpy(zero_copy_only=False)
    return np.sort(eligible[_in_turns(labels.astype(str), np.random.default_rng(seed))[:count]])


def _in_turns(groups: npt.NDArray[np.str_], rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """All positions, the groups taking turns, each in an order of its own."""
    order = rng.permutation(groups.size)
    _, group = np.unique(groups[order], return_inverse=True)
    turn = np.zeros(order.size, dtype=np.int64)
    for g in np.unique(group):
        members = np.flatnonzero(group == g)
        turn[members] = np.arange(members.size)
    return order[np.lexsort((group, turn))]


def take_sample(
    instances: pa.Table,
    rows: npt.NDArray[np.int64],
    names: Sequence[str],
    reader: ImageReader,
    scores: npt.NDArray[np.float64] | None = None,
    unnamed: str = "object",
) -> Sample:
    """The instances at `rows` whose images can be read, with the measures `names` of each.

    `scores` (instances,) float64 are of the model under debugging, NaN where unknown; `unnamed` is what an instance
    without a class is called. Precondition when no image can be read, Unavailable when the storage is away.
    """
    kept: list[int] = []
    boxes: list[Box | None] = []
    values: list[npt.NDArray[np.float64]] = []
    last: HiBug2Error | None = None
    chosen = instances.take(pa.array(rows))
    for i, row in enumerate(chosen.to_pylist()):
        box = None
        if row["left_px"] is not None:
            box = Box(row["left_px"], row["top_px"], row["width_px"], row["height_px"])
        try:
            values.append(measure(reader.open(row["image_uri"]), box, names))
        except Unavailable:
            raise
        except HiBug2Error as error:
            last = error
            continue
        kept.append(i)
        boxes.append(box)
    if not kept:
        raise Precondition(
            f"none of the {len(rows)} sampled images can be read, the last because {last}"
            if last
            else "the dataset has no images; add instances first"
        )
    there = chosen.take(pa.array(kept))
    return Sample(
        labels=tuple(label or unnamed for label in there.column("label").to_pylist()),
        uris=tuple(there.column("image_uri").to_pylist()),
        boxes=tuple(boxes),
        values=np.vstack(values),
        scores=np.full(len(kept), np.nan) if scores is None else scores[rows][kept],
        reader=reader,
    )


def given_attributes(instances: pa.Table) -> tuple[Attribute, ...]:
    """Attributes that need no look at an image: the class, where there are two or more, and the manifest's columns.

    A column with one value, or with so many that it names instances rather than groups, is left out, and so is one
    whose name or values cannot stand in a schema. The value "unknown" counts as none.
    """
    out: list[Attribute] = []
    labels = _values(instances.column("label").to_pylist())
    if 2 <= len(labels) <= MAX_TAGS:
        out.append(_given(MAIN_OBJECT, Category.MAIN_OBJECT, labels, "the class of the instance"))
    columns: dict[str, list[str | None]] = {}
    taken = {MAIN_OBJECT}
    for entries in instances.column("given").to_pylist():
        for name, value in entries or ():
            columns.setdefault(name, []).append(value)
    for name in sorted(columns):
        values = _values(columns[name])
        fits = all(is_name(text) for text in (name, *values))
        if 2 <= len(values) <= _MAX_GIVEN_TAGS and fits and name.casefold() not in taken:
            taken.add(name.casefold())
            out.append(_given(name, Category.GLOBAL, values, "a column of the manifest"))
    return tuple(out)


def _values(column: Sequence[str | None]) -> list[str]:
    return sorted({v for v in column if v and v.casefold() != UNKNOWN_TAG})


def _given(name: str, category: Category, tags: list[str], description: str) -> Attribute:
    return Attribute(name, category, tuple(tags), Tagger.GIVEN, description, sources=("user",))
