"""What is asked of the engine, and what one depth of the lattice asks of a kernel."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from services.enumeration.encoding import Encoded


@dataclass(frozen=True)
class Request:
    """min_count, max_depth as asked (max_depth at most the attributes); must: the positions [0] to [1] of which every
    slice holds one, 0 and 0 for any slice."""

    min_count: int
    max_depth: int
    must: NDArray[np.int64]


@dataclass(frozen=True)
class Level:
    """Slices of `depth` pairs: what lies below each of the P prefixes of depth - 2 pairs.

    rows, parent_rows: rows with the prefix, and with the prefix less its last pair; attributes_after, items_after:
    attributes past the last of the prefix, and about how many of their items are still frequent; cells: about how
    many pairs of those are of two attributes. (P,) float64 each.
    """

    depth: int
    prefixes: NDArray[np.int32]
    rows: NDArray[np.float64]
    parent_rows: NDArray[np.float64]
    attributes_after: NDArray[np.float64]
    items_after: NDArray[np.float64]
    cells: NDArray[np.float64]


def level_of(
    table: Encoded, depth: int, prefixes: NDArray[np.int32], rows: NDArray[np.int64], min_count: int
) -> Level:
    """The level below `prefixes` (P, depth - 2), positions of frequent items, with `rows` (P,)."""
    n_attributes = len(table.widths)
    last = table.attribute[prefixes[:, -1]] if depth > 2 else np.full(len(prefixes), -1)
    widths = table.widths.astype(np.float64)
    items_after = np.append(np.cumsum(widths[::-1])[::-1], 0.0)[last + 1]
    later = np.append(np.cumsum(widths[::-1])[::-1], 0.0)
    pairs = np.append(np.cumsum((widths * later[1:])[::-1])[::-1], 0.0)[last + 1]
    attributes = (n_attributes - 1 - last).astype(np.float64)
    n = rows.astype(np.float64)
    full = n / min_count  # a pair of attributes has at most so many frequent pairs of tags
    cells = np.minimum(pairs, attributes * (attributes - 1) / 2 * np.minimum(full**2, widths.max(initial=0.0) ** 2))
    parents = np.minimum(table.item_count[prefixes[:, -2]] if depth > 3 else table.n_rows, table.n_rows)
    return Level(
        depth,
        prefixes,
        n,
        np.broadcast_to(np.asarray(parents, dtype=np.float64), n.shape),
        attributes,
        np.minimum(items_after, attributes * full),
        cells,
    )


def most_slices(level: Level, min_count: int) -> NDArray[np.float64]:
    """An upper bound of the slices below each prefix (P,)."""
    pairs_of_attributes = level.attributes_after * (level.attributes_after - 1) / 2
    return np.minimum(level.cells, pairs_of_attributes * np.floor(level.rows / min_count))
