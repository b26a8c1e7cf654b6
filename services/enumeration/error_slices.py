"""The slices on which a model fails, among all that were enumerated (paper 4.1.4 post-processing, 5.3)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from services.enumeration.lattice import Items, Slices
from shared.intervals import wilson_interval


@dataclass(frozen=True)
class ErrorSlices:
    """E error slices in rank order: worst mean first, then larger count, then fewer pairs, then canonical order.

    index: (E,) int64, positions in the Slices they come from.
    mean: (E,) mean score of the slice's scored instances.
    drop: (E,) overall mean less the slice's mean.
    parent_drop: (E,) lowest mean among the parents less the slice's mean.
    error_share: (E,) the slice's part of all lost score, the sum of 1 - score.
    interval_low, interval_high: (E,) 95% Wilson interval of the mean (see `wilson_interval`).
    """

    index: NDArray[np.int64]
    mean: NDArray[np.float64]
    drop: NDArray[np.float64]
    parent_drop: NDArray[np.float64]
    error_share: NDArray[np.float64]
    interval_low: NDArray[np.float64]
    interval_high: NDArray[np.float64]

    def __len__(self) -> int:
        return int(self.index.size)


def find_error_slices(
    slices: Slices, column: int, overall_mean: float, overall_loss: float, *, margin: float
) -> ErrorSlices:
    """Slices whose mean in `column` is below `overall_mean` - `margin` and below the mean of every parent.

    A parent has one pair fewer; the whole dataset is the parent of a one-pair slice. `overall_mean` is the mean and
    `overall_loss` the sum of 1 - score over the dataset's scored instances. A slice without a scored instance has no
    mean and is never an error slice. `slices` must hold every parent of its slices, as an enumeration does;
    ValueError when one is missing.
    """
    scored, total = slices.scored[:, column], slices.total[:, column]
    mean = np.divide(total, scored, out=np.full(len(slices), np.inf), where=scored > 0)
    candidates = np.flatnonzero((mean < overall_mean - margin) & (mean < overall_mean))
    lowest = np.full(len(slices), overall_mean)
    lattice = Lattice(slices.items)
    pairs = lattice.depth[candidates]
    kept = [candidates[pairs == 1]]
    for depth in range(2, slices.items.shape[1] + 1):
        level = candidates[pairs == depth]
        lowest[level] = np.inf
        for left_out in range(depth):
            items = np.delete(slices.items[level, :depth], left_out, axis=1)
            lowest[level] = np.minimum(lowest[level], mean[lattice.find(items)])
            level = level[mean[level] < lowest[level]]
        kept.append(level)
    index = np.concatenate(kept).astype(np.int64)
    index = index[np.lexsort((index, -slices.count[index], mean[index]))]
    low, high = wilson_interval(mean[index], scored[index])
    return ErrorSlices(
        index=index,
        mean=mean[index],
        drop=overall_mean - mean[index],
        parent_drop=lowest[index] - mean[index],
        error_share=(scored[index] - total[index]) / overall_loss if overall_loss > 0 else np.zeros(len(index)),
        interval_low=low,
        interval_high=high,
    )


class Lattice:
    """Finds slices by their items.

    A slice of d pairs is known by (the slice of its first d - 1 items, its last item), which fits one int64 whatever
    the number of attributes, tags and pairs; these keys ascend in canonical order.
    """

    def __init__(self, items: Items) -> None:
        self.depth = (items >= 0).sum(axis=1)
        self._base = int(items.max(initial=0)) + 1
        self._starts = np.searchsorted(self.depth, np.arange(items.shape[1] + 2))
        self._items = items
        self._keys: list[NDArray[np.int64]] = []

    def find(self, items: Items) -> NDArray[np.int64]:
        """Positions (m,) of the slices with exactly `items` (m, c), c >= 1; ValueError when one is not there."""
        position = np.zeros(len(items), dtype=np.int64)
        for d in range(items.shape[1]):
            if d == len(self._keys):
                self._keys.append(self._make_keys(d))
            keys, wanted = self._keys[d], position * self._base + items[:, d]
            at = np.searchsorted(keys, wanted)
            if (at == len(keys)).any() or (keys[at] != wanted).any():
                raise ValueError("a parent slice is missing; give the slices of one whole enumeration")
            position = self._starts[d + 1] + at
        return position

    def _make_keys(self, d: int) -> NDArray[np.int64]:
        """Keys of the slices with d + 1 pairs."""
        level = self._items[self._starts[d + 1] : self._starts[d + 2], : d + 1]
        last = level[:, -1].astype(np.int64)
        if d == 0 or len(level) == 0:
            return last
        new = np.append(True, (level[1:, :-1] != level[:-1, :-1]).any(axis=1))
        prefixes = self.find(level[new, :-1])
        keys: NDArray[np.int64] = prefixes[np.cumsum(new) - 1] * self._base + last
        return keys
