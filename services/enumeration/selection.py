"""Some of the slices in columns, several as one, and their order by rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

import numpy as np
from numpy.typing import ArrayLike, NDArray

from services.enumeration.lattice import Slices, item_offsets


def take(slices: Slices, lines: NDArray[np.int64] | NDArray[np.bool_]) -> Slices:
    """The slices at `lines`, copied."""
    return Slices(slices.items[lines], slices.count[lines], slices.scored[lines], slices.total[lines])


def copied(slices: Slices) -> Slices:
    """The same slices in arrays of their own."""
    return Slices(slices.items.copy(), slices.count.copy(), slices.scored.copy(), slices.total.copy())


def together(parts: Sequence[Slices]) -> Slices:
    """The slices of all parts, one after another; at least one part."""
    return Slices(*(np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(Slices)))


def nothing(max_depth: int, n_columns: int) -> Slices:
    """No slices."""
    return Slices(
        np.zeros((0, max_depth), dtype=np.int32),
        np.zeros(0, dtype=np.int64),
        np.zeros((0, n_columns), dtype=np.int64),
        np.zeros((0, n_columns)),
    )


def holding(slices: Slices, tag_counts: ArrayLike, attribute: int | None) -> NDArray[np.bool_]:
    """Which slices have a pair of `attribute` (S,); all when None."""
    if attribute is None:
        return np.ones(len(slices), dtype=np.bool_)
    first, end = item_offsets(tag_counts)[attribute : attribute + 2]
    return np.asarray(((slices.items >= first) & (slices.items < end)).any(axis=1))


def rank_order(slices: Slices, column: int) -> NDArray[np.int64]:
    """Lines (S,): worst mean in `column` first, then larger count, then as they come; each has a scored row."""
    mean = slices.total[:, column] / slices.scored[:, column]
    return np.lexsort((np.arange(len(mean)), -slices.count, mean))
