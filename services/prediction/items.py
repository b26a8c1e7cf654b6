"""Slices as rows of items: their keys, the classes they name, and the caps that every method of prediction keeps.

Items number the (attribute, tag) pairs as the enumerated slices do: offset of the attribute + code of the tag,
where the offsets are the running sums of the tag counts in the order of the schema.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from shared.errors import Violation, invalid, refuse
from shared.schema import MAIN_OBJECT, Schema

Ints = NDArray[np.int32] | NDArray[np.int64]
Floats = NDArray[np.float32] | NDArray[np.float64]

MAX_PER_CLASS = 20  # the paper's number (5.4)
MAX_PREDICTIONS = 1000


def attribute_of_items(schema: Schema) -> NDArray[np.int64]:
    """(T,) position in the schema of each item's attribute."""
    return np.repeat(np.arange(len(schema.attributes)), schema.tag_counts)


def row_keys(items: Ints, n_items: int) -> NDArray[np.int64]:
    """One number >= 0 a row (n, D): equal for equal rows, and ordered as the rows are.

    The columns are digits of one number; where they would not fit in 63 bits, the number so far gives way to
    its rank.
    """
    base = n_items + 1  # -1 is a digit too
    keys = np.zeros(len(items), np.int64)
    span = 1
    for column in items.T:
        if span > np.iinfo(np.int64).max // base:
            distinct, keys = np.unique(keys, return_inverse=True)
            span = len(distinct)
        keys = keys * base + (column.astype(np.int64) + 1)
        span *= base
    return keys


def class_of(schema: Schema, items: Ints) -> NDArray[np.int64]:
    """The item of the class that each row (P, D) names, -1 where it names none; (P,)."""
    offset = 0
    for attribute in schema.attributes:
        if attribute.name == MAIN_OBJECT:
            ours = (items >= offset) & (items < offset + len(attribute.tags))
            # A slice names an attribute once at most, so there is one item to find.
            named: NDArray[np.int64] = np.where(ours, items, -1).max(axis=1, initial=-1).astype(np.int64)
            return named
        offset += len(attribute.tags)
    return np.full(len(items), -1, np.int64)


def within_caps(classes: NDArray[np.int64], max_per_class: int, max_rows: int = MAX_PREDICTIONS) -> NDArray[np.int64]:
    """Positions of the rows to keep of rows in rank order: the first of each class, and the first in all.

    `classes` (P,) as `class_of` gives them; the rows that name no class are kept as those of one more class.
    """
    by_class = np.argsort(classes, kind="stable")
    grouped = classes[by_class]
    place = np.arange(len(classes)) - np.searchsorted(grouped, grouped)  # 0, 1, … in each class
    return np.sort(by_class[place < max_per_class])[:max_rows]


def check_limits(**limits: int) -> None:
    """InvalidInput naming every limit that is below 1."""
    refuse(Violation(field, f"is {value}; give 1 or more") for field, value in limits.items() if value < 1)


def check_items(field: str, items: Ints, attribute_of: NDArray[np.int64]) -> None:
    """Refuse items (n, D) that are not slices: pairs of the schema, ascending, an attribute once, then -1."""
    if items.ndim != 2 or not items.shape[1] or not np.issubdtype(items.dtype, np.integer):
        raise invalid(field, f"is {items.dtype} of shape {items.shape}; give integers (slices, depth)")
    n_items = len(attribute_of)
    wrong: NDArray[np.bool_] = np.asarray(((items < -1) | (items >= n_items)).any(axis=1) | (items[:, 0] < 0))
    if not wrong.any():
        attributes = np.append(attribute_of, n_items)[items]  # -1 finds the last: padding comes after them all
        rises = (np.diff(attributes, axis=1) > 0) | (items[:, 1:] < 0)
        wrong = np.asarray(~rises.all(axis=1))
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        raise invalid(
            f"{field}[{row}]",
            f"{items[row].tolist()} is no slice of the schema: give items 0 to {n_items - 1} ascending, "
            "each attribute once, padded with -1",
        )
