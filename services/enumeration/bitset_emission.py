"""From joint counts of bit sets to slices: eight cells at a time where a slice fits a word, else one by one."""

from __future__ import annotations

from typing import Any

import numpy as np

from services.enumeration.compiled import compiled, inlined
from services.enumeration.emission import frequent, u64, write
from services.enumeration.vector import HALF, LANES, put_frequent

ROW_BITS = (1 << HALF) - 1  # those of half a cell
ALL_LANES = (1 << LANES) - 1


@inlined
def plan_vectors(
    ranges: Any, ids: Any, low: int, high: int, width: int, n_pairs: int, vectors: Any, starts: Any, last: Any
) -> None:
    """The cells in `ranges` of rows low to high - 1 as `vectors`, see put_frequent, those of row i from starts[i] to
    starts[i + 1] - 1, and what the slices of each column have in `last`: slices of n_pairs more pairs than two.
    """
    n = 0
    for i in range(low, high):
        starts[i] = n
        begin, end = ranges[i, 0], ranges[i, 1]
        of_row = np.int64(ids[i]) << 16 * n_pairs
        lanes = ALL_LANES & -1 << begin % LANES
        for column in range(begin - begin % LANES, end, LANES):
            if column + LANES > end:
                lanes &= (1 << end - column) - 1
            vectors[n, 0], vectors[n, 1], vectors[n, 2], vectors[n, 3] = i * width + column, column, lanes, of_row
            lanes = ALL_LANES
            n += 1
    starts[high] = n
    for j in range(len(ids)):
        last[j] = np.int64(ids[j]) << 16 * (n_pairs + 1)


@compiled
def _emit_short(
    cells: Any, origin: int, field: int, each: int, vectors: Any, begin: int, end: int, last: Any, min_count: int,
    prefixes: Any, weights: Any, shift: int, at: int, items: Any, line: Any, count: Any, total: Any,
) -> Any:  # fmt: skip
    """`emit` by vectors, for lines of items as short as the tuple `line`; items, total: flat."""
    n_pairs = prefixes.shape[1]
    with_sums = len(weights) > 0
    weight = weights[0] if with_sums else 0.0
    for k in range(len(prefixes)):
        common = np.int64(-1) << 16 * (n_pairs + 1) << 16  # -1 for no item, 0 for two that are still to come
        for q in range(n_pairs):
            common |= np.int64(prefixes[k, q]) << 16 * q
        start = origin + k * each
        at = put_frequent(
            cells, start, start + field, vectors, begin, end, min_count, common, last, shift, with_sums, weight, at,
            items, line, count, total,
        )  # fmt: skip
    return at


@compiled
def _emit_long(
    joint: Any, origin: int, width: int, field: int, each: int, low: int, high: int, ranges: Any, ids: Any,
    min_count: int, prefixes: Any, targets: Any, terms: Any, weights: Any, shift: int, chosen: Any, cells: Any,
    whole: Any, at: int, items: Any, count: Any, scored: Any, total: Any,
) -> Any:  # fmt: skip
    """`emit` where there are several sums, or long lines of items."""
    row_bits = ROW_BITS if shift else -1
    for k in range(len(prefixes)):
        for i in range(low, high):
            a, b = ranges[i, 0], ranges[i, 1]
            start = origin + k * each + i * width
            for f in range(cells.shape[0]):
                for j in range(a, b):
                    if shift:
                        cells[f, j] = joint[u64(start + j)] >> (shift * f) & row_bits
                    else:
                        cells[f, j] = joint[u64(start + f * field + j)]
            n_chosen = frequent(cells[0], a, b, min_count, chosen)
            if n_chosen:
                at = write(
                    cells, chosen, n_chosen, ids, prefixes[k], ids[i], targets, terms, weights,
                    whole, at, items, count, scored, total,
                )  # fmt: skip
    return at


@inlined
def emit(
    joint: Any, origin: int, width: int, field: int, each: int, low: int, high: int, ranges: Any, ids: Any,
    min_count: int, prefixes: Any, targets: Any, terms: Any, weights: Any, short: int, shift: int, vectors: Any,
    starts: Any, last: Any, chosen: Any, cells: Any, whole: Any, at: int, items: Any, flat_items: Any, count: Any,
    scored: Any, total: Any, flat_total: Any,
) -> Any:  # fmt: skip
    """The frequent cells of rows low to high - 1 as slices from line `at`; the next free line.

    joint: as `count_pairs` leaves it, one for each of the `prefixes` (n, d - 2), of items, `each` further than the
    last; short: items a line where these are short, or 0; vectors, starts, last: then as planned of these rows.
    """
    if short == 2:
        return _emit_short(
            joint, origin, field, each, vectors, starts[low], starts[high], last, min_count, prefixes, weights, shift,
            at, flat_items, (0, 0), count, flat_total,
        )  # fmt: skip
    if short == 3:
        return _emit_short(
            joint, origin, field, each, vectors, starts[low], starts[high], last, min_count, prefixes, weights, shift,
            at, flat_items, (0, 0, 0), count, flat_total,
        )  # fmt: skip
    if short == 4:
        return _emit_short(
            joint, origin, field, each, vectors, starts[low], starts[high], last, min_count, prefixes, weights, shift,
            at, flat_items, (0, 0, 0, 0), count, flat_total,
        )  # fmt: skip
    return _emit_long(
        joint, origin, width, field, each, low, high, ranges, ids, min_count, prefixes, targets, terms, weights, shift,
        chosen, cells, whole, at, items, count, scored, total,
    )  # fmt: skip
