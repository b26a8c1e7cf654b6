"""Some of the slices in columns, several as one, and their order by rank."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from services.enumeration.lattice import Slices, item_offsets


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
    slices: Slices, beside: NDArray[np.float64], order: NDArray[np.int64]
) -> tuple[Slices, NDArray[np.float64]]:
    """The slices at `order`, and what is told of each, (S,); in their own arrays, a column at a time, to save memory.

    Scored counts that are a view of the counts stay one.
    """
    n = len(order)
    columns: list[NDArray[Any]] = [slices.items, slices.count, slices.total, beside]
    if slices.scored.flags.writeable:  # else it is a view of the counts
        columns.append(slices.scored)
    for column in columns:
        column[:n] = column[order]
    items, count, total, beside, *rest = (column[:n] for column in columns)
    scored = rest[0] if rest else np.broadcast_to(count[:, None], total.shape)
    return Slices(items, count, scored, total), beside


def rank_order(slices: Slices, column: int) -> NDArray[np.int64]:
    """Lines (S,): worst mean in `column` first, then larger count, then as they come; each has a scored row."""
    mean = slices.total[:, column] / slices.scored[:, column]
    smaller = np.negative(slices.count, dtype=np.int32, casting="unsafe")  # half the room of int64
    return np.lexsort((smaller, mean))  # stable
