"""Joint counts by dense tables: attributes in groups of one or two, one table for every two groups.

A row is touched once for two groups, not once for two attributes; the tables are then summed up over the attributes
that a slice does not hold. Count and sums of scores travel in one 64-bit word, or in a few where they need more bits.
"""

from __future__ import annotations

from functools import cached_property, partial
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from services.enumeration.compiled import compiled
from services.enumeration.emission import Lines, frequent, sums_of, write
from services.enumeration.encoding import Encoded
from services.enumeration.fields import assign_words, field_values, row_words, unpack
from services.enumeration.level import Level, ranges_of
from services.enumeration.work_units import Idle

GROUP_CELLS = 64  # tag combinations of two attributes in one group, so that a table of two groups fits the first cache
WIDEST = 256  # tags, with "none", of an attribute that makes a group alone
ROWS_AT_ONCE = 1 << 14  # rows whose codes are gathered, so that all tables find them in cache
MOST_BYTES = 32 << 20  # of one thread's joint count


@compiled
def encode_groups(codes: Any, position: Any, offsets: Any, firsts: Any, groups: Any, out: Any) -> None:
    """Group codes (G, N) uint16 of codes (N, A): groups as `_group` makes them."""
    n_rows = len(codes)
    for g in range(len(groups)):
        for row in range(n_rows):
            code = 0
            for q in range(2):
                a = groups[g, q]
                if a >= 0:
                    item = offsets[a] + np.int64(codes[row, a])
                    at = position[item] if item < offsets[a + 1] else -1
                    code = code * groups[g, 2 + q] + (at - firsts[a] if at >= 0 else groups[g, 2 + q] - 1)
            out[g, row] = code


@compiled
def _rows_with(codes: Any, divisor: int, size: int, tag: int, rows: Any, n_rows: int, out: Any) -> int:
    """Rows, of rows[:n_rows], or of the first n_rows where `rows` is empty, whose group code holds `tag`."""
    wanted = np.zeros(divisor * size * 64, dtype=np.uint8)
    for code in range(len(wanted)):
        wanted[code] = code // divisor % size == tag
    found = 0
    if len(rows) == 0:
        for row in range(n_rows):
            out[found] = row
            found += wanted[codes[row]]
    else:
        for r in range(n_rows):
            out[found] = rows[r]
            found += wanted[codes[rows[r]]]
    return found


@compiled
def _table(left: Any, right: Any, size: int, words: Any, table: Any) -> None:
    """Add words (n,) at left * size + right, (n,) group codes each, after clearing `table`."""
    for cell in range(len(table)):
        table[cell] = 0
    for r in range(len(words)):
        table[np.int64(left[r]) * size + np.int64(right[r])] += words[r]


@compiled
def _fold(table: Any, group: Any, columns: int, rows: Any) -> None:
    """Sum a table (cells of `group`, columns) over either attribute: rows (items of both, columns).

    "none", where an attribute has it, is summed over and has no row of its own.
    """
    first, second, n_first, n_second = group[2], group[3], group[4], group[5]
    for r in range(len(rows)):
        rows[r, :columns] = 0
    for t in range(first):
        for u in range(second):
            line = table[(t * second + u) * columns : (t * second + u + 1) * columns]
            if t < n_first:
                out = rows[t, :columns]
                for c in range(columns):
                    out[c] += line[c]
            if u < n_second:
                out = rows[n_first + u, :columns]
                for c in range(columns):
                    out[c] += line[c]


@compiled
def _spread(rows: Any, n_rows: int, group: Any, at: int, also_at: int, block: Any) -> None:
    """Sum rows (n, cells of `group`) over either attribute, onto columns at.. and also_at.. of `block`."""
    first, second, n_first, n_second = group[2], group[3], group[4], group[5]
    for r in range(n_rows):
        line, out = rows[r], block[r]
        for t in range(first):
            whole = np.uint64(0)
            for u in range(second):
                whole += line[t * second + u]
            if t < n_first:
                out[at + t] += whole
            for u in range(n_second):
                out[also_at + u] += line[t * second + u]


@compiled
def _add_group(
    local: Any, groups: Any, firsts: Any, g: int, n_groups: int, words: Any, table: Any, rows: Any, block: Any
) -> None:
    """Add to the rows of the joint count that are of group `g`, over the items of this and later groups."""
    first, second, n_first, n_second = groups[g, 2], groups[g, 3], groups[g, 4], groups[g, 5]
    if n_second > 0:  # within the group: its first attribute by its second
        own = table[: first * second]
        own[:] = 0
        for r in range(len(words)):
            own[local[g, r]] += words[r]
        for t in range(n_first):
            for u in range(n_second):
                block[t, firsts[groups[g, 1]] + u] += own[t * second + u]
    n_rows = n_first + n_second
    for h in range(g + 1, n_groups):
        columns = groups[h, 2] * groups[h, 3]
        _table(local[g, : len(words)], local[h, : len(words)], columns, words, table[: first * second * columns])
        _fold(table, groups[g], columns, rows[:n_rows])
        also = firsts[groups[h, 1]] if groups[h, 5] > 0 else 0
        _spread(rows, n_rows, groups[h], firsts[groups[h, 0]], also, block)


@compiled
def fill(
    codes: Any, values: Any, most: Any, groups: Any, group_of: Any, firsts: Any, attribute: Any, item_ids: Any,
    prefixes: Any, unit: Any, must: Any, min_count: int, targets: Any, terms: Any, weights: Any,
    stack: Any, stack_rows: Any, local: Any, local_groups: Any, words: Any, places: Any, table: Any, rows: Any,
    block: Any, cells: Any, ranges: Any, chosen: Any, whole: Any,
    items: Any, count: Any, scored: Any, total: Any,
) -> int:  # fmt: skip
    """As `bitset_kernel.fill`, by tables. codes: (G, N) group codes; values: (F, N) int64 with ones first.

    groups: (G, 6) as `_group` makes them; group_of: (A,); stack: (d, N) rows of each pair of the
    prefix; local: (G, rows at once) codes of the groups past the prefix; words: (F, rows at once); block: (F, I, I)
    the joint count; most: (F,) largest value of each field.
    """
    depth = prefixes.shape[1]
    n_all, width = codes.shape[1], len(item_ids)
    current = np.full(depth, -1, dtype=np.int32)
    prefix_ids = np.empty(depth, dtype=np.int32)
    no_rows = stack[0, :0]
    everything = np.arange(width).astype(np.int32)
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
        if last + 1 >= len(group_of) or (not held and depth and last >= attribute[must[0]]):
            continue
        for q in range(changed, depth):
            item = prefixes[p, q]
            current[q] = item
            a = attribute[item]
            g = group_of[a]
            divisor, size = (1, groups[g, 3]) if groups[g, 1] == a else (groups[g, 3], groups[g, 2])
            before, n_before = (no_rows, n_all) if q == 0 else (stack[q - 1], stack_rows[q - 1])
            stack_rows[q] = _rows_with(codes[g], divisor, size, item - firsts[a], before, n_before, stack[q])
        n = stack_rows[depth - 1] if depth else n_all
        extent = stack[depth - 1, :n] if depth else no_rows
        n_words = assign_words(most, n, places)
        ranges_of(attribute, everything, must, held, ranges)
        start = firsts[last + 1]
        for w in range(n_words):
            for i in range(max(start, unit[2]), min(width, unit[3])):
                block[w, i, start:] = 0
        n_groups = 0
        for begin in range(0, n, ROWS_AT_ONCE):
            m = min(ROWS_AT_ONCE, n - begin)
            some = extent[begin : begin + m]
            n_groups = _local_codes(codes, groups, group_of, last, some, begin, m, local, local_groups)
            row_words(values, places, some, begin, m, words)
            for g in range(n_groups):
                low, high = _rows_of(local_groups, firsts, g)
                if low < unit[3] and high > unit[2]:
                    for w in range(n_words):
                        _add_group(
                            local, local_groups, firsts, g, n_groups, words[w, :m], table, rows, block[w, low:high]
                        )
        for i in range(max(start, unit[2]), min(width, unit[3])):
            a, b = ranges[i, 0], ranges[i, 1]
            if a >= b:
                continue
            unpack(block[:, i], places, 0, a, b, cells)
            n_chosen = frequent(cells[0], a, b, min_count, chosen)
            if n_chosen:
                unpack(block[:, i], places, 1, a, b, cells)
                at = write(
                    cells, chosen, n_chosen, item_ids, prefix_ids, item_ids[i], targets, terms, weights,
                    whole, at, items, count, scored, total,
                )  # fmt: skip
    return at


@compiled
def _rows_of(groups: Any, firsts: Any, g: int) -> tuple[int, int]:
    """Positions [low, high) of the items of group `g`."""
    end = groups[g, 1] if groups[g, 1] >= 0 else groups[g, 0]
    return firsts[groups[g, 0]], firsts[end + 1]


@compiled
def _local_codes(
    codes: Any, groups: Any, group_of: Any, last: int, extent: Any, begin: int, n: int, local: Any, local_groups: Any
) -> int:
    """Codes of the groups past attribute `last` over the rows `extent`, n from `begin` where empty; how many groups."""
    start = group_of[last + 1]
    split = groups[start, 0] != last + 1
    for g in range(start, len(groups)):
        to = g - start
        local_groups[to] = groups[g]
        modulus = 1 << 16
        if split and g == start:  # only the second of its two attributes is left
            local_groups[to, 0], local_groups[to, 1] = groups[g, 1], -1
            local_groups[to, 2], local_groups[to, 3] = groups[g, 3], 1
            local_groups[to, 4], local_groups[to, 5] = groups[g, 5], 0
            modulus = groups[g, 3]
        source, out = codes[g], local[to]
        if len(extent) == 0:
            for r in range(n):
                out[r] = source[begin + r] % modulus
        elif modulus == 1 << 16:
            for r in range(n):
                out[r] = source[extent[r]]
        else:
            for r in range(n):
                out[r] = source[extent[r]] % modulus
    n_groups: int = len(groups) - start
    return n_groups


def _group(table: Encoded) -> NDArray[np.int64]:
    """Attributes in groups, in order: (G, 6) two attributes, their sizes, and how many items they have.

    The second attribute is -1 (size 1, no items) where there is one only. A size counts the items and, where some
    row has none of them, "none".
    """
    groups: list[list[int]] = []
    for a, width in enumerate(table.widths.tolist()):
        held = int(table.item_count[table.firsts[a] : table.firsts[a + 1]].sum())
        size = width + (held < table.n_rows)
        if groups and groups[-1][1] < 0 and groups[-1][2] * size <= GROUP_CELLS:
            groups[-1][1], groups[-1][3], groups[-1][5] = a, size, width
        else:
            groups.append([a, -1, size, 1, width, 0])
    return np.array(groups, dtype=np.int64).reshape(-1, 6)


class JointTables:
    """The table's group codes, and room for tables for each thread."""

    name = "joint tables"

    def __init__(self, table: Encoded, max_depth: int) -> None:
        self._table = table
        self._groups = _group(table)
        self._group_of = np.zeros(len(table.widths), dtype=np.int64)
        for g, (a, b, *_) in enumerate(self._groups.tolist()):
            self._group_of[[a, b] if b >= 0 else [a]] = g
        self._sums = sums_of(table.columns, table.any_unscored, as_planes=False)
        self._lock = Lock()
        sizes = self._groups[:, 2] * self._groups[:, 3]
        self._widest = int(sizes.max(initial=1))
        self._rooms = Idle(partial(_room, table, max(1, max_depth - 2), self._groups, self._sums.n_fields))

    def can(self) -> bool:
        return self._widest <= WIDEST and self._sums.n_fields * self._table.n_items**2 * 8 <= MOST_BYTES

    def cost(self, level: Level) -> NDArray[np.float64]:
        """Nanoseconds for each prefix, about."""
        sizes = (self._groups[:, 2] * self._groups[:, 3]).astype(np.float64)
        groups = level.attributes_after * len(self._groups) / max(1, len(self._group_of))
        pairs = groups * groups / 2
        n_words = 1 + sum(part.bits > 2 for column in self._table.columns for part in column.parts)
        tables = pairs * (level.rows * 1.2 + float(sizes.mean()) ** 2 * 1.0 + 30) * n_words
        scan = level.parent_rows * 0.7 if level.depth > 2 else 0.0
        return scan + level.rows * groups + tables + level.cells * 2.0 + 300

    @cached_property
    def _encoded(self) -> tuple[NDArray[np.uint16], NDArray[np.int64], NDArray[np.int64]]:
        table = self._table
        codes = np.empty((len(self._groups), table.n_rows), dtype=np.uint16)
        encode_groups(table.codes, table.position, table.offsets, table.firsts, self._groups, codes)
        values = field_values(table)
        return codes, values, values.max(axis=1, initial=1)

    def fill(self, level: Level, unit: NDArray[np.int64], lines: Lines) -> int:
        """The slices of one piece of work to `lines`; how many."""
        with self._lock:
            codes, values, most = self._encoded
        table, sums = self._table, self._sums
        with self._rooms.one() as room:
            found: int = fill(
                codes, values, most, self._groups, self._group_of, table.firsts, table.attribute, table.item_ids,
                level.prefixes, unit, level.must, level.min_count, sums.targets, sums.terms, sums.weights,
                *room, lines.items, lines.count, lines.scored, lines.total,
            )  # fmt: skip
        return found


def _room(table: Encoded, depth: int, groups: NDArray[np.int64], n_fields: int) -> tuple[NDArray[Any], ...]:
    """Arrays that one thread works in, in the order in which `fill` takes them."""
    n_rows, n_items, n_groups = table.n_rows, max(1, table.n_items), len(groups)
    widest = int((groups[:, 2] * groups[:, 3]).max(initial=1))
    return (
        np.empty((depth, n_rows + 1), dtype=np.int32),
        np.empty(depth, dtype=np.int64),
        np.empty((n_groups, ROWS_AT_ONCE), dtype=np.uint16),
        np.empty((n_groups, 6), dtype=np.int64),
        np.empty((n_fields, ROWS_AT_ONCE), dtype=np.uint64),
        np.empty((n_fields, 3), dtype=np.int64),
        np.empty(widest**2, dtype=np.uint64),
        np.empty((int((groups[:, 2] + groups[:, 3]).max(initial=2)), widest), dtype=np.uint64),
        np.empty((n_fields, n_items, n_items), dtype=np.uint64),
        np.empty((n_fields, n_items), dtype=np.int64),
        np.empty((n_items, 2), dtype=np.int64),
        np.empty(n_items + 1, dtype=np.int64),
        np.empty(n_items, dtype=np.int64),
    )
