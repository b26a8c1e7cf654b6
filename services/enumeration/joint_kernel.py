"""Joint counts by dense tables: attributes in groups, one table for every three groups.

A row is touched once for three groups, not once for three attributes; a table is then summed up over the attributes
that a slice does not hold. Count and sums of scores travel in one 64-bit word, or in a few where they need more bits.
The first of the three groups holds the last pair of a prefix, so that all prefixes of the group, which differ in that
pair alone, are counted at once; where that does not pay, the rows of each prefix are counted by two groups.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from services.enumeration.compiled import compiled
from services.enumeration.emission import Lines, frequent, sums_of, write
from services.enumeration.encoding import Encoded
from services.enumeration.fields import assign_words, field_values, row_words, unpack
from services.enumeration.level import Level, Plan, ranges_of, runs
from services.enumeration.work_units import Idle, in_parts

GROUP_CELLS = (4, 6, 8, 12, 16, 24, 32, 48, 64)  # tag combinations that attributes of one group may have: one is chosen
WIDEST = 256  # tags, with "none", of an attribute that makes a group alone
ROWS_AT_ONCE = 1 << 15  # rows whose codes stay in cache while they are added to some tables
TABLES_AT_ONCE = 1 << 16  # cells of these tables
MOST_BYTES = 32 << 20  # of one thread's joint counts
MOST_CELLS = 1 << 20  # of a table of three groups
MOST_SLICES = 1 << 18  # below prefixes that are counted at once


@compiled
def encode_groups(
    codes: Any, position: Any, offsets: Any, firsts: Any, bounds: Any, sizes: Any, begin: int, end: int, out: Any
) -> None:
    """Group codes out (G + 1, N) uint8 of rows begin to end - 1 of codes (N, A): groups as in `Groups`, then zeros."""
    for block in range(begin, end, 1 << 12):
        stop = min(block + (1 << 12), end)
        for g in range(len(bounds) - 1):
            line = out[g]
            line[block:stop] = 0
            for a in range(bounds[g], bounds[g + 1]):
                first, after, none, size = offsets[a], offsets[a + 1], sizes[a] - 1, sizes[a]
                for row in range(block, stop):
                    item = first + np.int64(codes[row, a])
                    at = position[item] if item < after else -1
                    line[row] = line[row] * size + (at - firsts[a] if at >= 0 else none)
        out[len(bounds) - 1, block:stop] = 0


@compiled
def _rows_with(codes: Any, divisor: int, size: int, tag: int, rows: Any, n_rows: int, out: Any) -> int:
    """Rows, of rows[:n_rows], or of the first n_rows where `rows` is empty, whose group code holds `tag`."""
    wanted = np.zeros(256, dtype=np.uint8)
    for code in range(256):
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
def _add_to_table(pair: Any, third: Any, columns: int, words: Any, table: Any) -> None:
    """Add words (n,) at pair * columns + third: (n,) codes of two groups, and of a third."""
    step = np.uint64(columns)
    for r in range(len(words)):
        table[np.uint64(pair[r]) * step + np.uint64(third[r])] += words[r]


@compiled
def _add_to_two(pair: Any, third: Any, also: Any, columns: int, words: Any, table: Any, also_table: Any) -> None:
    """As `_add_to_table`, for two third groups at once: pair and words are read once."""
    step = np.uint64(columns)
    for r in range(len(words)):
        base, word = np.uint64(pair[r]) * step, words[r]
        table[base + np.uint64(third[r])] += word
        also_table[base + np.uint64(also[r])] += word


@compiled
def _fold(table: Any, cells: int, columns: int, a: int, end: int, tags: Any, firsts: Any, rows: Any) -> None:
    """Sum a table (cells, columns) over all but one of the group's attributes a to end - 1: rows (items, columns).

    "none", where an attribute has it, is summed over and has no row of its own. Of no attributes: one row of all.
    """
    if a == end:
        rows[:columns] = table[:columns]
        return
    rows[: (firsts[end] - firsts[a]) * columns] = 0
    for b in range(a, end):
        for code in range(cells):
            tag = tags[b, code]
            if tag >= 0:
                line = table[code * columns : (code + 1) * columns]
                out = rows[(firsts[b] - firsts[a] + tag) * columns :]
                for c in range(columns):
                    out[c] += line[c]


@compiled
def _sum_up(line: Any, local: Any, start: int, stop: int, sizes: Any, divisors: Any, widths: Any, out: Any) -> None:
    """As `_fold` for a column of each of the groups start to stop - 1, one after the other in line, to out (items,)."""
    at = begin = 0
    for h in range(start, stop):
        end = begin + local[h, 2]
        for b in range(local[h, 0], local[h, 1]):
            divisor = divisors[b]
            step = sizes[b] * divisor
            for tag in range(widths[b]):
                whole = np.uint64(0)
                high = begin + tag * divisor
                while high < end:  # range() would divide
                    for code in range(high, high + divisor):
                        whole += line[code]
                    high += step
                out[at] = whole
                at += 1
        begin = end


@compiled
def _add_within(
    table: Any, local: Any, g: int, sizes: Any, divisors: Any, widths: Any, tags: Any, firsts: Any, rows: Any,
    block: Any,
) -> None:  # fmt: skip
    """The joint counts of two or more attributes of one group, from its table with the first group (cells, cells).

    block (items of the first group, I, I): those of group `g` by itself, of the first with two of `g`, and of two of
    the first with `g`.
    """
    lead, end, cells = local[0, 0], local[0, 1], local[0, 2]
    a, b_end, columns = local[g, 0], local[g, 1], local[g, 2]
    base = firsts[lead]
    n_first = max(1, firsts[end] - base)
    if b_end - a > 1:  # one of the first group, two of this
        for i in range(n_first):
            block[i, firsts[a] : firsts[b_end], firsts[a] : firsts[b_end]] = 0
        _fold(table, cells, columns, lead, end, tags, firsts, rows)
        for code in range(columns):
            for b in range(a, b_end):
                tag = tags[b, code]
                for c in range(b + 1, b_end):
                    also = tags[c, code]
                    if tag >= 0 and also >= 0:
                        for i in range(n_first):
                            block[i, firsts[b] + tag, firsts[c] + also] += rows[i * columns + code]
    if end - lead < 2:
        return
    own = rows[: firsts[b_end] - firsts[a]]
    for b in range(lead, end):  # two of the first group, one of this; and three of the first
        for i in range(firsts[b] - base, firsts[b + 1] - base):
            block[i, firsts[b + 1] : firsts[end], firsts[a] : firsts[b_end]] = 0
            if g == 1:
                block[i, firsts[b + 1] : firsts[end], firsts[lead] : firsts[end]] = 0
    for code in range(cells):
        line = table[code * columns : (code + 1) * columns]
        _sum_up(line, local, g, g + 1, sizes, divisors, widths, own)
        whole = line.sum()
        for b in range(lead, end):
            tag = tags[b, code]
            for c in range(b + 1, end):
                also = tags[c, code]
                if tag >= 0 and also >= 0:
                    out = block[firsts[b] - base + tag, firsts[c] + also]
                    for j in range(len(own)):
                        out[firsts[a] + j] += own[j]
                    for d in range(c + 1, end if g == 1 else 0):
                        third = tags[d, code]
                        if third >= 0:
                            out[firsts[d] + third] += whole


@compiled
def _count(
    codes: Any, local: Any, n_groups: int, low: int, high: int, words: Any, sizes: Any, divisors: Any, widths: Any,
    tags: Any, firsts: Any, pair: Any, tables: Any, rows: Any, more_rows: Any, block: Any,
) -> None:  # fmt: skip
    """Joint counts block (items of the first group, I, I) of one word a row (n,), of three groups each.

    local: (n_groups + 2, 4) groups as `_local_groups` makes them, from the first; low, high: of the second of three
    items only these positions are asked for; pair: (rows at once,) uint16; tables: cells of some tables.
    """
    n = len(words)
    lead, end, first = local[0, 0], local[0, 1], local[0, 2]
    n_first = max(1, firsts[end] - firsts[lead])
    for g in range(1, max(2, n_groups)):
        a, a_end, second = local[g, 0], local[g, 1], local[g, 2]
        if end == lead and (firsts[a] >= high or firsts[a_end] <= low):
            continue
        n_second = firsts[a_end] - firsts[a]
        last = max(g + 2, n_groups)
        start = g + 1
        while start < last:
            # Tables with the same first two groups lie side by side, so that they are summed up in long lines.
            stop, columns = start, 0
            while stop < last and (stop == start or first * second * (columns + local[stop, 2]) <= len(tables)):
                columns += local[stop, 2]
                stop += 1
            used = first * second * columns
            tables[:used] = 0
            for begin in range(0, n, ROWS_AT_ONCE):
                m = min(ROWS_AT_ONCE, n - begin)
                left, right = codes[local[0, 3]], codes[local[g, 3]]
                for r in range(m):
                    pair[r] = np.uint16(left[begin + r]) * np.uint16(second) + np.uint16(right[begin + r])
                at, h, rows_here = 0, start, words[begin : begin + m]
                while h < stop:
                    third, table = codes[local[h, 3], begin : begin + m], tables[at:used]
                    at += local[h, 2]
                    if h + 1 == stop:
                        _add_to_table(pair[:m], third, columns, rows_here, table)
                    else:
                        also = codes[local[h + 1, 3], begin : begin + m]
                        _add_to_two(pair[:m], third, also, columns, rows_here, table, tables[at:used])
                        at += local[h + 1, 2]
                    h += 2
            _fold(tables, first, second * columns, lead, end, tags, firsts, rows)
            for i in range(n_first):
                line = rows[i * second * columns : (i + 1) * second * columns]
                _fold(line, second, columns, a, a_end, tags, firsts, more_rows)
                for j in range(n_second):
                    _sum_up(
                        more_rows[j * columns : (j + 1) * columns], local, start, stop, sizes, divisors, widths,
                        block[i, firsts[a] + j, firsts[local[start, 0]] :],
                    )  # fmt: skip
            if start == g + 1:
                own = more_rows[: first * second]
                for code in range(first * second):
                    own[code] = tables[code * columns : code * columns + local[start, 2]].sum()
                _add_within(own, local, g, sizes, divisors, widths, tags, firsts, rows, block)
            start = stop


@compiled
def _local_groups(bounds: Any, cells: Any, divisors: Any, group_of: Any, last: int, from_group: int, local: Any) -> int:
    """Groups from `from_group` without attributes up to `last`, to local (G + 3, 4): first attribute, the one after
    the last, codes, and the line of their codes; two empty groups behind. How many, without these."""
    n = 0
    n_groups = len(bounds) - 1
    for g in range(from_group, n_groups):
        local[n, 0], local[n, 1], local[n, 2], local[n, 3] = bounds[g], bounds[g + 1], cells[g], g
        if bounds[g] <= last:
            local[n, 0], local[n, 2] = last + 1, divisors[last]
        n += 1
    for empty in range(n, n + 2):
        local[empty, 0], local[empty, 1], local[empty, 2], local[empty, 3] = len(group_of), len(group_of), 1, n_groups
    return n


@compiled
def fill(
    tags: Any, codes: Any, values: Any, most: Any, all_words: Any, all_places: Any, bounds: Any, group_cells: Any,
    group_of: Any, sizes: Any, divisors: Any, widths: Any, firsts: Any, attribute: Any, item_ids: Any,
    prefixes: Any, unit: Any, by_three: int, must: Any, min_count: int, targets: Any, terms: Any, weights: Any,
    stack: Any, stack_rows: Any, some_codes: Any, local: Any, some_words: Any, some_places: Any, pair: Any,
    tables: Any, rows: Any, more_rows: Any, block: Any, cells: Any, ranges: Any, chosen: Any, whole: Any,
    items: Any, count: Any, scored: Any, total: Any,
) -> int:  # fmt: skip
    """As `bitset_kernel.fill_one_by_one`, by tables.

    tags: (A, 256) what each group code says of an attribute, -1 for none; codes: (G + 1, N) uint8 group codes; values,
    most: as of `field_values`; all_words, all_places: words of all rows, where they hold each field; bounds … widths:
    as in `Groups`; by_three: 1 to count the prefixes that differ in the last pair, of one group, at once; stack: (d, N)
    rows of each pair of the prefix; some_*: the same for the rows of a prefix; block: (F, items of a group, I, I) joint
    counts.
    """
    depth = prefixes.shape[1]
    n_base = depth - by_three  # pairs whose rows are looked up
    n_all, width, n_groups = codes.shape[1], len(item_ids), len(bounds) - 1
    current = np.full(depth, -1, dtype=np.int32)
    prefix_ids = np.empty(depth, dtype=np.int32)
    no_rows = stack[0, :0]
    everything = np.arange(width).astype(np.int32)
    n, n_words, n_gathered, counted = n_all, len(all_words), -1, -1
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
        before = attribute[prefixes[p, n_base - 1]] if n_base else -1
        for q in range(min(changed, n_base), n_base):
            item = prefixes[p, q]
            a = attribute[item]
            source, n_source = (no_rows, n_all) if q == 0 else (stack[q - 1], stack_rows[q - 1])
            stack_rows[q] = _rows_with(
                codes[group_of[a]], divisors[a], sizes[a], item - firsts[a], source, n_source, stack[q]
            )
        for q in range(changed, depth):
            current[q] = prefixes[p, q]
        if changed < n_base:
            n_gathered, counted = -1, -1
        if n_base and n_gathered < 0:
            n_gathered = stack_rows[n_base - 1]
            n = n_gathered
            extent = stack[n_base - 1, :n]
            start = group_of[before + 1]
            modulus = divisors[before] if bounds[start] <= before else 256
            for g in range(start, n_groups):
                source_codes, out_codes = codes[g], some_codes[g]
                if g > start or modulus == 256:
                    for r in range(n):
                        out_codes[r] = source_codes[extent[r]]
                else:
                    for r in range(n):
                        out_codes[r] = source_codes[extent[r]] % modulus
            some_codes[n_groups, :n] = 0
            n_words = assign_words(most, n, some_places)
            row_words(values, some_places, extent, 0, n, some_words)
        here = codes if n_base == 0 else some_codes
        words = all_words if n_base == 0 else some_words
        places = all_places if n_base == 0 else some_places
        low, high = max(firsts[last + 1], unit[2]), min(width, unit[3])
        if by_three:
            if counted != group_of[last]:
                counted = group_of[last]
                found = _local_groups(bounds, group_cells, divisors, group_of, before, counted, local)
                for w in range(n_words):
                    _count(
                        here, local, found, 0, width, words[w, :n], sizes, divisors, widths, tags, firsts, pair,
                        tables, rows, more_rows, block[w],
                    )  # fmt: skip
            line = prefixes[p, depth - 1] - firsts[local[0, 0]]
        else:
            local[0, 0], local[0, 1], local[0, 2], local[0, 3] = 0, 0, 1, n_groups
            found = _local_groups(bounds, group_cells, divisors, group_of, last, group_of[last + 1], local[1:])
            for w in range(n_words):
                _count(
                    here, local, found + 1, low, high, words[w, :n], sizes, divisors, widths, tags, firsts, pair,
                    tables, rows, more_rows, block[w],
                )  # fmt: skip
            line = 0
        ranges_of(attribute, everything, must, held, ranges)
        for i in range(low, high):
            a, b = ranges[i, 0], ranges[i, 1]
            if a >= b:
                continue
            unpack(block[:, line, i], places, 0, a, b, cells)
            n_chosen = frequent(cells[0], a, b, min_count, chosen)
            if n_chosen:
                unpack(block[:, line, i], places, 1, a, b, cells)
                at = write(
                    cells, chosen, n_chosen, item_ids, prefix_ids, item_ids[i], targets, terms, weights,
                    whole, at, items, count, scored, total,
                )  # fmt: skip
    return at


@dataclass(frozen=True)
class Groups:
    """Attributes in groups, in order: group g has those from bounds[g] to bounds[g + 1] - 1.

    cells: (G,) combinations of tags; group_of: (A,); sizes: (A,) tags of each attribute, one more where some row has
    none of them; divisors: (A,) how far apart these are in the code of the group; most_items: of one group;
    items_a_cell: the most tags that the last attributes of a group have for each combination of theirs, at least 1.
    """

    bounds: NDArray[np.int64]
    cells: NDArray[np.int64]
    group_of: NDArray[np.int64]
    sizes: NDArray[np.int64]
    divisors: NDArray[np.int64]
    most_items: int
    items_a_cell: int

    def __len__(self) -> int:
        return len(self.cells)

    def most_cells(self, groups: int) -> int:
        """Cells of the largest table of so many groups."""
        return int(np.prod(np.sort(self.cells)[-groups:]))

    def nanoseconds(self, groups: int, rows: Any) -> Any:
        """About, to count `rows` in one table of `groups` groups and to sum it up."""
        return _nanoseconds(float(self.cells.mean()) ** groups, rows)


def _nanoseconds(cells: float, rows: Any) -> Any:
    """About, to count `rows` in a table of `cells` and to sum it up."""
    spilled = math.log2(max(cells, 2000) / 2000)  # out of the first cache
    return rows * (0.6 + 0.1 * spilled) + cells * 1.2 + 500


def _groups(table: Encoded, rows: float) -> Groups:
    """The groups by which `rows` are counted soonest in tables of three."""
    held = np.add.reduceat(np.append(table.item_count, 0), table.firsts[:-1]) * (table.widths > 0)
    sizes = np.maximum(table.widths + (held < table.n_rows), 1)
    cuts = [_cut(sizes.tolist(), most) for most in GROUP_CELLS]
    bounds = min(cuts, key=lambda cut: _all_threes(len(cut[0]) - 1, cut[1], rows))[0]
    group_of = np.repeat(np.arange(len(bounds) - 1), np.diff(bounds))
    divisors = np.ones(len(sizes), dtype=np.int64)
    for a in range(len(sizes) - 2, -1, -1):
        if group_of[a] == group_of[a + 1]:
            divisors[a] = divisors[a + 1] * sizes[a + 1]
    starts = np.array(bounds[:-1])
    items = table.firsts[bounds[1:]] - table.firsts[starts]
    ends = table.firsts[bounds[1:]][group_of]
    return Groups(
        bounds=np.array(bounds),
        cells=divisors[starts] * sizes[starts],
        group_of=group_of,
        sizes=sizes,
        divisors=divisors,
        most_items=int(items.max(initial=1)),
        items_a_cell=math.ceil(((ends - table.firsts[:-1]) / (divisors * sizes)).max(initial=1.0)),
    )


def _cut(sizes: list[int], most_cells: int) -> tuple[list[int], float]:
    """Bounds of groups of at most `most_cells` combinations, or of one attribute; and how many a group has."""
    bounds, cells, whole = [0], 1, 0
    for a, size in enumerate(sizes):
        if a > bounds[-1] and cells * size > most_cells:
            bounds.append(a)
            whole += cells
            cells = 1
        cells *= size
    return [*bounds, len(sizes)], (whole + cells) / len(bounds)


def _all_threes(n: int, cells: float, rows: float) -> float:
    """Nanoseconds, about, to count so many rows by all threes of `n` groups of so many `cells`."""
    return float(n * (n + 1) * (n + 2) / 6 * _nanoseconds(cells**3, rows))


class JointTables:
    """The table's group codes, and room for tables for each thread."""

    name = "joint tables"

    def __init__(self, table: Encoded, max_depth: int) -> None:
        self._table = table
        self._sums = sums_of(table.columns, table.any_unscored, as_planes=False)
        self._n_words = 1 + sum(part.bits > 2 for column in table.columns for part in column.parts)
        share = float(table.item_count.mean()) / table.n_rows if table.n_items else 0.0
        rows = table.n_rows * share ** max(0, max_depth - 3)
        self._groups = _groups(table, rows)
        self._plans: dict[int, Plan] = {}
        self._rooms = Idle(partial(_room, table, max_depth, self._groups, self._sums.n_fields))

    def can(self) -> bool:
        return self._groups.most_cells(1) <= WIDEST and self._block_bytes <= MOST_BYTES

    @property
    def _block_bytes(self) -> int:
        return self._sums.n_fields * self._table.n_items**2 * 8

    def cost(self, level: Level) -> NDArray[np.float64]:
        """Nanoseconds for each prefix, about."""
        return self._plan(level).cost

    def together(self, level: Level) -> NDArray[np.int64] | None:
        """Where the prefixes begin that are counted at once (U + 1,); None where each is by itself."""
        return self._plan(level).together

    def _plan(self, level: Level) -> Plan:
        """A walk has one level of each depth."""
        if level.depth not in self._plans:
            plans = [self._by_two(level)]
            fits = self._groups.most_cells(3) <= MOST_CELLS
            if level.depth > 2 and fits and self._block_bytes * self._groups.most_items <= MOST_BYTES:
                plans += self._by_three(level)
            self._plans[level.depth] = min(plans, key=lambda plan: float(plan.cost.sum()))
        return self._plans[level.depth]

    def _by_two(self, level: Level) -> Plan:
        groups = level.attributes_after * len(self._groups) / max(1, len(self._groups.group_of))
        tables = groups * (groups + 1) / 2 * self._groups.nanoseconds(2, level.rows) * self._n_words
        scan = level.parent_rows * 0.7 + level.rows * groups if level.depth > 2 else 0.0
        return Plan(None, scan + tables + level.cells * 2.0 + 300)

    def _by_three(self, level: Level) -> list[Plan]:
        """One plan, or none where a count would yield too many slices at once."""
        lead = self._groups.group_of[self._table.attribute[level.prefixes[:, -1]]]
        together = runs(level, lead)
        groups = len(self._groups) - 1 - lead
        tables = groups * (groups + 1) / 2 * self._groups.nanoseconds(3, level.parent_rows) * self._n_words
        scan = level.parent_rows * (2 + groups) if level.depth > 3 else 0.0
        if np.add.reduceat(level.most_slices, together[:-1]).max() > MOST_SLICES:
            return []
        shared = (scan + tables + 300) / np.repeat(np.diff(together), np.diff(together))
        return [Plan(together, shared + level.cells * 2.0)]

    @cached_property
    def _encoded(self) -> tuple[Any, ...]:
        """What each group code says of an attribute (A, 256), -1 for none; group codes, values and their largest, words
        of all rows and their places: as `fill` takes them."""
        table, groups = self._table, self._groups
        tags = (np.arange(256) // groups.divisors[:, None] % groups.sizes[:, None]).astype(np.int16)
        tags = np.where(tags < table.widths[:, None], tags, np.int16(-1))
        codes = np.empty((len(groups) + 1, table.n_rows), dtype=np.uint8)
        in_parts(
            table.n_rows,
            lambda begin, end: encode_groups(
                table.codes, table.position, table.offsets, table.firsts, groups.bounds, groups.sizes, begin, end, codes
            ),
        )
        values, most = field_values(table)
        places = np.empty((len(most), 3), dtype=np.int64)
        words = np.empty((assign_words(most, table.n_rows, places), table.n_rows), dtype=np.uint64)
        row_words(values, places, np.zeros(0, dtype=np.int32), 0, table.n_rows, words)
        return tags, codes, values, most, words, places

    def prepare(self) -> None:
        _ = self._encoded

    def fill(self, level: Level, unit: NDArray[np.int64], lines: Lines) -> int:
        """The slices of one piece of work to `lines`; how many."""
        table, sums, groups = self._table, self._sums, self._groups
        by_three = int(self.together(level) is not None)
        with self._rooms.one() as room:
            found: int = fill(
                *self._encoded, groups.bounds, groups.cells, groups.group_of, groups.sizes, groups.divisors,
                table.widths, table.firsts, table.attribute, table.item_ids, level.prefixes, unit, by_three,
                level.must, level.min_count, sums.targets, sums.terms, sums.weights, *room,
                lines.items, lines.count, lines.scored, lines.total,
            )  # fmt: skip
        return found


def _room(table: Encoded, max_depth: int, groups: Groups, n_fields: int) -> tuple[NDArray[Any], ...]:
    """Arrays that one thread works in, in the order in which `fill` takes them; what is not used takes no memory."""
    n_rows, n_items = table.n_rows, max(1, table.n_items)
    depth = max(1, max_depth - 2)
    two, three, items = groups.most_cells(2), groups.most_cells(3), groups.most_items
    cells = max(TABLES_AT_ONCE, min(three, MOST_CELLS), two)
    at_once = items if three <= MOST_CELLS and n_fields * items * n_items**2 * 8 <= MOST_BYTES else 1
    return (
        np.empty((depth, n_rows + 1), dtype=np.int32),
        np.empty(depth, dtype=np.int64),
        np.empty((len(groups) + 1, n_rows), dtype=np.uint8),
        np.empty((len(groups) + 3, 4), dtype=np.int64),
        np.empty((n_fields, n_rows), dtype=np.uint64),
        np.empty((n_fields, 3), dtype=np.int64),
        np.empty(ROWS_AT_ONCE, dtype=np.uint16),
        np.empty(cells, dtype=np.uint64),
        np.empty(groups.items_a_cell * cells, dtype=np.uint64),
        np.empty(groups.items_a_cell * cells, dtype=np.uint64),
        np.empty((n_fields, at_once, n_items, n_items), dtype=np.uint64),
        np.empty((n_fields, n_items), dtype=np.int64),
        np.empty((n_items, 2), dtype=np.int64),
        np.empty(n_items + 1, dtype=np.int64),
        np.empty(n_items, dtype=np.int64),
    )
