"""Intervals of paired means: the same instances scored before and after."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shared.intervals import Z95


@dataclass(frozen=True)
class Change:
    """Mean change of a score and its 95% interval, each in [-1, 1]."""

    mean: float
    low: float
    high: float


def paired_change(before: npt.NDArray[np.float64], after: npt.NDArray[np.float64]) -> Change:
    """The mean of `after` less `before`, both (n,) scores in [0, 1] of the same instances, n >= 1, with its interval.

    The interval is that of Agresti and Min (2005) for matched pairs: the four answers that a pair can give (better,
    worse, and twice the same) are each counted half a time more, so that few instances, or none that changed, do not
    look certain. Scores between 0 and 1 vary less than such answers, so that for them it is wide rather than narrow.
    """
    change = after - before
    n = len(change) + 2.0
    middle = float(change.sum()) / n
    half = Z95 * np.sqrt(max((float((change**2).sum()) + 1.0) / n - middle**2, 0.0) / n)
    mean = float(change.mean())
    return Change(mean, max(-1.0, min(mean, middle - half)), min(1.0, max(mean, middle + half)))
