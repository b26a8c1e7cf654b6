"""Joint counts by bit sets, projected onto the rows of each prefix (eight items a popcount).

Words lie word-major: words[w * stride + j] holds rows 64 w to 64 w + 63 of item j, so that one word of a row of the
joint count meets the words of many items in one vector instruction. Below a prefix only its rows are left, moved
together (Hacker's Delight 7-4).

Where every row has a tag of an attribute, one tag need not be counted: it has what the others leave of the whole (Moore
& Lee 1998). So the last tag of each attribute is left out of the rows of a joint count, and where prefixes that differ
only in the tag of one attribute are counted together, its most common tag is left out, which has most of the rows.

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
from services.enumeration.compiled import compiled, inlined, popcount
from services.enumeration.emission import Lines, frequent, sums_of, u64, write
from services.enumeration.encoding import Encoded
from services.enumeration.level import Level, Plan, ranges_of, runs
from services.enumeration.vector import (
    COUNTS_VECTORS,
    HALF,
    LANES,
    equal,
    less,
    meet,
    move_together,
    padded,
    put_frequent,
)
from services.enumeration.work_units import Idle, in_parts

WORDS_IN_CACHE = 1 << 12  # words that one sweep over the rows of a joint count reads: 32 kilobytes
CELLS_AT_ONCE = 1 << 16  # of a joint count that are counted at once where prefixes are counted one by one
MOST_BYTES = 64 << 20  # of bit sets of the whole table
MOST_BLOCK_BYTES = 16 << 20  # of one thread's joint counts
MOST_SLICES = 1 << 18  # below prefixes that are counted together
CELL_WORD_NS = 0.03 if COUNTS_VECTORS else 0.17  # about, to meet a word of one item with a word of another

ROW_BITS = (1 << HALF) - 1  # those of half a cell

_padded: Any = compiled(padded)


@compiled
def pack_items(
    codes: Any, order: Any, n_first: int, half: int, attribute: Any, item_ids: Any, offsets: Any, begin: int, end: int,
    words: Any,
) -> None:  # fmt: skip
    """Bit sets of frequent items, words (W, stride) from begin to end - 1; codes: (N, A); order: (N,) rows as they
    come, of which n_first have the first `half` words to themselves.
    """
    n_rows, n_attributes = codes.shape
    some = np.zeros((n_attributes, 64), dtype=codes.dtype)  # 64 rows, an attribute a line
    for w in range(begin, end):
        first = 64 * w if w < half else n_first + 64 * (w - half)
        n = min(64, (n_first if w < half else n_rows) - first)
        for k in range(n):
            row = order[u64(first + k)]
            for a in range(n_attributes):
                some[u64(a), u64(k)] = codes[u64(row), u64(a)]
        inside = ~np.uint64(0) >> np.uint64(64 - n)
        line = words[w]
        for j in range(len(item_ids)):
            a = attribute[j]
            line[j] = equal(some, a, item_ids[j] - offsets[a]) & inside
        for j in range(len(item_ids), len(line)):
            line[j] = 0


@inlined
def _plan_moves(mask: Any, n_words: int, steps: Any, left: Any, gaps: Any) -> None:
    """What moves by 1, 2, 4, … 32 when the bits of each mask word move together at the low end: steps (6, W)."""
    for w in range(n_words):
        left[w], gaps[w] = mask[w], ~mask[w] << np.uint64(1)
    for s in range(6):
        out, far = steps[s], np.uint64(1 << s)
        for w in range(n_words):
            parity = gaps[w]
            parity ^= parity << np.uint64(1)
            parity ^= parity << np.uint64(2)
            parity ^= parity << np.uint64(4)
            parity ^= parity << np.uint64(8)
            parity ^= parity << np.uint64(16)
            parity ^= parity << np.uint64(32)
            m = left[w]
            moved = parity & m
            out[w] = moved
            left[w] = (m ^ moved) | (moved >> far)
            gaps[w] &= ~parity


@compiled
def _choose(
    words: Any, stride: int, n_words: int, at: int, first: int, width: int, min_count: int, row: Any, counts: Any,
    chosen: Any,
) -> int:  # fmt: skip
    """Columns first.. with at least min_count rows of column `at`; how many."""
    row[0] = at
    low = first // LANES * LANES
    meet(words, 0, stride, words, 0, stride, n_words, 0, True, row, 0, (0,), low, width, counts, 0, 0)
    found: int = frequent(counts, first, width, min_count, chosen)
    return found


@inlined
def _project(
    words: Any, stride: int, n_words: int, half: int, planes: Any, at: int, chosen: Any, left: int, mask: Any,
    steps: Any, some: Any, gaps: Any, line: Any, out_words: Any, out_stride: int, out_planes: Any, size: Any,
) -> None:  # fmt: skip
    """The `left` columns `chosen`, and only the rows of column `at`, in words of `out_stride`; their `size`."""
    for w in range(n_words):
        mask[w] = words[w * stride + at]
    _plan_moves(mask, n_words, steps, some, gaps)
    together = left > 0 and chosen[left - 1] - chosen[0] == left - 1  # they lie side by side
    flat_planes, planes_out = planes.reshape(planes.size), out_planes.reshape(out_planes.size)
    plane_stride = planes.shape[1]
    to, offset, rows, half_to = 0, 0, 0, 0
    for w in range(n_words):
        if w == half and half:
            to, offset = to + (offset > 0), 0
            half_to = to
        inside = mask[w]
        ones = popcount(inside)
        if ones == 0:
            continue
        rows += ones
        over = offset + ones > 64
        here, after = to * out_stride, (to + 1) * out_stride
        if together:
            for j in range(0, left, LANES):
                move_together(
                    words, w * stride + chosen[0] + j, inside, steps, w, offset, over, out_words, here + j, after + j
                )
        else:
            for j in range(left):
                line[j] = words[w * stride + chosen[j]]
            for j in range(0, left, LANES):
                move_together(line, j, inside, steps, w, offset, over, out_words, here + j, after + j)
        here, after = to * plane_stride, (to + 1) * plane_stride
        for j in range(0, plane_stride, LANES):
            move_together(
                flat_planes, w * plane_stride + j, inside, steps, w, offset, over, planes_out, here + j, after + j
            )
        offset += ones
        if offset >= 64:
            offset -= 64
            to += 1
    to += offset > 0
    size[0], size[1], size[2], size[3] = left, to, to if half == n_words else half_to, rows


@inlined
def _count_columns(
    words: Any, stride: int, n_words: int, half: int, planes: Any, n_fields: int, width: int, row: Any, every_row: Any,
    totals: Any, n_items: int,
) -> None:  # fmt: skip
    """Rows and sums of each column: totals, n_items a field; every_row: a word of ones."""
    row[0] = 0
    meet(every_row, 0, 0, words, 0, stride, n_words, half, True, row, 0, (0,), 0, width, totals, 0, n_items)
    if n_fields > 1:
        flat_planes = planes.reshape(planes.size)
        for f in range(1, n_fields):
            row[0] = f
            meet(
                flat_planes, -1, planes.shape[1], words, 0, stride, n_words, 0, True, row, 0, (0,), 0, width, totals, 0,
                n_items,
            )  # fmt: skip


@compiled
def count_columns(
    words: Any, stride: int, n_words: int, half: int, planes: Any, n_fields: int, width: int, row: Any, totals: Any
) -> None:
    """`_count_columns` of the whole table."""
    every_row = np.full(1, ~np.uint64(0))
    _count_columns(words, stride, n_words, half, planes, n_fields, width, row, every_row, totals, stride)


@inlined
def _below(
    words: Any, stride: int, n_words: int, half: int, planes: Any, n_fields: int, at: int, chosen: Any, left: int,
    mask: Any, steps: Any, some: Any, gaps: Any, line: Any, row: Any, every_row: Any, out_words: Any, out_planes: Any,
    totals: Any, n_items: int, size: Any,
) -> None:  # fmt: skip
    """`_project`, and the rows and sums of what it leaves."""
    stride_below = _padded(left)
    _project(
        words, stride, n_words, half, planes, at, chosen, left, mask, steps, some, gaps, line, out_words, stride_below,
        out_planes, size,
    )  # fmt: skip
    _count_columns(
        out_words, stride_below, size[1], size[2], out_planes, n_fields, left, row, every_row, totals, n_items
    )  # fmt: skip


@compiled
def _after(attribute: Any, positions: Any, a: int) -> int:
    """The first of `positions`, ascending, that is of a later attribute than `a`."""
    first = 0
    while first < len(positions) and attribute[positions[first]] <= a:
        first += 1
    return first


@compiled
def _end_of_tags(attribute: Any, prefixes: Any, p: int, stop: int) -> int:
    """The end of the prefixes from `p`, before `stop`, that differ only in the tag of their last attribute."""
    last = prefixes.shape[1] - 1
    end = p + 1
    while end < stop and attribute[prefixes[end, last]] == attribute[prefixes[p, last]]:
        for q in range(last):
            if prefixes[end, q] != prefixes[p, q]:
                return end
        end += 1
    return end


@compiled
def _most_common(positions: Any, items: Any, totals: Any, row_bits: int, n_rows: int) -> int:
    """Which of `items` has most rows; -1 where it is alone, or some of the `n_rows` have none of them."""
    most, most_rows, known = 0, 0, 0
    for k in range(len(items)):
        rows = totals[np.searchsorted(positions, items[k])] & row_bits
        known += rows
        if rows > most_rows:
            most, most_rows = k, rows
    return most if known == n_rows and len(items) > 1 else -1


@inlined
def _divide(
    attribute: Any, positions: Any, low: int, high: int, ranges: Any, totals: Any, row_bits: int, n_rows: int,
    counted: Any, left_out: Any,
) -> tuple[int, int]:  # fmt: skip
    """Rows low to high - 1 of a joint count that are counted, and those that follow from others; how many of each.

    The last of several tags of an attribute follows where all of these are there and hold all rows.
    """
    n_counted, n_left_out = 0, 0
    start = low
    while start < high:
        a = attribute[positions[start]]
        end, rows = start, 0
        while end < high and attribute[positions[end]] == a:
            counted[n_counted] = end
            n_counted += ranges[end, 0] < ranges[end, 1]
            rows += totals[end] & row_bits
            end += 1
        if end > start + 1 and rows == n_rows and ranges[end - 1, 0] < ranges[end - 1, 1]:
            n_counted -= 1
            left_out[n_left_out] = end - 1
            n_left_out += 1
        start = end
    return n_counted, n_left_out


@inlined
def _count(
    words: Any, stride: int, n_words: int, half: int, planes: Any, n_fields: int, attribute: Any, positions: Any,
    low: int, high: int, ranges: Any, totals: Any, n_items: int, row_bits: int, n_rows: int, masked: Any, counted: Any,
    left_out: Any, cells: Any, origin: int, width: int, field: int,
) -> None:  # fmt: skip
    """Joint counts of rows low to high - 1 with the columns in `ranges`, of row i and column j at origin + i * width +
    j of flat `cells`, and those of the next field `field` further; totals: n_items a field; n_rows: rows there are;
    masked: room for words; counted, left_out: room for row numbers.
    """
    n_counted, n_left_out = _divide(
        attribute, positions, low, high, ranges, totals, row_bits, n_rows, counted, left_out
    )
    step = max(4, WORDS_IN_CACHE // max(1, stride))
    for word in range(0, n_words, step):
        n, at = min(step, n_words - word), word * stride
        first_half = half - word if word < half <= word + n else 0
        for f in range(n_fields):
            rows, rows_at = words, at
            if f:
                rows, rows_at = masked, 0
                for w in range(n):
                    plane, out = planes[word + w, f - 1], w * stride
                    for i in range(low, high):
                        masked[u64(out + i)] = words[u64(at + out + i)] & plane
            fresh, start = word == 0, origin + f * field
            r = 0
            while r + 4 <= n_counted:
                meet(
                    rows, rows_at, stride, words, at, stride, n, first_half, fresh, counted, r, (0, 0, 0, 0),
                    ranges[counted[r], 0] // LANES * LANES, ranges[counted[r + 3], 1], cells, start, width,
                )  # fmt: skip
                r += 4
            while r < n_counted:
                meet(
                    rows, rows_at, stride, words, at, stride, n, first_half, fresh, counted, r, (0,),
                    ranges[counted[r], 0] // LANES * LANES, ranges[counted[r], 1], cells, start, width,
                )  # fmt: skip
                r += 1
    for r in range(n_left_out):
        i = left_out[r]
        first = i
        while first > low and attribute[positions[first - 1]] == attribute[positions[i]]:
            first -= 1
        for f in range(n_fields):
            start = origin + f * field
            less(
                cells, start + i * width, totals, f * n_items, start + first * width, width, i - first, ranges[i, 0],
                ranges[i, 1],
            )  # fmt: skip


@compiled
def _emit_short(
    cells: Any, origin: int, width: int, field: int, low: int, high: int, ranges: Any, ids: Any, min_count: int,
    prefix: Any, weights: Any, shift: int, at: int, items: Any, each: Any, count: Any, total: Any,
) -> Any:  # fmt: skip
    """`_emit` by vectors, for lines of items as short as the tuple `each`; items, total: flat."""
    place = len(prefix) + 1
    common = np.int64(-1) << 16 * place << 16  # -1 for no item, 0 for two that are still to come
    for q in range(len(prefix)):
        common |= np.int64(prefix[q]) << 16 * q
    more = 0 if shift else field
    with_sums = len(weights) > 0
    weight = weights[0] if with_sums else 0.0
    for i in range(low, high):
        start = origin + i * width
        line = common | np.int64(ids[u64(i)]) << 16 * (place - 1)
        at = put_frequent(
            cells, start, start + more, ranges[u64(i), 0], ranges[u64(i), 1], min_count, line, ids, place, shift,
            with_sums, weight, at, items, each, count, total,
        )  # fmt: skip
    return at


@compiled
def _emit_long(
    joint: Any, origin: int, width: int, field: int, low: int, high: int, ranges: Any, ids: Any, min_count: int,
    prefix: Any, targets: Any, terms: Any, weights: Any, shift: int, chosen: Any, cells: Any, whole: Any, at: int,
    items: Any, count: Any, scored: Any, total: Any,
) -> Any:  # fmt: skip
    """`_emit` where there are several sums, or long lines of items."""
    row_bits = ROW_BITS if shift else -1
    for i in range(low, high):
        a, b = ranges[i, 0], ranges[i, 1]
        start = origin + i * width
        for f in range(cells.shape[0]):
            for j in range(a, b):
                if shift:
                    cells[f, j] = joint[u64(start + j)] >> (shift * f) & row_bits
                else:
                    cells[f, j] = joint[u64(start + f * field + j)]
        n_chosen = frequent(cells[0], a, b, min_count, chosen)
        if n_chosen:
            at = write(
                cells, chosen, n_chosen, ids, prefix, ids[i], targets, terms, weights,
                whole, at, items, count, scored, total,
            )  # fmt: skip
    return at


@inlined
def _emit(
    joint: Any, origin: int, width: int, field: int, low: int, high: int, ranges: Any, ids: Any, min_count: int,
    prefix: Any, targets: Any, terms: Any, weights: Any, short: int, shift: int, chosen: Any, cells: Any, whole: Any,
    at: int, items: Any, flat_items: Any, count: Any, scored: Any, total: Any, flat_total: Any,
) -> Any:  # fmt: skip
    """The frequent cells of rows low to high - 1 as slices from line `at`; the next free line; joint: as `_count`
    leaves it; short: items a line where these are short, or 0.
    """
    if short == 2:
        return _emit_short(
            joint, origin, width, field, low, high, ranges, ids, min_count, prefix, weights, shift, at, flat_items,
            (0, 0), count, flat_total,
        )  # fmt: skip
    if short == 3:
        return _emit_short(
            joint, origin, width, field, low, high, ranges, ids, min_count, prefix, weights, shift, at, flat_items,
            (0, 0, 0), count, flat_total,
        )  # fmt: skip
    if short == 4:
        return _emit_short(
            joint, origin, width, field, low, high, ranges, ids, min_count, prefix, weights, shift, at, flat_items,
            (0, 0, 0, 0), count, flat_total,
        )  # fmt: skip
    return _emit_long(
        joint, origin, width, field, low, high, ranges, ids, min_count, prefix, targets, terms, weights, shift, chosen,
        cells, whole, at, items, count, scored, total,
    )  # fmt: skip


@inlined
def _take_away(
    cells: Any, n_fields: int, to: int, n: int, ranges: Any, n_rows: int, whole: Any, stride: int, n_lines: int,
    first: int,
) -> None:  # fmt: skip
    """Joint count `to` of n, one behind another in `cells`: what the others leave of the whole, lines of `stride` and
    n_lines a field, from row and column `first`.
    """
    width = _padded(n_rows)
    each = n_fields * n_rows * width
    for f in range(n_fields):
        for i in range(n_rows):
            at = (f * n_rows + i) * width
            out = to * each + at
            whole_at = (f * n_lines + i + first) * stride + first
            less(cells, out, whole, whole_at, at, each, to, ranges[i, 0], n_rows)
            less(cells, out, cells, out, out + each, each, n - to - 1, ranges[i, 0], n_rows)


@compiled
def fill(
    words: Any, half: int, planes: Any, all_totals: Any, pairs: Any, n_rows: int, attribute: Any, item_ids: Any,
    prefixes: Any, unit: Any, together: bool, must: Any, min_count: int, targets: Any, terms: Any, weights: Any,
    short: int, shift: int, stack_words: Any, stack_planes: Any, stack_positions: Any, stack_sizes: Any,
    stack_totals: Any, base: Any, room: Any, ranges: Any, wanted: Any, mask: Any, steps: Any, left_bits: Any, gaps: Any,
    line: Any, masked: Any, cells: Any, counts: Any, counted: Any, left_out: Any, chosen: Any, whole: Any,
    items: Any, count: Any, scored: Any, total: Any,
) -> int:  # fmt: skip
    """Slices of one work unit, in canonical order; how many there are.

    words: (W, I or more) uint64; half: 0, or how many of these the rows with score 1 have to themselves; planes: (W,
    F - 1 or more) uint64, of all fields but the rows; all_totals: (F, I) rows and sums of each item; pairs: (F, I, I or
    more) joint counts of two items, filled here where prefixes are empty, or without lines; attribute, item_ids: (I,)
    of the frequent items; prefixes: (P, d - 2) int32 positions of these, sorted; unit: prefixes [0] to [1], and the
    rows of their joint counts that are of items [2] to [3]; together: whether prefixes that differ in the tag of their
    last attribute are counted together; must: items [0] to [1] of which each slice holds one, or 0 and 0; short: items
    a line where vectors of slices can be written, or 0; shift: HALF where rows and sums are the halves of a cell, or 0;
    stack_*: the projection for each pair of the current prefix; base: (F, I, I or more) joint counts below a prefix
    less its last pair; room: flat, for joint counts of as many rows as go in.
    """
    depth = prefixes.shape[1]
    n_fields, n_items = all_totals.shape
    n_lines = len(item_ids)
    every_row = np.full(1, ~np.uint64(0))
    flat_all, flat_pairs = all_totals.reshape(n_fields * n_items), pairs.reshape(pairs.size)
    flat_base = base.reshape(base.size)
    flat_items, flat_total = items.reshape(items.size), total.reshape(total.size)
    current = np.full(depth, -1, dtype=np.int32)
    prefix_ids = np.empty(depth, dtype=np.int32)
    ids = np.empty(_padded(len(item_ids)), dtype=np.int32)
    row = np.zeros(1, dtype=np.int64)
    everything = np.zeros(2, dtype=np.int64)
    for j in range(len(item_ids)):
        stack_positions[0, j] = j
    stack_sizes[0, 0], stack_sizes[0, 1], stack_sizes[0, 2], stack_sizes[0, 3] = len(item_ids), len(words), half, n_rows
    row_bits = ROW_BITS if shift else -1
    flat, all_stride = words.reshape(words.size), words.shape[1]
    based = False
    at = 0
    p = unit[0]
    while p < unit[1]:
        end = _end_of_tags(attribute, prefixes, p, unit[1]) if together else p + 1
        held = must[1] == 0
        changed = depth
        for q in range(depth - 1, -1, -1):
            item = prefixes[p, q]
            held |= must[0] <= item < must[1]
            if item != current[q]:
                changed = q
        if not held and depth and attribute[prefixes[p, depth - 1]] >= attribute[must[0]]:
            p = end
            continue  # what follows is of later attributes
        n_looked_up = depth - 1 if together else depth
        for q in range(changed, n_looked_up):
            item = prefixes[p, q]
            current[q] = item
            based = False
            width, n_words, n_first = stack_sizes[q, 0], stack_sizes[q, 1], stack_sizes[q, 2]
            positions = stack_positions[q]
            here = np.searchsorted(positions[:width], item)
            first = _after(attribute, positions[:width], attribute[item])
            above_words = flat if q == 0 else stack_words[q - 1]
            above_planes = planes if q == 0 else stack_planes[q - 1]
            stride = all_stride if q == 0 else _padded(width)
            left = _choose(above_words, stride, n_words, here, first, width, min_count, row, counts, chosen)
            for j in range(left):
                stack_positions[q + 1, j] = positions[chosen[j]]
            _below(
                above_words, stride, n_words, n_first, above_planes, n_fields, here, chosen, left, mask, steps,
                left_bits, gaps, line, row, every_row, stack_words[q], stack_planes[q], stack_totals[q], n_items,
                stack_sizes[q + 1],
            )  # fmt: skip
        q = n_looked_up
        width, n_words, n_first, rows = stack_sizes[q, 0], stack_sizes[q, 1], stack_sizes[q, 2], stack_sizes[q, 3]
        positions = stack_positions[q, :width]
        some_words = flat if q == 0 else stack_words[q - 1]
        some_planes = planes if q == 0 else stack_planes[q - 1]
        stride = all_stride if q == 0 else _padded(width)
        totals = flat_all if q == 0 else stack_totals[q - 1]
        for k in range(depth):
            prefix_ids[k] = item_ids[prefixes[p, k]]
        if not together:
            for j in range(width):
                ids[j] = item_ids[positions[j]]
            low, high = np.searchsorted(positions, unit[2]), np.searchsorted(positions, unit[3])
            ranges_of(attribute, positions, must, held, ranges)
            if depth == 0 and pairs.shape[1] > 0:
                ranges_of(attribute, positions, everything, True, wanted)
                _count(
                    some_words, stride, n_words, n_first, some_planes, n_fields, attribute, positions, low, high,
                    wanted, totals, n_items, row_bits, rows, masked, counted, left_out, flat_pairs, 0, n_items,
                    n_lines * n_items,
                )  # fmt: skip
                at = _emit(
                    flat_pairs, 0, n_items, n_lines * n_items, low, high, ranges, ids, min_count, prefix_ids, targets,
                    terms, weights, short, shift, chosen, cells, whole, at, items, flat_items, count, scored, total,
                    flat_total,
                )  # fmt: skip
                p = end
                continue
            step = max(1, min(high - low, len(room) // max(1, n_fields * stride)))
            for begin in range(low, high, step):
                stop, origin, field = min(begin + step, high), -begin * stride, step * stride
                _count(
                    some_words, stride, n_words, n_first, some_planes, n_fields, attribute, positions, begin, stop,
                    ranges, totals, n_items, row_bits, rows, masked, counted, left_out, room, origin, stride, field,
                )  # fmt: skip
                at = _emit(
                    room, origin, stride, field, begin, stop, ranges, ids, min_count, prefix_ids, targets, terms,
                    weights, short, shift, chosen, cells, whole, at, items, flat_items, count, scored, total,
                    flat_total,
                )  # fmt: skip
            p = end
            continue
        if q and not based:
            based = True
            ranges_of(attribute, positions, everything, True, wanted)
            _count(
                some_words, stride, n_words, n_first, some_planes, n_fields, attribute, positions, 0, width, wanted,
                totals, n_items, row_bits, rows, masked, counted, left_out, flat_base, 0, n_items, n_lines * n_items,
            )  # fmt: skip
        whole_counts = flat_base if q else flat_pairs
        first = _after(attribute, positions, attribute[prefixes[p, depth - 1]])
        left = width - first
        for j in range(left):
            chosen[j] = first + j
            ids[j] = item_ids[positions[first + j]]
        below = positions[first:]
        stride_below = _padded(left)
        field = left * stride_below
        ranges_of(attribute, below, everything, True, wanted)
        tags = prefixes[p:end, depth - 1]
        most = _most_common(positions, tags, totals, row_bits, rows)
        for k in range(len(tags)):
            if k == most:  # has what the others leave
                continue
            here, size = np.searchsorted(positions, tags[k]), stack_sizes[q + 1]
            _below(
                some_words, stride, n_words, n_first, some_planes, n_fields, here, chosen, left, mask, steps, left_bits,
                gaps, line, row, every_row, stack_words[q], stack_planes[q], stack_totals[q], n_items, size,
            )  # fmt: skip
            _count(
                stack_words[q], stride_below, size[1], size[2], stack_planes[q], n_fields, attribute, below, 0, left,
                wanted, stack_totals[q], n_items, row_bits, size[3], masked, counted, left_out, room,
                k * n_fields * field, stride_below, field,
            )  # fmt: skip
        if most >= 0:
            _take_away(room, n_fields, most, len(tags), wanted, left, whole_counts, n_items, n_lines, first)
        ranges_of(attribute, below, must, held, ranges)
        for k in range(len(tags)):
            prefix_ids[depth - 1] = item_ids[tags[k]]
            at = _emit(
                room, k * n_fields * field, stride_below, field, 0, left, ranges, ids, min_count, prefix_ids, targets,
                terms, weights, short, shift, chosen, cells, whole, at, items, flat_items, count, scored, total,
                flat_total,
            )  # fmt: skip
        p = end
    return at


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
        return 0.45 if self._sums.plain else 5.0 + 2.5 * (self._sums.n_fields - 1)

    def _count_ns(self, words: NDArray[np.float64]) -> NDArray[np.float64]:
        """About, to count a cell of so many words."""
        return self._n_fields * (words * CELL_WORD_NS + 0.45)

    def _one_by_one(self, level: Level) -> Plan:
        words, parents = level.rows / 64 + 1, level.parent_rows / 64 + 1
        projection = np.zeros(len(words))
        if level.depth > 2:
            projection = parents * (level.parent_items * 2 * CELL_WORD_NS + level.items_after * 0.4 + 7) + 600
        return Plan(None, projection + level.cells * (self._count_ns(words) + self._slice_ns) + 300)

    def _all_tags(self, level: Level) -> list[Plan]:
        """One plan, or none where a count would yield too many slices at once."""
        last = self._table.attribute[level.prefixes[:, -1]]
        together = runs(level, last)
        if np.add.reduceat(level.most_slices, together[:-1]).max() > MOST_SLICES:
            return []
        group = np.repeat(np.arange(len(together) - 1), np.diff(together))
        known, most = np.add.reduceat(level.rows, together[:-1]), np.maximum.reduceat(level.rows, together[:-1])
        left_out = (level.rows == most[group]) & (known[group] == level.parent_rows)
        words, parents = level.rows / 64 + 1, level.parent_rows / 64 + 1
        projection = parents * (level.parent_items * 0.4 + 7) + 500
        follows = level.parent_cells * self._n_fields * 0.5
        cost = np.where(left_out, follows, projection + level.parent_cells * 0.8 * self._count_ns(words))
        return [Plan(together, cost + level.parent_cells * 0.1 + level.cells * self._slice_ns + 300)]

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
        table, sums = self._table, self._sums
        together = self.together(level) is not None
        short = lines.items.shape[1] if sums.plain and lines.short else 0
        with self._rooms.one() as room:
            found: int = fill(
                *self._packed, table.attribute, table.item_ids, level.prefixes, unit, together, level.must,
                level.min_count, sums.targets, sums.terms, sums.weights, short, HALF * self._halves, *room,
                lines.items, lines.count, lines.scored, lines.total,
            )  # fmt: skip
        if level.depth == 2:
            with self._lock:
                self._rows_of_pairs += min(int(unit[3]), table.n_items) - int(unit[2])
        return found

    def _room(self, depth: int) -> tuple[NDArray[Any], ...]:
        """Arrays that one thread works in, as `fill` takes them; what is not used takes no memory."""
        table, n_fields, fits_together = self._table, self._n_fields, self._fits_together
        n_items = max(LANES, padded(table.n_items))
        n_words = word_count(table.n_rows) + 2
        most_words = word_count(int(table.item_count.max(initial=0))) + 2
        widest = int(table.widths.max(initial=1)) if fits_together else 1
        n_cells = widest * n_items**2 if fits_together else max(CELLS_AT_ONCE // n_fields, n_items)
        return (
            np.empty((depth, most_words * n_items + LANES), dtype=np.uint64),
            np.empty((depth, most_words, padded(n_fields - 1)), dtype=np.uint64),
            np.empty((depth + 1, n_items), dtype=np.int32),
            np.empty((depth + 1, 4), dtype=np.int64),
            np.empty((depth, n_fields * n_items), dtype=np.int32),
            _room_for_joint(n_fields, n_items if fits_together else 0, n_items),
            np.empty(n_fields * n_cells, dtype=np.int32),
            np.empty((n_items, 2), dtype=np.int64),
            np.empty((n_items, 2), dtype=np.int64),
            np.empty(n_words, dtype=np.uint64),
            np.empty((6, n_words), dtype=np.uint64),
            np.empty(n_words, dtype=np.uint64),
            np.empty(n_words, dtype=np.uint64),
            np.empty(n_items, dtype=np.uint64),
            np.empty(max(WORDS_IN_CACHE, 4 * n_items), dtype=np.uint64),
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
