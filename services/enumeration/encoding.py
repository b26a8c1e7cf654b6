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
    position of each attribute; position: int32 of every item of the table, -1 where it has too few rows.
    """

    codes: Codes
    offsets: NDArray[np.int64]
    position: NDArray[np.int32]
    item_ids: NDArray[np.int32]
    attribute: NDArray[np.int32]
    item_count: NDArray[np.int64]
    firsts: NDArray[np.int64]
    columns: list[ScoreColumn]

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
    rows_of_item = _sums_by_item(codes, offsets, np.ones(len(codes), dtype=np.int64))
    item_ids = np.flatnonzero(rows_of_item >= min_count).astype(np.int32)
    position = np.full(len(rows_of_item), -1, dtype=np.int32)
    position[item_ids] = np.arange(len(item_ids))
    return Encoded(
        codes=codes,
        offsets=offsets,
        position=position,
        item_ids=item_ids,
        attribute=(np.searchsorted(offsets, item_ids, side="right") - 1).astype(np.int32),
        item_count=rows_of_item[item_ids],
        firsts=np.searchsorted(item_ids, offsets).astype(np.int64),
        columns=score_columns(scores),
    )


def item_sums(table: Encoded, values: NDArray[np.int64]) -> NDArray[np.int64]:
    """Sum of `values` (N,) over the rows of each frequent item (I,)."""
    return _sums_by_item(table.codes, table.offsets, values)[table.item_ids]


def _sums_by_item(codes: Codes, offsets: NDArray[np.int64], values: NDArray[np.int64]) -> NDArray[np.int64]:
    def part(begin: int, end: int) -> NDArray[np.int64]:
        lanes = np.zeros((4, int(offsets[-1])), dtype=np.int64)
        _add_to_items(codes[begin:end], offsets, values[begin:end], lanes)
        return np.asarray(lanes.sum(axis=0))

    return np.asarray(sum(in_parts(len(codes), part)))


@compiled
def _add_to_items(codes: Any, offsets: Any, values: Any, lanes: Any) -> None:
    """Add `values` (N,) to the items of each row; neighbours to different lanes, so that none waits for the last."""
    n_rows, n_attributes = codes.shape
    for row in range(n_rows):
        value = values[row]
        lane = lanes[row & 3]
        for a in range(n_attributes):
            item = offsets[a] + np.int64(codes[row, a])
            if item < offsets[a + 1]:
                lane[item] += value
