"""Joint counts by row lists: for each item of a prefix's rows, one pass over its rows and their later attributes.

Nothing is as large as the number of tags squared, so this is the kernel for wide tag sets, and where few rows are
left. Only tags that occur are touched, and only those are cleared again.
"""

from __future__ import annotations

from functools import cached_property, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from services.enumeration.compiled import compiled
from services.enumeration.emission import Lines, sums_of, write
from services.enumeration.encoding import Encoded
from services.enumeration.fields import assign_words, field_values, row_words
from services.enumeration.level import Level
from services.enumeration.work_units import Idle


@compiled
def _position_of(codes: Any, position: Any, offsets: Any, row: int, a: int) -> int:
    """Position of the item that `row` holds of attribute `a`; -1 for none, or one too rare."""
    item = offsets[a] + np.int64(codes[row, a])
    return position[item] if item < offsets[a + 1] else -1


@compiled
def _sort_by_item(
    codes: Any, position: Any, offsets: Any, extent: Any, a: int, tally: Any, seen: Any, order: Any
) -> int:
    """Indices into `extent` by their item of attribute `a`, to order; the items, ascending, to seen; how many items.

    tally: (I + 1,) zeros; on return tally[item] is where its run in `order` ends.
    """
    n_seen = 0
    for r in range(len(extent)):
        i = _position_of(codes, position, offsets, extent[r], a)
        if i >= 0:
            if tally[i] == 0:
                seen[n_seen] = i
                n_seen += 1
            tally[i] += 1
    seen[:n_seen].sort()
    start = 0
    for s in range(n_seen):
        rows = tally[seen[s]]
        tally[seen[s]] = start
        start += rows
    for r in range(len(extent)):
        i = _position_of(codes, position, offsets, extent[r], a)
        if i >= 0:
            order[tally[i]] = r
            tally[i] += 1
    return n_seen


@compiled
def _rows_with(
    codes: Any, position: Any, offsets: Any, firsts: Any, item: int, a: int, everything: Any, by_item: Any, ends: Any,
    tally: Any, seen: Any, out: Any,
) -> int:  # fmt: skip
    """Rows of `item` of attribute `a`; all rows are sorted once for all items of an attribute (ends[-1])."""
    if ends[-1] != a:
        n_seen = _sort_by_item(codes, position, offsets, everything, a, tally, seen, by_item)
        for s in range(n_seen):
            ends[seen[s]] = tally[seen[s]]
            tally[seen[s]] = 0
        ends[-1] = a
    begin = ends[item - 1] if item > firsts[a] else 0
    found: int = ends[item] - begin
    out[:found] = by_item[begin : ends[item]]
    return found


@compiled
def _count_later(
    codes: Any, position: Any, offsets: Any, extent: Any, run: Any, words: Any, n_words: int, first: int, last: int,
    counts: Any, touched: Any,
) -> int:  # fmt: skip
    """Add the words of the rows extent[run] to counts (W, I) of their items of attributes first to last - 1.

    The items that had none are listed in `touched`; how many.
    """
    n_touched = 0
    for r in run:
        row = extent[r]
        for a in range(first, last):
            j = _position_of(codes, position, offsets, row, a)
            if j >= 0:
                if counts[0, j] == 0:
                    touched[n_touched] = j
                    n_touched += 1
                for w in range(n_words):
                    counts[w, j] += words[w, r]
    return n_touched


@compiled
def _choose(counts: Any, touched: Any, n_touched: int, places: Any, min_count: int, chosen: Any, cells: Any) -> int:
    """The touched items with min_count rows, ascending, to chosen, and their fields to cells; clears counts."""
    n_chosen = 0
    mask = ~np.uint64(0) >> np.uint64(64 - places[0, 2])
    for t in range(n_touched):
        chosen[n_chosen] = touched[t]
        if np.int64(counts[0, touched[t]] & mask) >= min_count:
            n_chosen += 1
    chosen[:n_chosen].sort()
    for f in range(len(places)):
        word, shift = places[f, 0], np.uint64(places[f, 1])
        mask = ~np.uint64(0) >> np.uint64(64 - places[f, 2])
        for s in range(n_chosen):
            cells[f, chosen[s]] = np.int64(counts[word, chosen[s]] >> shift & mask)
    for t in range(n_touched):
        counts[:, touched[t]] = 0
    return n_chosen


@compiled
def fill(
    codes: Any, values: Any, most: Any, position: Any, offsets: Any, firsts: Any, attribute: Any, item_ids: Any,
    prefixes: Any, unit: Any, must: Any, min_count: int, targets: Any, terms: Any, weights: Any,
    everything: Any, by_item: Any, ends: Any, stack: Any, stack_rows: Any, words: Any, places: Any,
    tally: Any, seen: Any, order: Any, counts: Any, touched: Any, cells: Any, chosen: Any, whole: Any,
    items: Any, count: Any, scored: Any, total: Any,
) -> int:  # fmt: skip
    """As `bitset_kernel.fill_one_by_one`, by row lists. values, most: as of `field_values`.

    everything: (N,) all rows; by_item, ends: these sorted by the first attribute of the last prefix seen; stack:
    (d + 1, N) rows of each pair of the prefix, from 1; words: (F, N); the rest: room.
    """
    depth, n_attributes = prefixes.shape[1], codes.shape[1]
    current = np.full(depth, -1, dtype=np.int32)
    prefix_ids = np.empty(depth, dtype=np.int32)
    must_attribute = attribute[must[0]] if must[1] else -1
    at = 0
    for p in range(unit[0], unit[1]):
        held = must[1] == 0
        changed = depth
        for q in range(depth - 1, -1, -1):
            item = prefixes[p, q]
            prefix_ids[q] = item_ids[item]
            held |= must[0] <= item < must[1]
            if item != current[q]:
                changed = q
        last = attribute[prefixes[p, depth - 1]] if depth else -1
        if not held and last >= must_attribute:
            continue
        for q in range(changed, depth):
            item = prefixes[p, q]
            current[q] = item
            a = attribute[item]
            if q == 0:
                stack_rows[1] = _rows_with(
                    codes, position, offsets, firsts, item, a, everything, by_item, ends, tally, seen, stack[1]
                )
                continue
            found = 0
            for r in range(stack_rows[q]):
                row = stack[q, r]
                stack[q + 1, found] = row
                found += _position_of(codes, position, offsets, row, a) == item
            stack_rows[q + 1] = found
        extent = stack[depth, : stack_rows[depth]] if depth else everything
        n_words = assign_words(most, len(extent), places)
        row_words(values, places, extent, 0, len(extent), words)
        for a in range(last + 1, n_attributes):
            begin, end = a + 1, n_attributes
            if not held and a != must_attribute:
                begin, end = must_attribute, must_attribute + 1
                if a > must_attribute:
                    break
            n_seen = _sort_by_item(codes, position, offsets, extent, a, tally, seen, order)
            start = 0
            for s in range(n_seen):
                i = seen[s]
                run = order[start : tally[i]]
                start = tally[i]
                tally[i] = 0
                if len(run) < min_count or i < unit[2] or i >= unit[3]:
                    continue
                n_touched = _count_later(
                    codes, position, offsets, extent, run, words, n_words, begin, end, counts, touched
                )
                n_chosen = _choose(counts, touched, n_touched, places, min_count, chosen, cells)
                at = write(
                    cells, chosen, n_chosen, item_ids, prefix_ids, item_ids[i], targets, terms, weights,
                    whole, at, items, count, scored, total,
                )  # fmt: skip
    return at


class RowLists:
    """The codes as they are, and room for each thread."""

    name = "row lists"

    def __init__(self, table: Encoded, max_depth: int) -> None:
        self._table = table
        self._sums = sums_of(table.columns, table.any_unscored, as_planes=False)
        self._rooms = Idle(partial(_room, table, max(1, max_depth - 2), self._sums.n_fields))

    def can(self) -> bool:
        return True

    def cost(self, level: Level) -> NDArray[np.float64]:
        """Nanoseconds for each prefix, about."""
        n_words = 1 + sum(part.bits > 2 for column in self._table.columns for part in column.parts)
        pairs = level.attributes_after * (level.attributes_after - 1) / 2
        scan = level.parent_rows * 2 if level.depth > 3 else 0.0
        return scan + level.rows * (level.attributes_after * 4 + pairs * 2.0 * n_words) + level.cells + 300

    @cached_property
    def _encoded(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        return field_values(self._table)

    def together(self, level: Level) -> None:
        """Each prefix is counted by itself."""

    def prepare(self) -> None:
        _ = self._encoded

    def fill(self, level: Level, unit: NDArray[np.int64], lines: Lines) -> int:
        """The slices of one piece of work to `lines`; how many."""
        values, most = self._encoded
        table, sums = self._table, self._sums
        with self._rooms.one() as room:
            found: int = fill(
                table.codes, values, most, table.position, table.offsets, table.firsts, table.attribute, table.item_ids,
                level.prefixes, unit, level.must, level.min_count, sums.targets, sums.terms, sums.weights,
                *room, lines.items, lines.count, lines.scored, lines.total,
            )  # fmt: skip
        return found


def _room(table: Encoded, depth: int, n_fields: int) -> tuple[NDArray[Any], ...]:
    """Arrays that one thread works in, in the order in which `fill` takes them."""
    n_rows, n_items = table.n_rows, table.n_items
    return (
        np.arange(n_rows, dtype=np.int32),
        np.empty(n_rows, dtype=np.int32),
        np.full(n_items + 1, -1, dtype=np.int64),
        np.empty((depth + 1, n_rows + 1), dtype=np.int32),
        np.empty(depth + 1, dtype=np.int64),
        np.empty((n_fields, n_rows), dtype=np.uint64),
        np.empty((n_fields, 3), dtype=np.int64),
        np.zeros(n_items + 1, dtype=np.int64),
        np.empty(n_items + 1, dtype=np.int32),
        np.empty(n_rows, dtype=np.int32),
        np.zeros((n_fields, n_items), dtype=np.uint64),
        np.empty(n_items + 1, dtype=np.int32),
        np.empty((n_fields, n_items), dtype=np.int64),
        np.empty(n_items + 1, dtype=np.int64),
        np.empty(n_items, dtype=np.int64),
    )
