"""Sets of rows as bits: 64 rows a word, one set a line (m, w) uint64. Bits past the last row are zero."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint64]

_EXACT_IN_FLOAT32 = 1 << 24
_NANO_BITS = 30  # rounding a score may cost a sum over the whole table at most 2**-31, half a billionth
_MANTISSA_BITS = 52


def word_count(n_rows: int) -> int:
    """Words that hold `n_rows` bits."""
    return -(-n_rows // 64)


def pack(member: NDArray[np.bool_]) -> Words:
    """Pack `member` (m, n) bool into (m, ceil(n / 64)) words."""
    packed = np.packbits(member, axis=1, bitorder="little")
    padded = np.zeros((member.shape[0], word_count(member.shape[1]) * 8), dtype=np.uint8)
    padded[:, : packed.shape[1]] = packed
    return padded.view(np.uint64)


def popcount(words: Words) -> NDArray[np.int64]:
    """Rows in each set: (m, w) words to (m,) counts."""
    ones = np.bitwise_count(words)
    if words.shape[1] * 64 > _EXACT_IN_FLOAT32:
        return np.asarray(ones.sum(axis=1, dtype=np.int64))
    # A matrix-vector product adds short lines four times faster than sum(); whole numbers below 2**24 stay exact.
    return np.asarray(ones.astype(np.float32) @ np.ones(words.shape[1], dtype=np.float32)).astype(np.int64)


class ScorePlanes:
    """K score columns as fixed-point bit planes, so that sums over sets of rows are popcounts.

    A score is rounded to a multiple of 2**-b, with b such that a sum over all rows is off by less than 1e-9.
    Only planes with a bit set are kept: a 0/1 column has one, and its sums are exact. A sum depends on the set alone,
    not on the order of the rows, so slices of equal extent have bit for bit equal sums.
    """

    def __init__(self, scores: NDArray[np.float64]) -> None:
        """`scores` is (N, K) float64 in [0, 1], NaN where a row is not scored."""
        self._bits = min(_NANO_BITS + scores.shape[0].bit_length(), _MANTISSA_BITS)
        self._scored = ~np.isnan(scores)
        self._fixed = np.rint(np.where(self._scored, scores, 0.0) * 2.0**self._bits).astype(np.int64)

    def on(self, rows: NDArray[np.int64] | None) -> list[ScoreColumn]:
        """The columns over `rows` (n,) in that order; over all rows when None."""
        fixed = self._fixed if rows is None else self._fixed[rows]
        scored = self._scored if rows is None else self._scored[rows]
        return [self._column(fixed[:, k], scored[:, k]) for k in range(fixed.shape[1])]

    def _column(self, fixed: NDArray[np.int64], scored: NDArray[np.bool_]) -> ScoreColumn:
        used = int(np.bitwise_or.reduce(fixed, initial=0))
        planes = [p for p in range(self._bits, -1, -1) if used >> p & 1]
        member = np.array([fixed >> p & 1 for p in planes], dtype=np.bool_).reshape(len(planes), fixed.size)
        return ScoreColumn(
            scored=None if scored.all() else pack(scored[None])[0],
            planes=list(zip([2.0 ** (p - self._bits) for p in planes], pack(member), strict=True)),
        )


class ScoreColumn:
    """One score column over the rows that a block of sets is packed on."""

    def __init__(self, scored: Words | None, planes: list[tuple[float, Words]]) -> None:
        self._scored = scored
        self._planes = planes

    def count(self, words: Words, sizes: NDArray[np.int64]) -> NDArray[np.int64]:
        """Scored rows of each set; `sizes` (m,) are the sets' row counts."""
        return sizes if self._scored is None else popcount(words & self._scored)

    def total(self, words: Words) -> NDArray[np.float64]:
        """Sum of the scores over each set: (m, w) words to (m,) float64."""
        out = np.zeros(words.shape[0])
        for weight, plane in self._planes:
            out += weight * popcount(words & plane)
        return out
