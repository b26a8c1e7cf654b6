"""Joint counts by bit sets, projected onto the rows of each prefix (eight items a popcount).

Words lie word-major: words[w * width + j] holds rows 64 w to 64 w + 63 of item j, so that one word of a row of the
joint count meets the words of many items in one vector instruction. Below a prefix only its rows are left, moved
together (Hacker's Delight 7-4), and only the items that still have min_count of them.
"""

from __future__ import annotations

from collections import deque
from functools import cached_property
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from services.enumeration.bitset import pack, word_count
from services.enumeration.compiled import compiled, popcount
from services.enumeration.emission import Lines, frequent, sums_of, write
from services.enumeration.encoding import Encoded
from services.enumeration.request import Level, Request

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
def _project_rows(words: Any, width: int, n_words: int, mask: Any, chosen: Any, n_chosen: int, out: Any) -> int:
    """Columns `chosen` of `words`, with only the rows of `mask`, moved together; rows left."""
    steps = np.empty(6, dtype=np.uint64)
    to, offset, left = 0, 0, 0
    for w in range(n_words):
        inside = mask[w]
        ones = popcount(inside)
        if ones == 0:
            continue
        left += ones
        m, gaps = inside, ~inside << np.uint64(1)
        for s in range(6):
            parity = gaps
            for shift in range(6):
                parity ^= parity << np.uint64(1 << shift)
            moved = parity & m
            steps[s] = moved
            m = (m ^ moved) | (moved >> np.uint64(1 << s))
            gaps &= ~parity
        s0, s1, s2, s3, s4, s5 = steps[0], steps[1], steps[2], steps[3], steps[4], steps[5]
        source = words[w * width : (w + 1) * width]
        here = out[to * n_chosen : (to + 1) * n_chosen]
        over = offset + ones > 64
        after = out[(to + 1) * n_chosen : (to + 2) * n_chosen] if over else here
        up, down = np.uint64(offset), np.uint64((64 - offset) & 63)
        for j in range(n_chosen):
            x = source[chosen[j]] & inside
            t = x & s0
            x = (x ^ t) | (t >> np.uint64(1))
            t = x & s1
            x = (x ^ t) | (t >> np.uint64(2))
            t = x & s2
            x = (x ^ t) | (t >> np.uint64(4))
            t = x & s3
            x = (x ^ t) | (t >> np.uint64(8))
            t = x & s4
            x = (x ^ t) | (t >> np.uint64(16))
            t = x & s5
            x = (x ^ t) | (t >> np.uint64(32))
            here[j] = x if offset == 0 else here[j] | (x << up)
            if over:
                after[j] = x >> down
        offset += ones
        if offset >= 64:
            offset -= 64
            to += 1
    return left


@compiled
def _project(
    words: Any,
    planes: Any,
    positions: Any,
    width: int,
    n_words: int,
    at: int,
    first: int,
    min_count: int,
    counts: Any,
    chosen: Any,
    mask: Any,
    out_words: Any,
    out_planes: Any,
    out_positions: Any,
) -> tuple[int, int]:
    """Project columns first.. onto the rows of column `at`: (columns left, rows left)."""
    for j in range(width):
        counts[j] = 0
    tail = counts[first:width]
    for w in range(n_words):
        x = words[w * width + at]
        mask[w] = x
        line = words[w * width + first : (w + 1) * width]
        for j in range(len(line)):
            tail[j] += popcount(x & line[j])
    left = frequent(counts, first, width, min_count, chosen)
    for j in range(left):
        out_positions[j] = positions[chosen[j]]
    rows = _project_rows(words, width, n_words, mask, chosen, left, out_words)
    for p in range(len(planes)):
        counts[0] = 0  # the one column of a plane
        _project_rows(planes[p], 1, n_words, mask, counts, 1, out_planes[p])
    return left, rows


@compiled
def _add(words: Any, width: int, plane: Any, begin: int, end: int, i: int, low: int, high: int, counts: Any) -> None:
    out = counts[low:high]
    w = begin
    while w + 4 <= end:
        x0, x1 = words[w * width + i] & plane[w], words[(w + 1) * width + i] & plane[w + 1]
        x2, x3 = words[(w + 2) * width + i] & plane[w + 2], words[(w + 3) * width + i] & plane[w + 3]
        r0 = words[w * width + low : w * width + high]
        r1 = words[(w + 1) * width + low : (w + 1) * width + high]
        r2 = words[(w + 2) * width + low : (w + 2) * width + high]
        r3 = words[(w + 3) * width + low : (w + 3) * width + high]
        for j in range(len(out)):
            out[j] += popcount(x0 & r0[j]) + popcount(x1 & r1[j]) + popcount(x2 & r2[j]) + popcount(x3 & r3[j])
        w += 4
    while w < end:
        x = words[w * width + i] & plane[w]
        r = words[w * width + low : w * width + high]
        for j in range(len(out)):
            out[j] += popcount(x & r[j])
        w += 1


@compiled
def _add_two(
    words: Any,
    width: int,
    plane: Any,
    other: Any,
    begin: int,
    end: int,
    i: int,
    low: int,
    high: int,
    counts: Any,
    other_counts: Any,
) -> None:
    """`_add` for two planes, reading the words once."""
    out, out2 = counts[low:high], other_counts[low:high]
    w = begin
    while w + 4 <= end:
        x0, x1 = words[w * width + i], words[(w + 1) * width + i]
        x2, x3 = words[(w + 2) * width + i], words[(w + 3) * width + i]
        y0, y1, y2, y3 = x0 & other[w], x1 & other[w + 1], x2 & other[w + 2], x3 & other[w + 3]
        x0, x1, x2, x3 = x0 & plane[w], x1 & plane[w + 1], x2 & plane[w + 2], x3 & plane[w + 3]
        r0 = words[w * width + low : w * width + high]
        r1 = words[(w + 1) * width + low : (w + 1) * width + high]
        r2 = words[(w + 2) * width + low : (w + 2) * width + high]
        r3 = words[(w + 3) * width + low : (w + 3) * width + high]
        for j in range(len(out)):
            out[j] += popcount(x0 & r0[j]) + popcount(x1 & r1[j]) + popcount(x2 & r2[j]) + popcount(x3 & r3[j])
            out2[j] += popcount(y0 & r0[j]) + popcount(y1 & r1[j]) + popcount(y2 & r2[j]) + popcount(y3 & r3[j])
        w += 4
    while w < end:
        x = words[w * width + i]
        y = x & other[w]
        x &= plane[w]
        r = words[w * width + low : w * width + high]
        for j in range(len(out)):
            out[j] += popcount(x & r[j])
            out2[j] += popcount(y & r[j])
        w += 1


@compiled
def fill(
    words: Any,
    planes: Any,
    attribute: Any,
    item_ids: Any,
    prefixes: Any,
    unit: Any,
    must: Any,
    min_count: int,
    targets: Any,
    terms: Any,
    weights: Any,
    stack_words: Any,
    stack_planes: Any,
    stack_positions: Any,
    stack_sizes: Any,
    ranges: Any,
    mask: Any,
    cells: Any,
    chosen: Any,
    whole: Any,
    items: Any,
    count: Any,
    scored: Any,
    total: Any,
) -> int:
    """Slices of one work unit, in canonical order; how many there are.

    words: (W, I) uint64; planes: (F, W) uint64, the first all rows; attribute, item_ids: (I,) of the frequent items;
    prefixes: (P, d - 2) int32 positions of frequent items, sorted; unit: prefixes [0] to [1], and the rows of their
    joint counts that are of items [2] to [3]; must: the items [0] to [1] of which each slice holds one, or 0, 0;
    stack_*: the projection for each pair of the current prefix; cells: (rows at a time, F, I).
    """
    depth = prefixes.shape[1]
    n_fields = len(planes)
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
                n_words,
                here,
                first,
                min_count,
                whole,
                chosen,
                mask,
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
        _ranges(attribute, positions, width, must, held, ranges)
        some_words = flat if depth == 0 else stack_words[depth - 1]
        some_planes = planes if depth == 0 else stack_planes[depth - 1]
        step = max(4, WORDS_IN_CACHE // max(1, width))
        for begin in range(low, high, len(cells)):
            end = min(begin + len(cells), high)
            for i in range(begin, end):
                cells[i - begin, :, :width] = 0
            for first_word in range(0, n_words, step):
                last_word = min(first_word + step, n_words)
                for i in range(begin, end):
                    some = cells[i - begin]
                    a, b = ranges[i, 0], ranges[i, 1]
                    if a >= b:
                        continue
                    f = 0
                    while f + 2 <= n_fields:
                        _add_two(
                            some_words,
                            width,
                            some_planes[f],
                            some_planes[f + 1],
                            first_word,
                            last_word,
                            i,
                            a,
                            b,
                            some[f],
                            some[f + 1],
                        )
                        f += 2
                    if f < n_fields:
                        _add(some_words, width, some_planes[f], first_word, last_word, i, a, b, some[f])
            for i in range(begin, end):
                n_chosen = frequent(cells[i - begin, 0], ranges[i, 0], ranges[i, 1], min_count, chosen)
                if n_chosen:
                    at = write(
                        cells[i - begin], chosen, n_chosen, ids, prefix_ids, ids[i], targets, terms, weights,
                        whole, at, items, count, scored, total,
                    )  # fmt: skip
    return at


@compiled
def _ranges(attribute: Any, positions: Any, width: int, must: Any, held: bool, ranges: Any) -> None:
    """Columns [low, high) that each row of a joint count meets: later attributes, and `must` where not yet held."""
    low = np.searchsorted(positions[:width], must[0])
    high = np.searchsorted(positions[:width], must[1])
    after = width
    for i in range(width - 1, -1, -1):
        if i + 1 < width and attribute[positions[i + 1]] != attribute[positions[i]]:
            after = i + 1
        if held or low <= i < high:
            ranges[i, 0], ranges[i, 1] = after, width
        else:
            ranges[i, 0], ranges[i, 1] = max(after, low), high


class BitSets:
    """The table's bit sets, and room to project them in for each thread."""

    name = "bit sets"

    def __init__(self, table: Encoded, request: Request) -> None:
        self._table = table
        self._request = request
        self._sums = sums_of(table.columns, table.any_unscored, as_planes=True)
        self._idle: deque[_Room] = deque()
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
        projection = parents * level.items_after * 0.4 if level.depth > 2 else 0.0
        return projection + level.cells * (words * self._sums.n_fields * 0.13 + 1.0) + 300

    @cached_property
    def _packed(self) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
        table = self._table
        words = np.empty((word_count(table.n_rows), table.n_items), dtype=np.uint64)
        pack_items(table.codes, table.position, table.offsets, 0, len(words), words)
        planes = [np.ones(table.n_rows, dtype=np.bool_)]
        for column in table.columns:
            if column.scored is not None:
                planes.append(column.scored)
            planes += [(part.values >> p & 1).astype(np.bool_) for part in column.parts for p in part.planes]
        return words, pack(np.array(planes))

    def fill(self, prefixes: NDArray[np.int32], unit: NDArray[np.int64], lines: Lines) -> int:
        """The slices of one piece of work to `lines`; how many."""
        with self._packing:
            words, planes = self._packed
        try:
            room = self._idle.pop()
        except IndexError:
            room = _Room(self._table, self._request.max_depth - 2, self._sums.n_fields)
        table, sums = self._table, self._sums
        found: int = fill(
            words, planes, table.attribute, table.item_ids, prefixes, unit, self._request.must, self._request.min_count,
            sums.targets, sums.terms, sums.weights, room.words, room.planes, room.positions, room.sizes, room.ranges,
            room.mask, room.cells, room.chosen, room.whole, lines.items, lines.count, lines.scored, lines.total,
        )  # fmt: skip
        self._idle.append(room)
        return found


class _Room:
    """Arrays that one thread works in."""

    def __init__(self, table: Encoded, depth: int, n_fields: int) -> None:
        n_items = max(1, table.n_items)
        most_words = word_count(int(table.item_count.max(initial=0))) + 1
        depth = max(1, depth)
        self.words = np.empty((depth, most_words * n_items), dtype=np.uint64)
        self.planes = np.empty((depth, n_fields, most_words), dtype=np.uint64)
        self.positions = np.empty((depth + 1, n_items), dtype=np.int32)
        self.sizes = np.empty((depth + 1, 2), dtype=np.int64)
        self.ranges = np.empty((n_items, 2), dtype=np.int64)
        self.mask = np.empty(word_count(table.n_rows) + 1, dtype=np.uint64)
        at_once = min(n_items, max(1, CELLS_IN_CACHE // (n_fields * n_items)))
        self.cells = np.empty((at_once, n_fields, n_items), dtype=np.int64)
        self.chosen = np.empty(n_items + 1, dtype=np.int64)
        self.whole = np.empty(n_items, dtype=np.int64)
