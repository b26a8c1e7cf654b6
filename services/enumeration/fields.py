"""Count and sums of scores of a row in as few 64-bit words as hold them, so that one addition adds them all."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from services.enumeration.compiled import compiled
from services.enumeration.encoding import Encoded


def field_values(table: Encoded) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(F - 1, N) whole numbers of each score column: whether there is a score, and the score's parts. Field 0, which is
    1 for every row, is left out. Beside them the largest value of each field (F,).
    """
    values: list[NDArray[np.integer]] = []
    for column in table.columns:
        if column.scored is not None:
            values.append(column.scored.astype(np.int64))
        values += [part.values for part in column.parts]
    most = np.array([1, *(column.max(initial=1) for column in values)])
    if len(values) == 1:
        return values[0].astype(np.int64, copy=False)[None], most  # copied only where narrower: a million take 8 MB
    return np.array(values, dtype=np.int64).reshape(len(values), table.n_rows), most


@compiled
def _bits(number: int) -> int:
    bits = 0
    while number > 0:
        number >>= 1
        bits += 1
    return bits


@compiled
def assign_words(most: Any, n: int, places: Any) -> int:
    """Places (F, 3) of fields whose values are at most `most` (F,), for sums over n rows: word, shift and bits.

    Returns the number of words.
    """
    n_words, row_bits = 0, _bits(n)
    used = np.zeros(len(most), dtype=np.int64)
    for f in range(len(most)):
        bits = max(1, row_bits + _bits(most[f] - 1))
        word = 0
        while used[word] + bits > 64:
            word += 1
        places[f, 0], places[f, 1], places[f, 2] = word, used[word], bits
        used[word] += bits
        n_words = max(n_words, word + 1)
    return n_words


@compiled
def row_words(values: Any, places: Any, extent: Any, begin: int, n: int, words: Any) -> None:
    """Words (W, n) of the rows `extent`, of n from `begin` where empty, from values (F - 1, N): see `field_values`."""
    words[places[0, 0], :n] = np.uint64(1) << np.uint64(places[0, 1])
    for f in range(1, len(places)):
        out, source, shift = words[places[f, 0]], values[f - 1], places[f, 1]
        fresh = shift == 0
        for r in range(n):
            value = np.uint64(source[extent[r]] if len(extent) else source[begin + r]) << np.uint64(shift)
            out[r] = value if fresh else out[r] | value


@compiled
def unpack(words: Any, places: Any, first: int, low: int, high: int, cells: Any) -> None:
    """Fields of words (W, width) to cells (F, width), between columns low and high: field 0, or those from `first`."""
    for f in range(first, len(places) if first else 1):
        source, out = words[places[f, 0]], cells[f]
        shift, mask = np.uint64(places[f, 1]), ~np.uint64(0) >> np.uint64(64 - places[f, 2])
        for j in range(low, high):
            out[j] = np.int64(source[j] >> shift & mask)
