"""Joint counts by bit sets, projected onto the rows of each prefix (eight items a popcount).

Words lie word-major: words[w * width + j] holds rows 64 w to 64 w + 63 of item j, so that one word of a row of the
joint count meets the words of many items in one vector instruction. Below a prefix only its rows are left, moved
together (Hacker's Delight 7-4), and only the items that still have min_count of them.
"""

from __future__ import annotations

from functools import cached_property, partial
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from services.enumeration.bitset import pack, word_count
from services.enumeration.compiled import compiled, popcount
from services.enumeration.emission import Lines, frequent, sums_of, write
from services.enumeration.encoding import Encoded
from services.enumeration.level import Level, ranges_of
from services.enumeration.vector import LANES, meet, move_together, padded
from services.enumeration.work_units import Idle

WORDS_IN_CACHE = 1 << 14  # words that one sweep over the rows of a joint count reads: 128 kilobytes
CELLS_IN_CACHE = 1 << 16  # cells of a joint count that are added up at once: half a megabyte
MOST_BYTES = 64 << 20  # of bit sets of the whole table


@compiled
def pack_items(codes: Any, position: Any, offsets: Any, first_word: int, last_word: int, words: Any) -> None:
    """Bit sets of frequent items: codes (N, A), `position[offsets[a] + code]` the item's line, or -1."""
    n_rows, n_attributes = codes.shape
    width = words.shape[1]
    for w in range(first_word, last_word):
        line = words[w]
        for j in range(width):
            line[j] = 0
        for row in range(64 * w, min(64 * w + 64, n_rows)):
            bit = np.uint64(1) << np.uint64(row - 64 * w)
            for a in range(n_attributes):
                item = offsets[a] + np.int64(codes[row, a])
                if item < offsets[a + 1] and position[item] >= 0:
                    line[position[item]] |= bit


@compiled
def _padded(width: int) -> int:
    return (width + LANES - 1) // LANES * LANES


@compiled
def _plan_moves(mask: Any, n_words: int, steps: Any) -> None:
    """What moves by 1, 2, 4, … 32 when the bits of each mask word move together at the low end: steps (6, W)."""
    for w in range(n_words):
        m, gaps = mask[w], ~mask[w] << np.uint64(1)
        for s in range(6):
            parity = gaps
            parity ^= parity << np.uint64(1)
            parity ^= parity << np.uint64(2)
            parity ^= parity << np.uint64(4)
            parity ^= parity << np.uint64(8)
            parity ^= parity << np.uint64(16)
            parity ^= parity << np.uint64(32)
            moved = parity & m
            steps[s, w] = moved
            m = (m ^ moved) | (moved >> np.uint64(1 << s))
            gaps &= ~parity


@compiled
def _project(
    words: Any, planes: Any, positions: Any, width: int, stride: int, n_words: int, at: int, first: int,
    min_count: int, counts: Any, chosen: Any, mask: Any, steps: Any, out_words: Any, out_planes: Any,
    out_positions: Any,
) -> tuple[int, int]:  # fmt: skip
    """Columns first.. with at least min_count rows of column `at`, and only those rows: columns left, rows left."""
    counts[0, :width] = 0
    for j in range(first // LANES * LANES, width, LANES):
        meet(words, stride, 0, n_words, at, j, planes, 0, (0,), counts)
    left = frequent(counts[0], first, width, min_count, chosen)
    for j in range(left):
        out_positions[j] = positions[chosen[j]]
    for w in range(n_words):
        mask[w] = words[w * stride + at]
    _plan_moves(mask, n_words, steps)
    out_stride = _padded(left)
    line = np.zeros(out_stride, dtype=np.uint64)
    to, offset, rows = 0, 0, 0
    for w in range(n_words):
        inside = mask[w]
        ones = popcount(inside)
        if ones == 0:
            continue
        rows += ones
        source = words[w * stride : (w + 1) * stride]
        for j in range(left):
            line[j] = source[chosen[j]]
        over = offset + ones > 64
        next_to = to + 1 if over else to
        here = out_words[to * out_stride : (to + 1) * out_stride]
        after = out_words[next_to * out_stride : (next_to + 1) * out_stride]
        for j in range(0, out_stride, LANES):
            move_together(line, j, inside, steps, w, offset, over, here, after)
        for j in range(0, planes.shape[1], LANES):
            move_together(planes[w], j, inside, steps, w, offset, over, out_planes[to], out_planes[next_to])
        offset += ones
        if offset >= 64:
            offset -= 64
            to += 1
    return left, rows


@compiled
def fill(
    words: Any, planes: Any, attribute: Any, item_ids: Any, prefixes: Any, unit: Any, must: Any, min_count: int,
    targets: Any, terms: Any, weights: Any, stack_words: Any, stack_planes: Any, stack_positions: Any,
    stack_sizes: Any, ranges: Any, mask: Any, steps: Any, cells: Any, chosen: Any, whole: Any,
    items: Any, count: Any, scored: Any, total: Any,
) -> int:  # fmt: skip
    """Slices of one work unit, in canonical order; how many there are.

    words: (W, I or more) uint64; planes: (W, F or more) uint64, the first all rows; attribute, item_ids: (I,) of the
    frequent items; prefixes: (P, d - 2) int32 positions of these, sorted; unit: prefixes [0] to [1], and the rows of
    their joint counts that are of items [2] to [3]; must: items [0] to [1] of which each slice holds one, or 0 and 0;
    stack_*: the projection for each pair of the current prefix; cells: (rows at a time, F, I or more).
    """
    depth = prefixes.shape[1]
    n_fields = cells.shape[1]
    current = np.full(depth, -1, dtype=np.int32)
    prefix_ids = np.empty(depth, dtype=np.int32)
    ids = np.empty(len(item_ids), dtype=np.int32)
    for j in range(len(item_ids)):
        stack_positions[0, j] = j
    stack_sizes[0, 0], stack_sizes[0, 1] = len(item_ids), len(words)
    flat = words.reshape(words.size)
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
        if not held and depth and attribute[prefixes[p, depth - 1]] >= attribute[must[0]]:
            continue  # what follows is of later attributes
        for q in range(changed, depth):
            item = prefixes[p, q]
            current[q] = item
            width, n_words = stack_sizes[q, 0], stack_sizes[q, 1]
            positions = stack_positions[q]
            here = np.searchsorted(positions[:width], item)
            first = here + 1
            while first < width and attribute[positions[first]] == attribute[item]:
                first += 1
            left, rows = _project(
                flat if q == 0 else stack_words[q - 1],
                planes if q == 0 else stack_planes[q - 1],
                positions,
                width,
                len(words[0]) if q == 0 else _padded(width),
                n_words,
                here,
                first,
                min_count,
                cells[0],
                chosen,
                mask,
                steps,
                stack_words[q],
                stack_planes[q],
                stack_positions[q + 1],
            )
            stack_sizes[q + 1, 0], stack_sizes[q + 1, 1] = left, (rows + 63) // 64
        width, n_words = stack_sizes[depth, 0], stack_sizes[depth, 1]
        positions = stack_positions[depth]
        for j in range(width):
            ids[j] = item_ids[positions[j]]
        low = np.searchsorted(positions[:width], unit[2])
        high = np.searchsorted(positions[:width], unit[3])
        ranges_of(attribute, positions[:width], must, held, ranges)
        some_words = flat if depth == 0 else stack_words[depth - 1]
        some_planes = planes if depth == 0 else stack_planes[depth - 1]
        stride = len(words[0]) if depth == 0 else _padded(width)
        step = max(4, WORDS_IN_CACHE // max(1, width))
        for begin in range(low, high, len(cells)):
            end = min(begin + len(cells), high)
            for i in range(begin, end):
                cells[i - begin, :, :stride] = 0
            for first_word in range(0, n_words, step):
                last_word = min(first_word + step, n_words)
                for i in range(begin, end):
                    some = cells[i - begin]
                    a, b = ranges[i, 0], ranges[i, 1]
                    if a >= b:
                        continue
                    for j in range(a // LANES * LANES, b, LANES):
                        f = 0
                        while f + 2 <= n_fields:
                            meet(some_words, stride, first_word, last_word, i, j, some_planes, f, (0, 0), some)
                            f += 2
                        if f < n_fields:
                            meet(some_words, stride, first_word, last_word, i, j, some_planes, f, (0,), some)
            for i in range(begin, end):
                n_chosen = frequent(cells[i - begin, 0], ranges[i, 0], ranges[i, 1], min_count, chosen)
                if n_chosen:
                    at = write(
                        cells[i - begin], chosen, n_chosen, ids, prefix_ids, ids[i], targets, terms, weights,
                        whole, at, items, count, scored, total,
                    )  # fmt: skip
    return at


class BitSets:
    """The table's bit sets, and room to project them in for each thread."""

    name = "bit sets"

    def __init__(self, table: Encoded, max_depth: int) -> None:
        self._table = table
        self._sums = sums_of(table.columns, table.any_unscored, as_planes=True)
        self._rooms = Idle(partial(_Room, table, max_depth - 2, self._sums.n_fields))
        self._packing = Lock()

    def can(self) -> bool:
        return self._words_needed * 8 <= MOST_BYTES

    @property
    def _words_needed(self) -> int:
        return word_count(self._table.n_rows) * (self._table.n_items + self._sums.n_fields)

    def cost(self, level: Level) -> NDArray[np.float64]:
        """Nanoseconds for each prefix, about."""
        words = level.rows / 64 + 1
        parents = level.parent_rows / 64 + 1
        projection = parents * (level.parent_items * 0.2 + level.items_after * 0.8 + 20) if level.depth > 2 else 0.0
        return projection + level.cells * (words * self._sums.n_fields * 0.13 + 1.0) + 300

    @cached_property
    def _packed(self) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
        table = self._table
        words = np.empty((word_count(table.n_rows), padded(table.n_items)), dtype=np.uint64)
        pack_items(table.codes, table.position, table.offsets, 0, len(words), words)
        planes = [np.ones(table.n_rows, dtype=np.bool_)]
        for column in table.columns:
            if column.scored is not None:
                planes.append(column.scored)
            planes += [(part.values >> p & 1).astype(np.bool_) for part in column.parts for p in part.planes]
        lines = np.zeros((len(words), padded(len(planes))), dtype=np.uint64)
        lines[:, : len(planes)] = pack(np.array(planes)).T
        return words, lines

    def together(self, level: Level) -> None:
        """Each prefix is counted by itself."""

    def fill(self, level: Level, unit: NDArray[np.int64], lines: Lines) -> int:
        """The slices of one piece of work to `lines`; how many."""
        with self._packing:
            words, planes = self._packed
        table, sums = self._table, self._sums
        with self._rooms.one() as room:
            found: int = fill(
                words, planes, table.attribute, table.item_ids, level.prefixes, unit, level.must, level.min_count,
                sums.targets, sums.terms, sums.weights, room.words, room.planes, room.positions, room.sizes,
                room.ranges, room.mask, room.steps, room.cells, room.chosen, room.whole,
                lines.items, lines.count, lines.scored, lines.total,
            )  # fmt: skip
        return found


class _Room:
    """Arrays that one thread works in."""

    def __init__(self, table: Encoded, depth: int, n_fields: int) -> None:
        n_items = max(LANES, padded(table.n_items))
        most_words = word_count(int(table.item_count.max(initial=0))) + 1
        depth = max(1, depth)
        self.words = np.empty((depth, most_words * n_items), dtype=np.uint64)
        self.planes = np.empty((depth, most_words, padded(n_fields)), dtype=np.uint64)
        self.positions = np.empty((depth + 1, n_items), dtype=np.int32)
        self.sizes = np.empty((depth + 1, 2), dtype=np.int64)
        self.ranges = np.empty((n_items, 2), dtype=np.int64)
        self.mask = np.empty(word_count(table.n_rows) + 1, dtype=np.uint64)
        self.steps = np.empty((6, word_count(table.n_rows) + 1), dtype=np.uint64)
        at_once = min(n_items, max(1, CELLS_IN_CACHE // (n_fields * n_items)))
        self.cells = np.empty((at_once, n_fields, n_items), dtype=np.int64)
        self.chosen = np.empty(n_items + 1, dtype=np.int64)
        self.whole = np.empty(n_items, dtype=np.int64)
