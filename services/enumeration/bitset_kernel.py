"""Slices by bit sets, projected onto the rows of each prefix (eight items a popcount).

Where each row has one score, and it is 0 or 1, the rows with 1 have the first words to themselves: what these count is
the sum, and a cell holds the rows in its lower and the sum in its upper half.
"""

from __future__ import annotations

from functools import cached_property, partial
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from services.enumeration.bitset import pack, word_count
from services.enumeration.bitset_counts import WORDS_IN_CACHE, after, count_pairs, end_of_tags, most_common, take_away
from services.enumeration.bitset_emission import ROW_BITS, emit, plan_vectors
from services.enumeration.bitset_projection import below, choose, count_columns, pack_items, padded_in_kernel, project
from services.enumeration.compiled import compiled, inlined
from services.enumeration.emission import Lines, sums_of
from services.enumeration.encoding import Encoded
from services.enumeration.level import Level, Plan, ranges_of, runs
from services.enumeration.vector import COUNTS_VECTORS, HALF, LANES, VECTOR_FIELDS, padded
from services.enumeration.work_units import Idle, in_parts

CELLS_AT_ONCE = 1 << 16  # of a joint count that are counted at once where prefixes are counted one by one
MOST_BYTES = 64 << 20  # of bit sets of the whole table
MOST_BLOCK_BYTES = 16 << 20  # of one thread's joint counts
MOST_SLICES = 1 << 18  # below prefixes that are counted together
DEPTH, PLANNED, HELD = 0, 1, 2  # of the state of a room: what its stack and its vectors are of
CELL_WORD_NS = 0.03 if COUNTS_VECTORS else 0.17  # about, to meet a word of one item with a word of another


@inlined
def _changed(prefixes: Any, p: int, current: Any) -> int:
    """The first pair in which prefix `p` is not as the current one."""
    depth = prefixes.shape[1]
    q = 0
    while q < depth and prefixes[p, q] == current[q]:
        q += 1
    return q


@inlined
def _holds(prefixes: Any, p: int, must: Any) -> bool:
    """Whether prefix `p` holds one of the items that must be there, or none must."""
    held: bool = must[1] == 0
    for q in range(prefixes.shape[1]):
        held |= must[0] <= prefixes[p, q] < must[1]
    return held


@inlined
def _descend(
    prefix: Any, changed: int, n_pairs: int, current: Any, flat: Any, all_stride: int, planes: Any, n_fields: int,
    attribute: Any, n_items: int, min_count: int, stack_words: Any, stack_planes: Any, stack_positions: Any,
    stack_sizes: Any, stack_totals: Any, mask: Any, steps: Any, left_bits: Any, gaps: Any, line: Any, row: Any,
    every_row: Any, counts: Any, chosen: Any,
) -> None:  # fmt: skip
    """Project onto the rows of the first n_pairs pairs of `prefix`; those before `changed` are as they were."""
    for q in range(changed, n_pairs):
        item = prefix[q]
        current[q] = item
        width, n_words, n_first = stack_sizes[q, 0], stack_sizes[q, 1], stack_sizes[q, 2]
        positions = stack_positions[q]
        here = np.searchsorted(positions[:width], item)
        first = after(attribute, positions[:width], attribute[item])
        above_words = flat if q == 0 else stack_words[q - 1]
        above_planes = planes if q == 0 else stack_planes[q - 1]
        stride = all_stride if q == 0 else padded_in_kernel(width)
        left = choose(above_words, stride, n_words, here, first, width, min_count, row, counts, chosen)
        for j in range(left):
            stack_positions[q + 1, j] = positions[chosen[j]]
        below(
            above_words, stride, n_words, n_first, above_planes, n_fields, here, chosen, left, mask, steps, left_bits,
            gaps, line, row, every_row, stack_words[q], stack_planes[q], stack_totals[q], n_items, stack_sizes[q + 1],
        )  # fmt: skip


@inlined
def _begin(
    depth: int, attribute: Any, words: Any, half: int, n_rows: int, stack_positions: Any, stack_sizes: Any,
    current: Any, state: Any,
) -> None:  # fmt: skip
    """The bottom of the stack: the whole table. What lies on it from the last piece of the same depth stays."""
    if state[DEPTH] != depth:
        state[DEPTH], state[PLANNED] = depth, 0
        current[:] = -1
    for j in range(len(attribute)):
        stack_positions[0, j] = j
    stack_sizes[0, 0], stack_sizes[0, 1] = len(attribute), len(words)
    stack_sizes[0, 2], stack_sizes[0, 3] = half, n_rows


@compiled
def fill_one_by_one(
    words: Any, half: int, planes: Any, all_totals: Any, pairs: Any, n_rows: int, attribute: Any, item_ids: Any,
    prefixes: Any, unit: Any, must: Any, min_count: int, targets: Any, terms: Any, weights: Any, short: int, shift: int,
    current: Any, state: Any, stack_words: Any, stack_planes: Any, stack_positions: Any, stack_sizes: Any,
    stack_totals: Any, base: Any, ids: Any, room: Any, ranges: Any, wanted: Any, mask: Any, steps: Any, left_bits: Any,
    gaps: Any, line: Any, masked: Any, vectors: Any, starts: Any, last: Any, cells: Any, counts: Any, counted: Any,
    left_out: Any, chosen: Any, whole: Any, items: Any, count: Any, scored: Any, total: Any,
) -> Any:  # fmt: skip
    """Slices of one work unit, in canonical order; how many there are.

    words: (W, I or more) uint64; half: 0, or how many of these the rows with score 1 have to themselves; planes: (W,
    F - 1 or more) uint64, of all fields but the rows; all_totals: (F, I) rows and sums of each item; pairs: (F, I, I or
    more) joint counts of two items, filled here where prefixes are empty, or without lines; attribute, item_ids: (I,)
    of the frequent items; prefixes: (P, d - 2) int32 positions of these, sorted; unit: prefixes [0] to [1], and the
    rows of their joint counts that are of items [2] to [3]; must: items [0] to [1] of which each slice holds one, or 0
    and 0; short: items a line where vectors of slices can be written, or 0; shift: HALF where rows and sums are the
    halves of a cell, or 0; current, state, stack_*: the prefix of which the stack is, and the projection for each of
    its pairs, kept from one piece to the next; base: (F, I, I or more) joint counts below a prefix less its last pair;
    room: flat, for joint counts of as many rows as go in; vectors, starts, last: as of `plan_vectors`.
    """
    depth = prefixes.shape[1]
    n_fields, n_items = all_totals.shape
    n_lines = len(item_ids)
    every_row = np.full(1, ~np.uint64(0))
    flat, all_stride = words.reshape(words.size), words.shape[1]
    flat_all, flat_pairs = all_totals.reshape(n_fields * n_items), pairs.reshape(pairs.size)
    flat_items, flat_total = items.reshape(items.size), total.reshape(total.size)
    prefix_ids = np.empty((1, depth), dtype=np.int32)
    row = np.zeros(1, dtype=np.int64)
    everything = np.zeros(2, dtype=np.int64)
    _begin(depth, attribute, words, half, n_rows, stack_positions, stack_sizes, current, state)
    row_bits = ROW_BITS if shift else -1
    at: Any = np.int64(0)  # a 0 would be a type of its own to all that is called with it
    for p in range(unit[0], unit[1]):
        held = _holds(prefixes, p, must)
        if not held and depth and attribute[prefixes[p, depth - 1]] >= attribute[must[0]]:
            continue  # what follows is of later attributes
        _descend(
            prefixes[p], _changed(prefixes, p, current), depth, current, flat, all_stride, planes, n_fields, attribute,
            n_items, min_count, stack_words, stack_planes, stack_positions, stack_sizes, stack_totals, mask, steps,
            left_bits, gaps, line, row, every_row, counts, chosen,
        )  # fmt: skip
        width, n_words, n_first, rows = stack_sizes[depth]
        positions = stack_positions[depth, :width]
        some_words = flat if depth == 0 else stack_words[depth - 1]
        some_planes = planes if depth == 0 else stack_planes[depth - 1]
        stride = all_stride if depth == 0 else padded_in_kernel(width)
        totals = flat_all if depth == 0 else stack_totals[depth - 1]
        for q in range(depth):
            prefix_ids[0, q] = item_ids[prefixes[p, q]]
        for j in range(width):
            ids[j] = item_ids[positions[j]]
        low, high = np.searchsorted(positions, unit[2]), np.searchsorted(positions, unit[3])
        ranges_of(attribute, positions, must, held, ranges)
        into_pairs = depth == 0 and pairs.shape[1] > 0
        step = max(1, high - low if into_pairs else len(room) // max(1, n_fields * stride))
        ranges_of(attribute, positions, everything if into_pairs else must, into_pairs or held, wanted)
        for begin in range(low, high, step):
            stop = min(begin + step, high)
            if into_pairs:
                joint, origin, line_width, field = flat_pairs, 0, n_items, n_lines * n_items
            else:
                joint, origin, line_width, field = room, -begin * stride, stride, step * stride
            count_pairs(
                some_words, stride, n_words, n_first, some_planes, n_fields, attribute, positions, 0, begin, stop,
                wanted, totals, 0, n_items, row_bits, rows, masked, counted, left_out, joint, origin, line_width, field,
            )  # fmt: skip
            if short:
                plan_vectors(ranges, ids[:width], begin, stop, line_width, depth, vectors, starts, last)
            at = emit(
                joint, origin, line_width, field, 0, begin, stop, ranges, ids, min_count, prefix_ids, targets, terms,
                weights, short, shift, vectors, starts, last, chosen, cells, whole, at, items, flat_items, count,
                scored, total, flat_total,
            )  # fmt: skip
    return at


@compiled
def fill_all_tags(
    words: Any, half: int, planes: Any, all_totals: Any, pairs: Any, n_rows: int, attribute: Any, item_ids: Any,
    prefixes: Any, unit: Any, must: Any, min_count: int, targets: Any, terms: Any, weights: Any, short: int, shift: int,
    current: Any, state: Any, stack_words: Any, stack_planes: Any, stack_positions: Any, stack_sizes: Any,
    stack_totals: Any, base: Any, ids: Any, room: Any, ranges: Any, wanted: Any, mask: Any, steps: Any, left_bits: Any,
    gaps: Any, line: Any, masked: Any, vectors: Any, starts: Any, last: Any, cells: Any, counts: Any, counted: Any,
    left_out: Any, chosen: Any, whole: Any, items: Any, count: Any, scored: Any, total: Any,
) -> Any:  # fmt: skip
    """As `fill_one_by_one`, where prefixes that differ only in the tag of their last attribute are counted together."""
    depth = prefixes.shape[1]
    above = depth - 1  # pairs that they have in common
    n_fields, n_items = all_totals.shape
    n_lines = len(item_ids)
    every_row = np.full(1, ~np.uint64(0))
    flat, all_stride = words.reshape(words.size), words.shape[1]
    flat_all, flat_pairs = all_totals.reshape(n_fields * n_items), pairs.reshape(pairs.size)
    flat_base = base.reshape(base.size)
    flat_items, flat_total = items.reshape(items.size), total.reshape(total.size)
    prefix_ids = np.empty((n_lines, depth), dtype=np.int32)
    row = np.zeros(1, dtype=np.int64)
    everything = np.zeros(2, dtype=np.int64)
    _begin(depth, attribute, words, half, n_rows, stack_positions, stack_sizes, current, state)
    row_bits = ROW_BITS if shift else -1
    at: Any = np.int64(0)
    p = unit[0]
    while p < unit[1]:
        start, end = p, end_of_tags(attribute, prefixes, p, unit[1])
        p = end
        held = _holds(prefixes, start, must)
        a = attribute[prefixes[start, above]]
        if not held and a >= attribute[must[0]]:
            continue  # what follows is of later attributes
        changed = _changed(prefixes, start, current)
        planned = state[PLANNED] and changed >= above
        _descend(
            prefixes[start], changed, above, current, flat, all_stride, planes, n_fields, attribute, n_items, min_count,
            stack_words, stack_planes, stack_positions, stack_sizes, stack_totals, mask, steps, left_bits, gaps, line,
            row, every_row, counts, chosen,
        )  # fmt: skip
        width, n_words, n_first, rows = stack_sizes[above]
        positions = stack_positions[above, :width]
        some_words = flat if above == 0 else stack_words[above - 1]
        some_planes = planes if above == 0 else stack_planes[above - 1]
        stride = all_stride if above == 0 else padded_in_kernel(width)
        totals = flat_all if above == 0 else stack_totals[above - 1]
        whole_counts = flat_base if above else flat_pairs
        if not planned:
            ranges_of(attribute, positions, everything, True, wanted)
            for j in range(width):
                ids[j] = item_ids[positions[j]]
        if not planned and above:
            count_pairs(
                some_words, stride, n_words, n_first, some_planes, n_fields, attribute, positions, 0, 0, width, wanted,
                totals, 0, n_items, row_bits, rows, masked, counted, left_out, flat_base, 0, n_items, n_lines * n_items,
            )  # fmt: skip
        if not planned or held != state[HELD]:
            state[PLANNED], state[HELD] = 1, held
            ranges_of(attribute, positions, must, held, ranges)
            if short:
                plan_vectors(ranges, ids[:width], 0, width, stride, depth, vectors, starts, last)
        first = after(attribute, positions, a)
        skipped = first // LANES * LANES  # so that vectors begin where those of the whole do
        left = width - skipped
        for j in range(left):
            chosen[j] = skipped + j
        stride_below = padded_in_kernel(left)
        field = left * stride
        each = n_fields * field
        origin = -skipped * (stride + 1)
        tags = prefixes[start:end, above]
        most = most_common(positions, tags, totals, row_bits, rows)
        for k in range(len(tags)):
            for q in range(depth):
                prefix_ids[k, q] = item_ids[prefixes[start + k, q]]
            if k == most:  # has what the others leave
                continue
            here, size = np.searchsorted(positions, tags[k]), stack_sizes[above + 1]
            project(
                some_words, stride, n_words, n_first, some_planes, here, chosen, left, mask, steps, left_bits, gaps,
                line, stack_words[above], stride_below, stack_planes[above], size,
            )  # fmt: skip
            count_pairs(
                stack_words[above], stride_below, size[1], size[2], stack_planes[above], n_fields, attribute, positions,
                skipped, first, width, wanted, whole_counts, here * n_items, n_lines * n_items, row_bits, size[3],
                masked, counted, left_out, room, origin + k * each, stride, field,
            )  # fmt: skip
        if most >= 0:
            take_away(
                room, n_fields, origin, stride, field, most, len(tags), first, width, ranges, whole_counts, n_items,
                n_lines,
            )  # fmt: skip
        at = emit(
            room, origin, stride, field, each, first, width, ranges, ids, min_count, prefix_ids[: len(tags)], targets,
            terms, weights, short, shift, vectors, starts, last, chosen, cells, whole, at, items, flat_items, count,
            scored, total, flat_total,
        )  # fmt: skip
    return at


def _count_ns(n_fields: int, words: Any) -> Any:
    """About, to count a cell of so many words."""
    return n_fields * (words * CELL_WORD_NS + 0.45)


_count_ns_of_one: Any = compiled(_count_ns)


@compiled
def _cost_of_all_tags(
    together: Any, rows: Any, parent_rows: Any, parent_items: Any, parent_cells: Any, cells: Any, most_slices: Any,
    n_fields: int, slice_ns: float, cost: Any,
) -> float:  # fmt: skip
    """Nanoseconds, about, for each of the prefixes that are counted `together`; a bound of the slices of one count."""
    most = 0.0
    for u in range(len(together) - 1):
        known, most_rows, slices = 0.0, 0.0, 0.0
        for p in range(together[u], together[u + 1]):
            known += rows[p]
            most_rows = max(most_rows, rows[p])
            slices += most_slices[p]
        most = max(most, slices)
        for p in range(together[u], together[u + 1]):
            if rows[p] == most_rows and known == parent_rows[p]:  # follows from the others
                cost[p] = parent_cells[p] * n_fields * 0.5
            else:
                projection = (parent_rows[p] / 64 + 1) * (parent_items[p] * 0.3 + 5) + 200
                cost[p] = projection + parent_cells[p] * 0.7 * _count_ns_of_one(n_fields, rows[p] / 64 + 1)
            cost[p] += parent_cells[p] * 0.1 + cells[p] * slice_ns + 300
    return most


FILLS = (fill_one_by_one, fill_all_tags)


class BitSets:
    """The table's bit sets, and room to project them in for each thread."""

    name = "bit sets"

    def __init__(self, table: Encoded, max_depth: int) -> None:
        self._table = table
        self._sums = sums_of(table.columns, table.any_unscored, as_planes=True)
        # Where a score is 0 or 1, those of 1 come first, and a cell is two numbers of 16 bits.
        self._halves = self._sums.plain and table.n_rows <= ROW_BITS
        self._n_fields = 1 if self._halves else self._sums.n_fields
        self._rooms = Idle(partial(self._room, max(1, max_depth - 2)))
        self._lock = Lock()
        self._rows_of_pairs = 0  # that have been counted
        self._plans: dict[int, Plan] = {}

    def can(self) -> bool:
        return self._words_needed * 8 <= MOST_BYTES

    @property
    def _words_needed(self) -> int:
        return word_count(self._table.n_rows) * (self._table.n_items + self._n_fields)

    @property
    def _fits_together(self) -> bool:
        """Whether the joint counts of all tags of an attribute can be held at once."""
        widest = int(self._table.widths.max(initial=1))
        return widest * self._n_fields * self._table.n_items * padded(self._table.n_items) * 4 <= MOST_BLOCK_BYTES

    def cost(self, level: Level) -> NDArray[np.float64]:
        """Nanoseconds for each prefix, about."""
        return self._plan(level).cost

    def together(self, level: Level) -> NDArray[np.int64] | None:
        """Where the prefixes begin that are counted at once (U + 1,); None where each is by itself."""
        if level.depth == 3 and self._rows_of_pairs < self._table.n_items:
            return None  # another kernel has counted the pairs
        return self._plan(level).together

    def _plan(self, level: Level) -> Plan:
        """A walk has one level of each depth."""
        if level.depth not in self._plans:
            plans = [self._one_by_one(level)]
            if level.depth > 2 and self._fits_together:
                plans += self._all_tags(level)
            self._plans[level.depth] = min(plans, key=lambda plan: float(plan.cost.sum()))
        return self._plans[level.depth]

    @property
    def _slice_ns(self) -> float:
        """About, to write a slice down."""
        return 0.35 if self._sums.plain else 5.0 + 2.5 * (self._sums.n_fields - 1)

    def _one_by_one(self, level: Level) -> Plan:
        words, parents = level.rows / 64 + 1, level.parent_rows / 64 + 1
        projection = np.zeros(len(words))
        if level.depth > 2:
            projection = parents * (level.parent_items * 2 * CELL_WORD_NS + level.items_after * 0.4 + 7) + 600
        return Plan(None, projection + level.cells * (_count_ns(self._n_fields, words) + self._slice_ns) + 300)

    def _all_tags(self, level: Level) -> list[Plan]:
        """One plan, or none where a count would yield too many slices at once."""
        together = runs(level, self._table.attribute[level.prefixes[:, -1]])
        cost = np.empty(len(level.prefixes))
        most = _cost_of_all_tags(
            together, level.rows, level.parent_rows, level.parent_items, level.parent_cells, level.cells,
            level.most_slices, self._n_fields, self._slice_ns, cost,
        )  # fmt: skip
        return [Plan(together, cost)] if most <= MOST_SLICES else []

    @cached_property
    def _packed(self) -> tuple[Any, ...]:
        """Bit sets, how many words the first half has, planes, totals, room for the joint counts of pairs, and the
        rows, as `fill` takes them.
        """
        table, n_fields = self._table, self._n_fields
        first = np.zeros(table.n_rows, dtype=np.bool_)
        if self._halves and table.columns:
            first = table.columns[0].parts[0].values != 0
        order = np.concatenate((np.flatnonzero(first), np.flatnonzero(~first))).astype(np.int32)
        n_first = int(first.sum())
        half = word_count(n_first)
        n_words, stride = half + word_count(table.n_rows - n_first), padded(table.n_items)
        room = np.empty(n_words * stride + LANES, dtype=np.uint64)  # a vector may be read past the last word
        words = room[: n_words * stride].reshape(n_words, stride)

        def part(begin: int, end: int) -> None:
            pack_items(
                table.codes, order, n_first, half, table.attribute, table.item_ids, table.offsets, word_count(begin),
                word_count(end), words,
            )  # fmt: skip

        in_parts(n_words * 64, part)
        planes = []
        for column in table.columns if n_fields > 1 else ():
            if column.scored is not None:
                planes.append(column.scored)
            planes += [(part.values & 1 << p) != 0 for part in column.parts for p in part.planes]
        lines = np.zeros((n_words, padded(n_fields - 1)), dtype=np.uint64)
        if planes:
            lines[:, : n_fields - 1] = pack(np.array(planes)).T
        totals = np.empty((n_fields, stride), dtype=np.int32)
        row = np.zeros(1, dtype=np.int64)
        count_columns(words.reshape(-1), stride, n_words, half, lines, n_fields, table.n_items, row, totals.reshape(-1))
        pairs = _room_for_joint(n_fields, table.n_items if self._fits_together else 0, stride)
        return words, half, lines, totals, pairs, table.n_rows

    def prepare(self) -> None:
        _ = self._packed

    def fill(self, level: Level, unit: NDArray[np.int64], lines: Lines) -> int:
        """The slices of one piece of work to `lines`; how many."""
        found = self.fill_by(FILLS[self.together(level) is not None], level, unit, lines)
        if level.depth == 2:
            with self._lock:
                self._rows_of_pairs += min(int(unit[3]), self._table.n_items) - int(unit[2])
        return found

    def fill_by(self, fill: Any, level: Level, unit: NDArray[np.int64], lines: Lines) -> int:
        """`fill` by one of FILLS."""
        table, sums = self._table, self._sums
        short = lines.items.shape[1] if sums.plain and lines.short else 0
        with self._rooms.one() as room:
            found: int = fill(
                *self._packed, table.attribute, table.item_ids, level.prefixes, unit, level.must, level.min_count,
                sums.targets, sums.terms, sums.weights, short, HALF * self._halves, *room, lines.items, lines.count,
                lines.scored, lines.total,
            )  # fmt: skip
        return found

    def _room(self, depth: int) -> tuple[NDArray[Any], ...]:
        """Arrays that one thread works in, as `fill` takes them; what is not used takes no memory."""
        table, n_fields, fits_together = self._table, self._n_fields, self._fits_together
        n_items = max(LANES, padded(table.n_items))
        n_words = word_count(table.n_rows) + 2
        most_words = word_count(int(table.item_count.max(initial=0))) + 2
        widest = int(table.widths.max(initial=1)) if fits_together else 1
        n_cells = widest * n_items**2 if fits_together else max(CELLS_AT_ONCE // n_fields, n_items)
        n_vectors = n_items * (n_items // LANES + 1) if fits_together else n_cells // 2
        return (
            np.full(depth, -1, dtype=np.int32),
            np.zeros(3, dtype=np.int64),
            np.empty((depth, most_words * n_items + LANES), dtype=np.uint64),
            np.empty((depth, most_words, padded(n_fields - 1)), dtype=np.uint64),
            np.empty((depth + 1, n_items), dtype=np.int32),
            np.empty((depth + 1, 4), dtype=np.int64),
            np.empty((depth, n_fields * n_items), dtype=np.int32),
            _room_for_joint(n_fields, n_items if fits_together else 0, n_items),
            np.empty(n_items, dtype=np.int32),
            np.empty(n_fields * n_cells, dtype=np.int32),
            np.empty((n_items, 2), dtype=np.int64),
            np.empty((n_items, 2), dtype=np.int64),
            np.empty(n_words, dtype=np.uint64),
            np.empty((6, n_words), dtype=np.uint64),
            np.empty(n_words, dtype=np.uint64),
            np.empty(n_words, dtype=np.uint64),
            np.empty(n_items, dtype=np.uint64),
            np.empty(max(WORDS_IN_CACHE, 4 * n_items), dtype=np.uint64),
            np.empty((n_vectors, VECTOR_FIELDS), dtype=np.int64),
            np.empty(n_items + 1, dtype=np.int64),
            np.empty(n_items, dtype=np.int64),
            np.empty((self._sums.n_fields, n_items), dtype=np.int64),
            np.empty(n_items, dtype=np.int32),
            np.empty(n_items + 1, dtype=np.int64),
            np.empty(n_items + 1, dtype=np.int64),
            np.empty(n_items + 1, dtype=np.int64),
            np.empty(n_items, dtype=np.int64),
        )


def _room_for_joint(n_fields: int, n_rows: int, stride: int) -> NDArray[np.int32]:
    """Room for a joint count; a vector may be read past the last cell."""
    size = n_fields * n_rows * stride
    return np.empty(size + LANES, dtype=np.int32)[:size].reshape(n_fields, n_rows, stride)
