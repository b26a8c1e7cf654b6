"""Scores as whole numbers, so that sums are exact and do not depend on the order of the rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_NANO_BITS = 29  # with these and log2(N) more, rounding N scores costs a sum at most 2**-30, a billionth
_LOW_BITS = 16  # of a column that one 63-bit sum cannot hold
_AT_ONCE = 1 << 14
_EXACT_BITS = 10  # scores that are multiples of 2**-10 are looked for: 0/1, halves, quarters, …


@dataclass(frozen=True)
class Part:
    """Whole numbers (N,) below 2**bits, int64 or for one bit uint8; times `weight` they are a part of the score."""

    values: NDArray[np.integer]
    bits: int
    weight: float

    @property
    def planes(self) -> list[int]:
        """The bits that some value has, high to low."""
        used = int(np.bitwise_or.reduce(self.values, initial=0))
        return [p for p in range(self.bits - 1, -1, -1) if used >> p & 1]


@dataclass(frozen=True)
class ScoreColumn:
    """One score column: the rows that have a score (N,) bool, None when all have, and the parts of the scores."""

    scored: NDArray[np.bool_] | None
    parts: tuple[Part, ...]


def score_columns(scores: NDArray[np.float64] | None) -> list[ScoreColumn]:
    """(N, K) scores in [0, 1] with NaN for "not scored", as whole numbers."""
    return [] if scores is None else [_column(scores[:, k]) for k in range(scores.shape[1])]


def _column(scores: NDArray[np.float64]) -> ScoreColumn:
    known = ~np.isnan(scores)
    values = np.where(known, scores, 0.0)
    room = 62 - len(scores).bit_length()
    fine = _NANO_BITS + len(scores).bit_length()
    fraction = 0 if _whole(values, 0) else _EXACT_BITS if _whole(values, _EXACT_BITS) else fine
    scored = None if known.all() else known
    if fraction == 0:
        return ScoreColumn(scored, (Part(values.astype(np.uint8), 1, 1.0),))
    if fraction <= room:
        values *= 2.0**fraction
        return ScoreColumn(scored, (_part(np.rint(values, out=values), fraction + 1, 2.0**-fraction),))
    # Two sums where one would not fit: the score to room bits, and what that leaves to _LOW_BITS more.
    high = np.floor(values * 2.0**room)
    low = np.rint((values * 2.0**room - high) * 2.0**_LOW_BITS)
    return ScoreColumn(
        scored, (_part(high, room + 1, 2.0**-room), _part(low, _LOW_BITS + 1, 2.0 ** -(room + _LOW_BITS)))
    )


def _part(values: NDArray[np.float64], bits: int, weight: float) -> Part:
    """The part of whole `values`, in their own memory: a million rows take 8 MB."""
    whole = values.view(np.int64)
    for start in range(0, len(values), _AT_ONCE):
        whole[start : start + _AT_ONCE] = values[start : start + _AT_ONCE].astype(np.int64)
    return Part(whole, bits, weight)


def _whole(values: NDArray[np.float64], bits: int) -> bool:
    """Whether all are multiples of 2**-bits; looked at in pieces, so that none is copied as a whole."""
    pieces = (values[start : start + _AT_ONCE] * 2.0**bits for start in range(0, len(values), _AT_ONCE))
    return all((piece == np.rint(piece)).all() for piece in pieces)
