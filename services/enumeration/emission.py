"""From the counts and sums of one row of a joint count to slices in columns.

A kernel fills `cells` (fields, width): field 0 counts rows, the others hold what the score columns need. What a
field adds to which result is said by `terms`, so that every kernel writes the same numbers bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from services.enumeration.compiled import compiled
from services.enumeration.fixed_point import ScoreColumn

SCORED, TOTAL = 0, 1


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

    def __init__(self, capacity: int, max_depth: int, n_columns: int, any_unscored: bool) -> None:
        self.items = np.empty((capacity, max_depth), dtype=np.int32)
        self.count = np.empty(capacity, dtype=np.int64)
        self.scored = np.empty((capacity if any_unscored else 1, n_columns), dtype=np.int64)
        self.total = np.empty((capacity, n_columns))


@compiled
def frequent(counts: Any, low: int, high: int, min_count: int, chosen: Any) -> int:
    """Write the positions in [low, high) with at least `min_count` to `chosen`; how many there are."""
    found = 0
    for j in range(low, high):
        chosen[found] = j
        found += counts[j] >= min_count
    return found


@compiled
def write(
    cells: Any,
    chosen: Any,
    n_chosen: int,
    ids: Any,
    prefix: Any,
    last: int,
    targets: Any,
    terms: Any,
    weights: Any,
    whole: Any,
    at: int,
    items: Any,
    count: Any,
    scored: Any,
    total: Any,
) -> int:
    """Write the slices (prefix, last, ids[j]) for j in chosen[:n_chosen] from line `at`; the next free line.

    cells: (fields, width) int64; ids: (width,) item of each position; prefix: (d - 2,) items; last: an item;
    whole: (width,) int64 to work in.
    """
    depth = len(prefix) + 2
    for s in range(n_chosen):
        line = items[at + s]
        for q in range(depth - 2):
            line[q] = prefix[q]
        line[depth - 2] = last
        line[depth - 1] = ids[chosen[s]]
        for q in range(depth, len(line)):
            line[q] = -1
        count[at + s] = cells[0, chosen[s]]
    if total.shape[1] > 0:
        total[at : at + n_chosen] = 0.0
    for t in range(len(weights)):
        for s in range(n_chosen):
            whole[s] = 0
        for x in range(targets[t, 2], targets[t + 1, 2]):
            field = cells[terms[x, 0]]
            shift = terms[x, 1]
            for s in range(n_chosen):
                whole[s] += field[chosen[s]] << shift
        k = targets[t, 1]
        if targets[t, 0] == SCORED:
            for s in range(n_chosen):
                scored[at + s, k] = whole[s]
        else:
            for s in range(n_chosen):
                total[at + s, k] += whole[s] * weights[t]
    return at + n_chosen
