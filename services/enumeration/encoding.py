"""A tag table as the kernels read it: its frequent items by position, and its scores as whole numbers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from services.enumeration.compiled import compiled
from services.enumeration.fixed_point import ScoreColumn, score_columns
from services.enumeration.lattice import Codes, checked_scores, checked_tag_counts, item_offsets
from services.enumeration.work_units import in_parts


@dataclass(frozen=True)
class Encoded:
    """Items with at least min_count rows, by position: ascending by item, so by attribute.

    item_ids: (I,) int32; attribute: (I,) int32; item_count: (I,) int64 rows of each; firsts: (A + 1,) int64 first
    position of each attribute; position: int32 of every item of the table, -1 where it has too few rows;
    item_scored, item_sums: (I,) int64 of each score column, and of each of its parts.
    """

    codes: Codes
    offsets: NDArray[np.int64]
    position: NDArray[np.int32]
    item_ids: NDArray[np.int32]
    attribute: NDArray[np.int32]
    item_count: NDArray[np.int64]
    firsts: NDArray[np.int64]
    columns: list[ScoreColumn]
    item_scored: list[NDArray[np.int64]]
    item_sums: list[list[NDArray[np.int64]]]

    @property
    def n_rows(self) -> int:
        return len(self.codes)

    @property
    def n_items(self) -> int:
        return len(self.item_ids)

    @property
    def any_unscored(self) -> bool:
        return any(column.scored is not None for column in self.columns)

    @cached_property
    def widths(self) -> NDArray[np.int64]:
        """Frequent items of each attribute (A,)."""
        return np.diff(self.firsts)


def encode(codes: Codes, tag_counts: ArrayLike, scores: NDArray[np.float64] | None, min_count: int) -> Encoded:
    """`codes` (N, A), `tag_counts` (A,) and `scores` (N, K) or None for the kernels; InvalidInput where they clash."""
    counts = checked_tag_counts(codes, tag_counts)
    if scores is not None:
        scores = checked_scores(scores, len(codes))
    codes = cast(Codes, np.ascontiguousarray(codes))
    offsets = item_offsets(counts)
    columns = score_columns(scores)
    parts = [[part.values for part in column.parts] for column in columns]
    known = [column.scored.astype(np.int64) for column in columns if column.scored is not None]
    rows_of_item, *sums = _sums_by_item(codes, offsets, [*(values for column in parts for values in column), *known])
    item_ids = np.flatnonzero(rows_of_item >= min_count).astype(np.int32)
    position = np.full(len(rows_of_item), -1, dtype=np.int32)
    position[item_ids] = np.arange(len(item_ids))
    of_items = iter([values[item_ids] for values in sums])
    item_count = rows_of_item[item_ids]
    item_sums = [[next(of_items) for _ in column] for column in parts]
    return Encoded(
        codes=codes,
        offsets=offsets,
        position=position,
        item_ids=item_ids,
        attribute=(np.searchsorted(offsets, item_ids, side="right") - 1).astype(np.int32),
        item_count=item_count,
        firsts=np.searchsorted(item_ids, offsets).astype(np.int64),
        columns=columns,
        item_scored=[item_count if column.scored is None else next(of_items) for column in columns],
        item_sums=item_sums,
    )


def _sums_by_item(
    codes: Codes, offsets: NDArray[np.int64], values: list[NDArray[np.integer]]
) -> list[NDArray[np.int64]]:
    """Rows of each item, and for each of `values`, (N,) and not negative, their sum over these rows."""
    shift = len(codes).bit_length()  # rows and the first sum are added up at once where both fit a word
    at_once = bool(values) and int(values[0].max(initial=0)).bit_length() + 2 * shift < 64
    nothing = np.zeros(0, dtype=np.int64)

    def sums(of: NDArray[np.integer], above: int, each: int) -> NDArray[np.int64]:
        def part(begin: int, end: int) -> NDArray[np.int64]:
            lanes = np.zeros((4, int(offsets[-1])), dtype=np.int64)
            _add_to_items(codes[begin:end], offsets, of[begin:end], above, each, lanes)
            return np.asarray(lanes.sum(axis=0))

        return np.asarray(sum(in_parts(len(codes), part)))

    both = sums(values[0] if at_once else nothing, shift, 1)
    found = [both & ((1 << shift) - 1)] + [both >> shift] * at_once
    return found + [sums(of, 0, 0) for of in values[at_once:]]


@compiled
def _add_to_items(codes: Any, offsets: Any, values: Any, shift: int, each: int, lanes: Any) -> None:
    """Add (values << shift) + each, of values (N,) or none, to the items of each row; neighbours to different lanes, so
    that none waits for the last. An unsigned index is one that numba need not look at for being from the end.
    """
    n_rows, n_attributes = codes.shape
    for r in range(n_rows):
        row, lane = np.uint64(r), np.uint64(r & 3)
        value = (np.int64(values[row]) << shift) + each if len(values) else each
        for a in range(n_attributes):
            item = offsets[a] + np.int64(codes[row, np.uint64(a)])
            if item < offsets[a + 1]:
                lanes[lane, np.uint64(item)] += value
