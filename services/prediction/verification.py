"""Whether predictions hold on data that they were not made from, as the paper's Table 1, and beside a base rate (5.4).

Unseen combinations are worse than the rest by themselves: what is rare is harder. So each method stands beside random
unseen combinations of the same numbers of pairs, and only what lies beyond them is its merit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from services.prediction.extents import Codes, Extents
from services.prediction.items import Ints, attribute_of_items, check_items, check_limits
from shared.errors import Precondition, invalid
from shared.intervals import Z95, mean_intervals
from shared.schema import Schema

Floats = NDArray[np.float64]

BASE_COUNT = 500  # random combinations of each number of pairs
_IMAGINARY = 2  # instances that failed, and as many that did not, in the variance of each slice
_DRAWS_AT_ONCE = 2_000
_MAX_DRAWS, _IN_VAIN = 200_000, 20_000  # of each number of pairs; in a row without anything new


@dataclass(frozen=True)
class VerifiedSlices:
    """What the data says of each predicted slice; P rows. NaN where no instance of the slice is scored."""

    scored: NDArray[np.int64]  # (P,)
    mean: Floats  # (P,)
    drop: Floats  # (P,) overall mean - mean
    low: Floats  # (P,) 95% interval of the mean
    high: Floats
    is_error: NDArray[np.bool_]  # (P,) by the rule for error slices


@dataclass(frozen=True)
class Drop:
    """Slices taken together. Numbers are NaN for no slices."""

    slices: int
    mean_drop: float  # mean over the slices of overall mean - mean
    low: float  # its 95% interval
    high: float
    error_share: float  # slices that are error slices


_NOTHING = Drop(0, np.nan, np.nan, np.nan, np.nan)


@dataclass(frozen=True)
class Verified:
    """One set of predictions: `found` are those that have enough scored instances, `base` random unseen ones."""

    slices: VerifiedSlices
    pair_counts: tuple[int, ...]  # numbers of pairs of the predictions, ascending
    found: Drop
    base: Drop


class Scored:
    """Tags and scores of the instances that predictions are held against.

    codes (N, A) uint16 in the order of `schema`, other values than tags are unknown; scores (N,) float64 in [0, 1], NaN
    where not scored. Raises InvalidInput when they do not fit, Precondition when nothing is scored.
    """

    def __init__(self, schema: Schema, codes: Codes, scores: Floats) -> None:
        if codes.ndim != 2 or codes.shape[1] != len(schema.attributes) or scores.shape != (len(codes),):
            raise invalid(
                "scores", f"codes {codes.shape} and scores {scores.shape} do not fit the schema and each other"
            )
        known = ~np.isnan(scores)
        if not known.any():
            raise Precondition("no instance is scored; add the model's scores")
        self.codes, self.scores = codes[known], scores[known]
        self.schema = schema
        self.overall = float(self.scores.mean())
        self.extents = Extents(schema, self.codes)

    def rows(self, items: Sequence[int]) -> NDArray[np.int64]:
        """The scored rows of one slice."""
        return self.extents.rows(items)

    def means(self, items: Ints) -> Floats:
        """(n,) mean of each slice (n, D), the overall mean for one without pairs; NaN where nothing is scored."""
        return np.array([self._mean(tuple(i for i in row if i >= 0)) for row in items.tolist()], np.float64)

    def _mean(self, items: tuple[int, ...]) -> float:
        inside = self.scores[self.rows(items)] if items else self.scores
        return float(inside.mean()) if inside.size else np.nan


class Baseline:
    """Random unseen combinations of each number of pairs, drawn when first asked for.

    `is_unseen` tells of the items of a combination whether the data that predictions are made from lacks it. Slices
    with `min_count` scored instances can be verified. An error slice has a mean below the overall mean by more than
    `margin`, and below that of every parent. Raises InvalidInput (`min_count` or `count` < 1, a margin outside [0, 1]).
    """

    def __init__(
        self,
        data: Scored,
        is_unseen: Callable[[Sequence[int]], bool],
        *,
        margin: float,
        min_count: int,
        seed: int,
        count: int = BASE_COUNT,
    ) -> None:
        check_limits(min_count=min_count, count=count)
        if not 0.0 <= margin <= 1.0:
            raise invalid("margin", f"is {margin}; give a number from 0 to 1")
        self.data, self.margin, self.min_count = data, margin, min_count
        self._is_unseen, self._seed, self._count = is_unseen, seed, count
        self._drawn: dict[int, tuple[list[NDArray[np.int64]], NDArray[np.bool_]]] = {}

    def of(self, pair_count: int) -> tuple[list[NDArray[np.int64]], NDArray[np.bool_]]:
        """The rows of each combination, and which are error slices."""
        if pair_count not in self._drawn:
            data = self.data
            items = random_unseen(
                data, pair_count, self._is_unseen, min_count=self.min_count, count=self._count, seed=self._seed
            )
            rows = [data.rows(row) for row in items.tolist()]
            self._drawn[pair_count] = rows, _is_error(data, items, data.means(items), self.margin)
        return self._drawn[pair_count]

    def beside(self, shares: Mapping[int, float]) -> Drop:
        """All combinations together, those of d pairs weighing `shares[d]`."""
        rows: list[NDArray[np.int64]] = []
        weights: list[Floats] = []
        is_error: list[NDArray[np.bool_]] = []
        for pair_count, share in shares.items():
            of_it, wrong = self.of(pair_count)
            rows += of_it
            weights.append(np.full(len(of_it), share / max(len(of_it), 1)))
            is_error.append(wrong)
        if not rows:
            return _NOTHING
        weight = np.concatenate(weights)
        return _together(self.data, rows, weight / weight.sum(), np.concatenate(is_error))


def verify(data: Scored, items: Ints, baseline: Baseline) -> Verified:
    """Hold predicted slices (P, D) against `data`: each alone, all together, and beside the base rate.

    What is said of all leaves out those that cannot be verified, and the base rate has each number of pairs as often as
    they have it. Raises InvalidInput for items that are no slices of the schema.
    """
    check_items("items", items, attribute_of_items(data.schema))
    rows = [data.rows([i for i in row if i >= 0]) for row in items.tolist()]
    scored = np.array([len(r) for r in rows], np.int64)
    mean = data.means(items)
    low, high = mean_intervals(data.scores, rows)
    is_error = _is_error(data, items, mean, baseline.margin)
    enough = np.flatnonzero(scored >= baseline.min_count)
    pairs = (items >= 0).sum(axis=1)
    if not enough.size:
        found, base = _NOTHING, _NOTHING
    else:
        weights = np.full(len(enough), 1 / len(enough))
        found = _together(data, [rows[i] for i in enough], weights, is_error[enough])
        base = baseline.beside({int(d): float((pairs[enough] == d).mean()) for d in np.unique(pairs[enough])})
    return Verified(
        VerifiedSlices(scored, mean, data.overall - mean, low, high, is_error),
        tuple(int(d) for d in np.unique(pairs)),
        found,
        base,
    )


def random_unseen(
    data: Scored, pair_count: int, is_unseen: Callable[[Sequence[int]], bool], *, min_count: int, count: int, seed: int
) -> NDArray[np.int32]:
    """At most `count` different combinations (n, `pair_count`) drawn evenly from the unseen that can be verified.

    Those are unseen and have `min_count` scored instances or more in `data`. A row and attributes are drawn, which
    gives a combination as often as it has instances; taking it with probability `min_count` / instances makes all
    equally likely, without a list of them. Fewer than `count` come where many draws in a row find no more.
    """
    n_attributes = data.codes.shape[1]
    if pair_count > n_attributes:
        return np.empty((0, pair_count), np.int32)
    rng = np.random.default_rng([seed, pair_count])
    counts = data.schema.tag_counts
    offsets = np.cumsum(np.append(0, counts[:-1]))
    sizes: dict[tuple[int, ...], int] = {}  # instances of each that was drawn; 0 for what is no candidate
    taken: dict[tuple[int, ...], None] = {}
    new_at = 0
    for drawn_count in range(0, _MAX_DRAWS, _DRAWS_AT_ONCE):
        if drawn_count - new_at > _IN_VAIN:
            break
        at = rng.integers(0, len(data.codes), _DRAWS_AT_ONCE)
        attributes = np.sort(rng.random((_DRAWS_AT_ONCE, n_attributes)).argsort(axis=1)[:, :pair_count], axis=1)
        luck = rng.random(_DRAWS_AT_ONCE)
        codes = data.codes[at[:, None], attributes]
        told = (codes < counts[attributes]).all(axis=1)
        rows, which = np.unique((offsets[attributes] + codes)[told], axis=0, return_inverse=True)
        least = np.full(len(rows), np.inf)
        np.minimum.at(least, which.reshape(-1), luck[told])  # the luckiest draw of each
        for row, coin in zip(rows.tolist(), least.tolist(), strict=True):
            drawn = tuple(row)
            if drawn not in sizes:
                size = data.extents.count(drawn)
                sizes[drawn] = size if size >= min_count and is_unseen(drawn) else 0
            if sizes[drawn] and coin * sizes[drawn] < min_count and drawn not in taken:
                taken[drawn], new_at = None, drawn_count
        if len(taken) >= count:
            # Those of one batch come sorted, so which of them are kept is drawn too.
            return rng.permutation(np.array(list(taken), np.int32))[:count]
    return np.array(list(taken), np.int32).reshape(-1, pair_count)


def _is_error(data: Scored, items: Ints, mean: Floats, margin: float) -> NDArray[np.bool_]:
    """(n,) which slices (n, D) with these means are error slices."""
    lowest = np.full(len(items), np.inf)
    for left_out in range(items.shape[1]):
        has = np.flatnonzero(items[:, left_out] >= 0)
        lowest[has] = np.minimum(lowest[has], data.means(np.delete(items[has], left_out, axis=1)))
    return np.asarray((mean < data.overall - margin) & (mean < lowest))  # NaN is below nothing


def _together(data: Scored, rows: list[NDArray[np.int64]], weights: Floats, is_error: NDArray[np.bool_]) -> Drop:
    """The weighted mean drop of slices, given by their rows, with its interval; `weights` (n,) sum to 1.

    Slices share instances, so the interval comes from what each instance adds to the mean drop (its influence: delta
    method), with the slices as given. Two imaginary instances that failed and two that did not add to the variance of
    each slice, as Agresti and Coull have it for one proportion: slices that all failed are no certainty.
    """
    influence = (data.scores - data.overall) / len(data.scores)
    imagined = 0.0
    mean_drop = data.overall
    for weight, inside in zip(weights.tolist(), rows, strict=True):
        values = data.scores[inside]
        mean, n = float(values.mean()), len(values)
        mean_drop -= weight * mean
        influence[inside] -= weight * (values - mean) / n
        centre = (values.sum() + _IMAGINARY) / (n + 2 * _IMAGINARY)
        imagined += weight**2 * _IMAGINARY * (centre**2 + (1 - centre) ** 2) / (n + 2 * _IMAGINARY) ** 2
    half = Z95 * float(np.sqrt((influence**2).sum() + imagined))
    return Drop(
        len(rows),
        mean_drop,
        max(mean_drop - half, data.overall - 1.0),
        min(mean_drop + half, data.overall),
        float(weights @ is_error),
    )
