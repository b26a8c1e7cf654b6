"""Which images are looked at, what is measured on them, and which attributes the manifest already holds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from shared.errors import HiBug2Error, Precondition, Unavailable
from shared.images.box import Box
from shared.images.measures import measure
from shared.images.reader import ImageReader
from shared.schema import MAIN_OBJECT, MAX_TAGS, UNKNOWN_TAG, Attribute, Category, Tagger, is_name

UNSEEN_SPLIT = "train"  # what is debugged is not the training data
_MAX_GIVEN_TAGS = 100


def sample_rows(instances: pa.Table, count: int, seed: int) -> npt.NDArray[np.int64]:
    """At most `count` rows of the splits other than train (of train when there is nothing else), spread over classes.

    Classes take turns, each in a seeded order of its own, so that a rare class is seen as well.
    """
    eligible = np.flatnonzero(pc.not_equal(instances.column("split"), UNSEEN_SPLIT).to_numpy())
    if not eligible.size:
        eligible = np.arange(instances.num_rows)
    labels = pc.fill_null(instances.column("label"), "").take(pa.array(eligible)).to_numpy(zero_copy_only=False)
    order = np.random.default_rng(seed).permutation(eligible.size)
    _, group = np.unique(labels[order].astype(str), return_inverse=True)
    turn = np.zeros(order.size, dtype=np.int64)
    for g in range(int(group.max()) + 1):
        members = np.flatnonzero(group == g)
        turn[members] = np.arange(members.size)
    chosen = order[np.lexsort((group, turn))][:count]
    return np.sort(eligible[chosen])


def measure_sample(
    instances: pa.Table, rows: npt.NDArray[np.int64], names: Sequence[str], reader: ImageReader
) -> npt.NDArray[np.float64]:
    """(readable images, len(names)) float64 measures of the instances at `rows`.

    Images that cannot be read are passed over; Precondition when none can, Unavailable when the storage is away.
    """
    values: list[npt.NDArray[np.float64]] = []
    last: HiBug2Error | None = None
    for row in instances.take(pa.array(rows)).to_pylist():
        box = None
        if row["left_px"] is not None:
            box = Box(row["left_px"], row["top_px"], row["width_px"], row["height_px"])
        try:
            values.append(measure(reader.open(row["image_uri"]), box, names))
        except Unavailable:
            raise
        except HiBug2Error as error:
            last = error
    if not values:
        raise Precondition(f"none of the {len(rows)} sampled images can be read, the last because {last}")
    return np.vstack(values)


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
