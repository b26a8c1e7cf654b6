"""One depth of the lattice, as the kernels see it: prefixes, what lies below each, and how much that may be."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from services.enumeration.compiled import compiled
from services.enumeration.encoding import Encoded


@dataclass(frozen=True)
class Level:
    """Slices of `depth` pairs: what lies below each of the P prefixes of depth - 2 pairs.

    rows, parent_rows: rows with the prefix, and with the prefix less its last pair; attributes_after, items_after:
    attributes past the last of the prefix, and about how many of their items are still frequent; parent_items: the
    same below the prefix less its last pair; cells: about how many pairs of items are of two attributes; parent_cells:
    the same below the prefix less its last pair. (P,) float64 each. must: positions [0] to [1] of which every slice
    holds one; 0 and 0 for any slice.
    """

    depth: int
    prefixes: NDArray[np.int32]
    rows: NDArray[np.float64]
    parent_rows: NDArray[np.float64]
    attributes_after: NDArray[np.float64]
    items_after: NDArray[np.float64]
    parent_items: NDArray[np.float64]
    cells: NDArray[np.float64]
    parent_cells: NDArray[np.float64]
    min_count: int
    must: NDArray[np.int64]

    @cached_property
    def most_slices(self) -> NDArray[np.float64]:
        """An upper bound of the slices below each prefix (P,)."""
        pairs_of_attributes = self.attributes_after * (self.attributes_after - 1) / 2
        return np.minimum(self.cells, pairs_of_attributes * np.floor(self.rows / self.min_count))

    def by_row(self, table: Encoded, p: int, cost: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """For each row of the joint count of prefix `p`, by position (I,): a bound of its slices, a share of `cost`."""
        last = table.attribute[self.prefixes[p, -1]] if self.depth > 2 else -1
        full = np.floor(np.minimum(table.item_count, self.rows[p]) / self.min_count)
        bounds = np.zeros(table.n_items)
        for a in range(last + 1, len(table.widths)):
            own = slice(table.firsts[a], table.firsts[a + 1])
            bounds[own] = np.minimum(full[own, None], table.widths[None, a + 1 :]).sum(axis=1)
        return bounds, bounds * (cost / max(bounds.sum(), 1.0))


@dataclass(frozen=True)
class Plan:
    """How a level is counted: `together` (U + 1,) where prefixes of one count begin; None for one by one.

    cost: (P,) nanoseconds for each prefix, about.
    """

    together: NDArray[np.int64] | None
    cost: NDArray[np.float64]


def runs(level: Level, last: NDArray[Any]) -> NDArray[np.int64]:
    """Where prefixes begin that differ only in their last pair and are alike in `last` (P,), and the end: (U + 1,)."""
    new = (level.prefixes[1:, :-1] != level.prefixes[:-1, :-1]).any(axis=1) | (last[1:] != last[:-1])
    return np.concatenate(([0], np.flatnonzero(new) + 1, [len(last)]))


def level_of(
    table: Encoded,
    depth: int,
    prefixes: NDArray[np.int32],
    rows: NDArray[np.int64],
    min_count: int,
    must: NDArray[np.int64],
) -> Level:
    """The level below `prefixes` (P, depth - 2), positions of frequent items, with `rows` (P,)."""
    widths = table.widths.astype(np.float64)
    items = np.append(np.cumsum(widths[::-1])[::-1], 0.0)
    pairs = np.append(np.cumsum((widths * items[1:])[::-1])[::-1], 0.0)
    n = rows.astype(np.float64)
    parents = np.full(n.shape, float(table.n_rows))
    told = np.empty((5, len(n)))
    _below(
        prefixes, n, table.attribute, table.item_count, items, pairs, widths.max(initial=0.0), min_count, parents, told
    )
    attributes, items_after, parent_items, cells, parent_cells = told
    return Level(
        depth, prefixes, n, parents, attributes, items_after, parent_items, cells, parent_cells, min_count, must
    )


@compiled
def _below(
    prefixes: Any, rows: Any, attribute: Any, item_count: Any, items: Any, pairs: Any, widest: float, min_count: int,
    parents: Any, told: Any,
) -> None:  # fmt: skip
    """What a Level tells of each prefix: parent_rows where the prefix less its last pair has one, and the five from
    attributes_after to parent_cells; items, pairs (A + 1,): of attribute a and those after it.
    """
    n_pairs = prefixes.shape[1]
    for p in range(len(prefixes)):
        after = attribute[prefixes[p, n_pairs - 1]] + 1 if n_pairs else 0
        if n_pairs > 1:
            parents[p] = item_count[prefixes[p, n_pairs - 2]]
        attributes = float(len(items) - 1 - after)
        pairs_of_attributes = attributes * (attributes - 1) / 2
        told[0, p] = attributes
        for k, n in ((1, rows[p]), (2, parents[p])):
            full = n / min_count  # an attribute has at most so many frequent tags
            told[k, p] = min(items[after], attributes * full)
            told[k + 2, p] = min(pairs[after], pairs_of_attributes * min(full * full, widest * widest))


@compiled
def ranges_of(attribute: Any, positions: Any, must: Any, held: bool, ranges: Any) -> None:
    """Columns [low, high) that each row of a joint count over `positions` meets, to ranges (width, 2).

    Those of later attributes; where the prefix and the row are of other attributes than `must`, only its items.
    """
    width = len(positions)
    low = np.searchsorted(positions, must[0])
    high = np.searchsorted(positions, must[1])
    after = width
    for i in range(width - 1, -1, -1):
        if i + 1 < width and attribute[positions[i + 1]] != attribute[positions[i]]:
            after = i + 1
        if held or low <= i < high:
            ranges[i, 0], ranges[i, 1] = after, width
        else:
            ranges[i, 0], ranges[i, 1] = max(after, low), high
