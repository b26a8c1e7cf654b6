"""Joint counts of items below a prefix by bit sets: what is counted, and what follows from the rest.

Where every row has a tag of an attribute, one tag need not be counted: it has what the others leave of the whole (Moore
& Lee 1998). So the last tag of each attribute is left out of the rows of a joint count, and where prefixes that differ
only in the tag of one attribute are counted together, its most common tag is left out, which has most of the rows.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from services.enumeration.compiled import compiled, inlined
from services.enumeration.emission import u64
from services.enumeration.vector import LANES, less, meet

WORDS_IN_CACHE = 1 << 12  # words that one sweep over the rows of a joint count reads: 32 kilobytes


@compiled
def after(attribute: Any, positions: Any, a: int) -> int:
    """The first of `positions`, ascending, that is of a later attribute than `a`."""
    first = 0
    while first < len(positions) and attribute[positions[first]] <= a:
        first += 1
    return first


@compiled
def end_of_tags(attribute: Any, prefixes: Any, p: int, stop: int) -> int:
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
def most_common(positions: Any, items: Any, totals: Any, row_bits: int, n_rows: int) -> int:
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
    attribute: Any, positions: Any, low: int, high: int, ranges: Any, totals: Any, totals_at: int, row_bits: int,
    n_rows: int, counted: Any, left_out: Any,
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
            rows += totals[totals_at + end] & row_bits
            end += 1
        if end > start + 1 and rows == n_rows and ranges[end - 1, 0] < ranges[end - 1, 1]:
            n_counted -= 1
            left_out[n_left_out] = end - 1
            n_left_out += 1
        start = end
    return n_counted, n_left_out


@inlined
def count_pairs(
    words: Any, stride: int, n_words: int, half: int, planes: Any, n_fields: int, attribute: Any, positions: Any,
    skipped: int, low: int, high: int, ranges: Any, totals: Any, totals_at: int, totals_field: int, row_bits: int,
    n_rows: int, masked: Any, counted: Any, left_out: Any, cells: Any, origin: int, width: int, field: int,
) -> None:  # fmt: skip
    """Joint counts of rows low to high - 1 with the columns in `ranges`, of row i and column j at origin + i * width +
    j of flat `cells`, and those of the next field `field` further.

    words: from column `skipped` on, a multiple of LANES; totals: flat, of column j at totals_at + j, and of the next
    field totals_field further; n_rows: rows there are; masked: room for words; counted, left_out: room for row numbers.
    """
    n_counted, n_left_out = _divide(
        attribute, positions, low, high, ranges, totals, totals_at, row_bits, n_rows, counted, left_out
    )
    step = max(4, WORDS_IN_CACHE // max(1, stride))
    for word in range(0, n_words, step):
        n, at = min(step, n_words - word), word * stride - skipped
        first_half = half - word if word < half <= word + n else 0
        for f in range(n_fields):
            rows, rows_at = words, at
            if f:
                rows, rows_at = masked, -skipped
                for w in range(n):
                    plane, to = planes[word + w, f - 1], w * stride
                    for i in range(low, high):
                        masked[u64(to + i - skipped)] = words[u64(at + to + i)] & plane
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
            less(
                cells, origin + f * field + i * width, width, i - first, 0, totals, totals_at + f * totals_field,
                ranges[i, 0], ranges[i, 1],
            )  # fmt: skip


@inlined
def take_away(
    cells: Any, n_fields: int, origin: int, width: int, field: int, to: int, n: int, low: int, high: int, ranges: Any,
    whole: Any, stride: int, n_lines: int,
) -> None:  # fmt: skip
    """Joint count `to` of n, one behind another in `cells`, as `count_pairs` leaves them: what the others leave of the
    whole, of which row i of field f is at (f * n_lines + i) * stride.
    """
    each = n_fields * field
    for f in range(n_fields):
        for i in range(low, high):
            less(
                cells, origin + to * each + f * field + i * width, each, to, n - to - 1, whole,
                (f * n_lines + i) * stride, ranges[i, 0], ranges[i, 1],
            )  # fmt: skip
