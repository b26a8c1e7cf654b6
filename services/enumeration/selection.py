"""Some of the slices in columns, several as one, and their order by rank."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from services.enumeration.lattice import Slices, item_offsets

_SAMPLE, _SORTED_IN = 1_000, 32  # means looked at to cut a sort into so many parts
_AT_ONCE = 1 << 16  # slices that are given a part, or moved


def take(slices: Slices, lines: NDArray[np.int64] | NDArray[np.bool_]) -> Slices:
    """The slices at `lines`, copied."""
    return Slices(slices.items[lines], slices.count[lines], slices.scored[lines], slices.total[lines])


def copied(slices: Slices) -> Slices:
    """The same slices in arrays of their own."""
    return Slices(slices.items.copy(), slices.count.copy(), slices.scored.copy(), slices.total.copy())


def holding(slices: Slices, tag_counts: ArrayLike, attribute: int | None) -> NDArray[np.bool_]:
    """Which slices have a pair of `attribute` (S,); all when None."""
    if attribute is None:
        return np.ones(len(slices), dtype=np.bool_)
    first, end = item_offsets(tag_counts)[attribute : attribute + 2]
    return np.asarray(((slices.items >= first) & (slices.items < end)).any(axis=1))


def reordered(
    slices: Slices, beside: NDArray[np.float64], order: NDArray[np.signedinteger]
) -> tuple[Slices, NDArray[np.float64]]:
    """The slices at `order`, and what is told of each, (S,); in their own arrays, two bytes of each at a time, which
    takes room for two bytes of each.

    Scored counts that are a view of the counts stay one.
    """
    n = len(order)
    columns: list[NDArray[Any]] = [slices.items, slices.count, slices.total, beside]
    if slices.scored.flags.writeable:  # else it is a view of the counts
        columns.append(slices.scored)
    moved = np.empty(n, dtype=np.int16)
    for column in columns:
        for part in column.reshape(len(column), math.prod(column.shape[1:])).view(np.int16).T:
            for start in range(0, n, _AT_ONCE):  # numpy makes eight bytes of each line it looks up
                moved[start : start + _AT_ONCE] = part[order[start : start + _AT_ONCE]]
            part[:n] = moved
    items, count, total = slices.items[:n], slices.count[:n], slices.total[:n]
    scored = slices.scored[:n] if slices.scored.flags.writeable else np.broadcast_to(count[:, None], total.shape)
    return Slices(items, count, scored, total), beside[:n]


def rank_order(slices: Slices, column: int) -> NDArray[np.signedinteger]:
    """Lines (S,): worst mean in `column` first, then larger count, then as they come; each has a scored row.

    Sorted in some parts, one after the other, since a sort by two keys takes room for several copies of them.
    """
    scored, total = slices.scored[:, column], slices.total[:, column]

    def mean(lines: Any) -> NDArray[np.float64]:
        return np.asarray(total[lines] / scored[lines])

    some = np.sort(mean(slice(None, None, max(1, len(slices) // _SAMPLE))))
    edges = np.unique(some[:: max(1, len(some) // _SORTED_IN)])  # equal means are in one part
    part = np.empty(len(slices), dtype=np.uint8)
    for start in range(0, len(slices), _AT_ONCE):
        here = slice(start, start + _AT_ONCE)
        part[here] = np.searchsorted(edges, mean(here), side="right")
    order = np.empty(len(slices), dtype=np.min_scalar_type(-len(slices) - 1))  # four bytes each for a million
    start = 0
    for p in range(len(edges) + 1):
        lines = np.flatnonzero(part == p)
        order[start : start + len(lines)] = lines[np.lexsort((-slices.count[lines], mean(lines)))]  # stable
        start += len(lines)
    return order
