"""Slices as a benchmark compares them: one key a slice, whatever the tool that found it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_STEP = 1 << 20  # slices mixed at once


@dataclass(frozen=True)
class Found:
    """S slices in any order: keys (S,) int64 (`keys_of`), count (S,) int64, total (S,) int64 sums of 0/1 or None."""

    keys: NDArray[np.int64]
    count: NDArray[np.int64]
    total: NDArray[np.int64] | None = None


@dataclass(frozen=True)
class Fingerprint:
    """How many slices, and 64-bit sums over mixed (key, count) and (key, total), so that the order does not matter."""

    slices: int
    counts: int
    totals: int | None

    def disagrees(self, other: Fingerprint) -> str | None:
        """What differs from `other`, or None; totals are compared where both have them."""
        if self.slices != other.slices:
            return f"{self.slices:,} slices against {other.slices:,}"
        if self.counts != other.counts:
            return "the same number of slices, but other slices or counts"
        if self.totals is not None and other.totals is not None and self.totals != other.totals:
            return "the same slices and counts, but other sums of scores"
        return None


def keys_of(items: NDArray[np.integer], n_items: int) -> NDArray[np.int64]:
    """Keys (S,) int64 of slices given as items (S, D), each line ascending and padded with -1 at its end."""
    if (n_items + 1) ** items.shape[1] >= 1 << 63:
        raise ValueError(f"{items.shape[1]} items of {n_items} do not fit a 64-bit key")
    keys = np.zeros(len(items), dtype=np.int64)
    for column in items.T:
        keys *= n_items + 1
        keys += column
        keys += 1
    return keys


def items_of(keys: NDArray[np.int64], n_items: int, max_depth: int) -> NDArray[np.int64]:
    """Items (S, D) of slices given by their keys: `keys_of` undone."""
    places = (n_items + 1) ** np.arange(max_depth - 1, -1, -1, dtype=np.int64)
    return keys[:, None] // places % (n_items + 1) - 1


def ascending(items: NDArray[np.integer]) -> NDArray[np.int64]:
    """Lines of `items` (S, D), padded with -1 anywhere, sorted with the padding at the end."""
    last = np.iinfo(np.int64).max
    lines = np.sort(np.where(items < 0, last, items.astype(np.int64)), axis=1)
    return np.where(lines == last, -1, lines)


def fingerprint(found: Found) -> Fingerprint:
    """The fingerprint of `found`; two tools agree on every slice and count when theirs are equal."""
    counts = totals = 0
    for at in range(0, len(found.keys), _STEP):
        some = slice(at, at + _STEP)
        mixed = _mix(found.keys[some].astype(np.uint64))
        counts += int(_mix(mixed + found.count[some].astype(np.uint64)).sum(dtype=np.uint64))
        if found.total is not None:
            totals += int(_mix(mixed + found.total[some].astype(np.uint64)).sum(dtype=np.uint64))
    wrap = (1 << 64) - 1
    return Fingerprint(len(found.keys), counts & wrap, None if found.total is None else totals & wrap)


def _mix(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64: every bit of a word moves every bit of the result."""
    words = words + np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
