"""From the counts and sums of one row of a joint count to slices in columns.

A kernel fills `cells` (fields, width): field 0 counts rows, the others hold what the score columns need. What a
field adds to which result is said by `terms`, so that every kernel writes the same numbers bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from services.enumeration.compiled import compiled
from services.enumeration.fixed_point import ScoreColumn
from services.enumeration.lattice import item_type
from services.enumeration.vector import LANES, SHORT

SCORED, TOTAL = 0, 1
u64 = np.uint64
Empty = Callable[[tuple[int, ...], DTypeLike], NDArray[Any]]  # makes an array of a shape and a type


@dataclass(frozen=True)
class Sums:
    """How fields become scored counts and sums.

    targets: (T, 3) int64: SCORED or TOTAL, score column, first term; terms: (X, 2) int64: field, left shift.
    weights: (T,) float64: what the integer sum of the terms is multiplied with.
    """

    n_fields: int
    targets: NDArray[np.int64]
    terms: NDArray[np.int64]
    weights: NDArray[np.float64]

    @property
    def plain(self) -> bool:
        """Whether there is nothing to add up but field 1, as for one column of 0 and 1, or not even that."""
        if len(self.weights) == 0:
            return True
        told = self.targets[:-1].tolist(), self.terms.tolist()
        return told == ([[TOTAL, 0, 0]], [[1, 0]])


def sums_of(columns: list[ScoreColumn], any_unscored: bool, *, as_planes: bool) -> Sums:
    """The fields of `columns`: one a bit plane, or one a part; `any_unscored` when scored counts are written."""
    targets: list[tuple[int, int, int]] = []
    terms: list[tuple[int, int]] = []
    weights: list[float] = []
    field = 1
    for k, column in enumerate(columns):
        if any_unscored:
            targets.append((SCORED, k, len(terms)))
            weights.append(1.0)
            terms.append((0 if column.scored is None else field, 0))
            field += column.scored is not None
        for part in column.parts:
            targets.append((TOTAL, k, len(terms)))
            weights.append(part.weight)
            for shift in part.planes if as_planes else (0,):
                terms.append((field, shift))
                field += 1
    targets.append((-1, -1, len(terms)))
    return Sums(
        field,
        np.array(targets, dtype=np.int64),
        np.array(terms, dtype=np.int64).reshape(-1, 2),
        np.array(weights),
    )


class Lines:
    """Room for the slices of one work unit, used again for the next."""

    def __init__(
        self,
        capacity: int,
        max_depth: int,
        n_items: int,
        n_columns: int,
        any_unscored: bool,
        empty: Empty = np.empty,
    ) -> None:
        lines = capacity + LANES  # so many are written at a time, those that are not frequent behind the others
        self.items = empty((lines, max_depth), item_type(n_items))
        self.count = empty((lines,), np.int32)
        self.scored = empty((lines if any_unscored else 1, n_columns), np.int32)
        self.total = empty((lines, n_columns), np.float64)

    @property
    def nbytes(self) -> int:
        return self.items.nbytes + self.count.nbytes + self.scored.nbytes + self.total.nbytes

    @property
    def short(self) -> bool:
        """Whether the items of a slice fit a word."""
        return self.items.dtype == np.int16 and self.items.shape[1] <= SHORT


@compiled
def frequent(counts: Any, low: int, high: int, min_count: int, chosen: Any) -> int:
    """Write the positions in [low, high) with at least `min_count` to `chosen`; how many there are."""
    found = 0
    for j in range(low, high):
        chosen[u64(found)] = j
        found += counts[u64(j)] >= min_count
    return found


@compiled
def _put_items(items: Any, at: int, prefix: Any, last: int, item: int) -> None:
    """Line `at` of items: (prefix, last, item), then -1."""
    depth = len(prefix) + 2
    for q in range(depth - 2):
        items[at, q] = prefix[q]
    items[at, depth - 2] = last
    items[at, depth - 1] = item
    for q in range(depth, items.shape[1]):
        items[at, q] = -1


@compiled
def write(
    cells: Any, chosen: Any, n_chosen: int, ids: Any, prefix: Any, last: int, targets: Any, terms: Any, weights: Any,
    whole: Any, at: int, items: Any, count: Any, scored: Any, total: Any,
) -> int:  # fmt: skip
    """Write the slices (prefix, last, ids[j]) for j in chosen[:n_chosen] from line `at`; the next free line.

    cells: (fields, width) int64; ids: (width,) item of each position; prefix: (d - 2,) items; last: an item;
    whole: (width,) int64 to work in. An unsigned index is one that numba need not look at for being from the end.
    """
    for s in range(n_chosen):
        j = u64(chosen[u64(s)])
        _put_items(items, at + s, prefix, last, ids[j])
        count[u64(at + s)] = cells[u64(0), j]
    for t in range(len(weights)):
        for s in range(n_chosen):
            whole[u64(s)] = 0
        for x in range(targets[t, 2], targets[t + 1, 2]):
            field, shift = u64(terms[x, 0]), terms[x, 1]
            for s in range(n_chosen):
                whole[u64(s)] += cells[field, u64(chosen[u64(s)])] << shift
        k, weight = u64(targets[t, 1]), weights[t]
        if targets[t, 0] == SCORED:
            for s in range(n_chosen):
                scored[u64(at + s), k] = whole[u64(s)]
        elif t and targets[t - 1, 0] == TOTAL and targets[t - 1, 1] == targets[t, 1]:  # one more part of the column
            for s in range(n_chosen):
                total[u64(at + s), k] += whole[u64(s)] * weight
        else:
            for s in range(n_chosen):
                total[u64(at + s), k] = whole[u64(s)] * weight
    return at + n_chosen
