"""Bit sets of the items of a table, and those of the rows that have an item, moved together (Hacker's Delight 7-4).

Words lie word-major: words[w * stride + j] holds rows 64 w to 64 w + 63 of item j, so that one word of a row of a joint
count meets the words of many items in one vector instruction.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from services.enumeration.compiled import compiled, inlined, popcount
from services.enumeration.emission import frequent, u64
from services.enumeration.vector import LANES, equal, meet, move_together, padded

padded_in_kernel: Any = compiled(padded)


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
def choose(
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
def project(
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
def below(
    words: Any, stride: int, n_words: int, half: int, planes: Any, n_fields: int, at: int, chosen: Any, left: int,
    mask: Any, steps: Any, some: Any, gaps: Any, line: Any, row: Any, every_row: Any, out_words: Any, out_planes: Any,
    totals: Any, n_items: int, size: Any,
) -> None:  # fmt: skip
    """`project`, and the rows and sums of what it leaves."""
    stride_below = padded_in_kernel(left)
    project(
        words, stride, n_words, half, planes, at, chosen, left, mask, steps, some, gaps, line, out_words, stride_below,
        out_planes, size,
    )  # fmt: skip
    _count_columns(
        out_words, stride_below, size[1], size[2], out_planes, n_fields, left, row, every_row, totals, n_items
    )  # fmt: skip
