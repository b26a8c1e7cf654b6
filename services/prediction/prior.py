"""The missing-slice prior: which unseen combinations ought to be bad, from scores alone and without any model.

An unseen combination has fewer than M instances in the data, so its own mean says little; what says more are its
sub-slices, which have M or more, and its neighbours: the combinations of the same attributes with other tags. The
mean m(u) of every combination u of pairs is estimated level by level, the empty one (the whole dataset) first:

    b(u) = mean of m(p) over the parents p of u                 what the sub-slices say
    w(u) = n t / (n t + s)                                      how much its own n scored instances count
    m(u) = (1 - w) b(u) + w y(u)                                y: the mean of its own scores
    V(u) = w² s / n + (1 - w)² (t + mean of V(p) over p)        the variance of that estimate

s is the variance of the scores. t is the variance of y - b, beyond chance, among the combinations of the same
attributes: where the neighbours stray from what their sub-slices say, so may u. It is the moment estimate
sum g ((y - b)² - s / n) / sum g with g = (t + s / n)^-2, not below 0, and is drawn towards that of all combinations of
as many pairs as if those were 5 combinations more (empirical Bayes: few neighbours decide little).

The score of a combination is its drop at the far end of what may be expected, mean of the dataset - (m - sqrt V): low
where the sub-slices are good, and the higher the less the combination and its sub-slices were covered.

The mean over the parents was taken, not the sum of their effects: where attributes go together (dark, night), each
carries the whole effect, and a sum counts it twice. On Fashion-MNIST (logistic regression, 16 attributes, 4,000 of
9,000 instances drawn 8 times) the rank correlation with what the others show of the unseen combinations was .68 for it,
.67 for inclusion and exclusion, .46 for effects that add up, with shrunk interactions; the mean drop of the 20 worst of
each class was .31, .27 and .25.

Candidates are the combinations of 2 to D pairs that are unseen while every sub-slice is known: those that are reached
from known slices by one more pair, and that lie in every other unseen combination.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import combinations
from math import comb

import numpy as np
from numpy.typing import NDArray

from services.prediction.items import (
    MAX_PER_CLASS,
    MAX_PREDICTIONS,
    check_limits,
    class_of,
    row_keys,
    within_caps,
)
from shared.errors import Precondition, TooLarge, invalid
from shared.schema import Schema

Codes = NDArray[np.uint16]
Floats = NDArray[np.float64]
OnProgress = Callable[[int, int], None]
Cancelled = Callable[[], bool]

_AS_MANY = 5  # combinations that the estimate over all attributes counts for
_ROUNDS = 4  # of the moment estimate, which needs itself for its weights
_MAX_STEPS = 2e10  # instances and cells that are gone through: some minutes
_AT_ONCE = 200_000  # candidates held before the best are picked


@dataclass(frozen=True)
class MissingSlices:
    """Unseen combinations, the most likely to be bad first; P rows."""

    items: NDArray[np.int32]  # (P, D) ascending, padded with -1
    score: Floats  # (P,) overall mean - (mean - its standard deviation)
    mean: Floats  # (P,) the mean score to be expected

    def __len__(self) -> int:
        return len(self.score)


@dataclass(frozen=True)
class _Cells:
    """All combinations of the tags of some attributes; arrays with an axis an attribute."""

    known: NDArray[np.bool_]  # M instances or more
    mean: Floats
    variance: Floats


def _spread(
    n: NDArray[np.int64], cells: Floats, squares: Floats, noise: float, prior: float = 0.0, weight: float = 0.0
) -> float:
    """t of the cells with `n` (K,) instances: `cells` (K,) of them, with the sums `squares` (K,) of (y - b)².

    `prior` counts for `weight` cells more.
    """
    count = float(cells.sum())
    if not count or noise == 0.0:
        return prior
    t = 0.0
    for round_ in range(_ROUNDS):
        g = (t + noise / n) ** -2.0 if round_ else np.ones(len(n))
        t = max(float((g * (squares - cells * noise / n)).sum() / (g * cells).sum()), 0.0)
    return (count * t + weight * prior) / (count + weight)


def missing_slices(
    schema: Schema,
    codes: Codes,
    scores: Floats,
    *,
    min_count: int,
    max_depth: int,
    pair_count: int | None = None,
    max_per_class: int = MAX_PER_CLASS,
    max_predictions: int = MAX_PREDICTIONS,
    on_progress: OnProgress = lambda done, total: None,
    cancelled: Cancelled = lambda: False,
) -> MissingSlices:
    """Rank the unseen combinations of 2 to `max_depth` pairs, or of `pair_count`, by the formula above.

    codes (N, A) uint16 in the order of `schema`, other values than tags are unknown; scores (N,) float64 in [0, 1],
    NaN where not scored. A combination is unseen with fewer than `min_count` instances, scored or not. Cut to
    `max_per_class` for each class named in a slice and for those that name none, and to `max_predictions` in all.
    Ties go by the names of attributes and tags, so neither the order of rows nor that of the schema matters, to the
    last bit. `cancelled` is asked between two sets of attributes; the result is then empty.

    Raises InvalidInput (arrays that do not fit, a limit out of range), Precondition (nothing is scored) and TooLarge
    (it would take more than some minutes).
    """
    check_limits(min_count=min_count, max_per_class=max_per_class, max_predictions=max_predictions)
    if codes.ndim != 2 or codes.shape[1] != len(schema.attributes):
        raise invalid(
            "codes", f"has shape {codes.shape}; give a column for each of {len(schema.attributes)} attributes"
        )
    if scores.shape != (len(codes),):
        raise invalid("scores", f"must be {len(codes)} numbers, one for each instance")
    if not 2 <= max_depth <= len(schema.attributes):
        raise invalid("max_depth", f"is {max_depth}; give 2 to {len(schema.attributes)}, the number of attributes")
    if pair_count is not None and not 2 <= pair_count <= max_depth:
        raise invalid("pair_count", f"is {pair_count}; give 2 to {max_depth}")
    if np.isnan(scores).all():
        raise Precondition("no instance is scored; add the model's scores")
    lattice = _Lattice(schema, codes, scores, min_count)
    depth = pair_count or max_depth
    lattice.check_size(depth)
    best = _Best(schema, lattice, depth, max_per_class, max_predictions)
    total = sum(comb(len(schema.attributes), d) for d in range(2, depth + 1))
    done = 0
    for d in range(1, depth + 1):
        for attributes, cells in lattice.level(d, last=d == depth, wanted=pair_count in (None, d)):
            if cancelled():
                return best.taken(nothing=True)
            if d > 1:
                done += 1
                on_progress(done, total)
            if cells is not None:
                best.offer(attributes, cells)
    return best.taken()


class _Lattice:
    """The levels of combinations, in an order that follows from names: attributes, tags and rows are sorted first."""

    def __init__(self, schema: Schema, codes: Codes, scores: Floats, min_count: int) -> None:
        names = [a.name for a in schema.attributes]
        offsets = np.cumsum([0, *schema.tag_counts])
        self.min_count = min_count
        self.items: list[NDArray[np.int64]] = []  # of each attribute, the items of its known tags
        columns: list[NDArray[np.int64]] = []
        for a in sorted(range(len(names)), key=names.__getitem__):
            tags = schema.attributes[a].tags
            counts = np.bincount(np.minimum(codes[:, a], len(tags)), minlength=len(tags) + 1)
            kept = [t for t in sorted(range(len(tags)), key=tags.__getitem__) if counts[t] >= min_count]
            place = np.full(len(tags) + 1, len(kept))  # what is unknown or rare comes last, and never matters
            place[kept] = np.arange(len(kept))
            columns.append(place[np.minimum(codes[:, a], len(tags))])
            self.items.append(offsets[a] + np.array(kept, np.int64))
        self.widths = [len(items) + 1 for items in self.items]
        order = np.lexsort((scores, *columns))
        self._columns = [column[order] for column in columns]
        scores = scores[order]
        self._scored = np.flatnonzero(~np.isnan(scores))
        self._all_scored = len(self._scored) == len(scores)
        self._scores = scores[self._scored]
        self.overall = float(self._scores.mean())
        self.noise = float(self._scores.var())
        whole = _Cells(np.array(True), np.array(self.overall), np.array(self.noise / len(self._scores)))
        self._below: dict[tuple[int, ...], _Cells] = {(): whole}

    def check_size(self, depth: int) -> None:
        """TooLarge where the levels up to `depth` take too many steps."""
        steps = 0.0
        cells = np.zeros(depth + 1)  # cells of all sets of so many attributes: elementary symmetric polynomials
        cells[0] = 1.0
        for width in self.widths:
            cells[1:] += width * cells[:-1]
        for d in range(1, depth + 1):
            steps += comb(len(self.widths), d) * len(self._columns[0]) + float(cells[d])
        if steps > _MAX_STEPS:
            raise TooLarge(
                f"the prior would go through {steps:.1e} instances and cells, and the limit is {_MAX_STEPS:.0e}; "
                f"give a lower pair count than {depth}, or a higher minimum count",
                metadata={"steps": f"{steps:.3g}", "limit": f"{_MAX_STEPS:.3g}"},
            )

    def level(self, depth: int, *, last: bool, wanted: bool) -> Iterator[tuple[tuple[int, ...], _Cells | None]]:
        """Every set of `depth` attributes with its cells, None where they are not `wanted`.

        What the sub-slices say is kept for the next level, unless this is the `last`.
        """
        cells_of, squares_of = np.zeros(len(self._scores) + 1), np.zeros(len(self._scores) + 1)  # by instances
        for _, scored, total, _, below in self._counted(depth):
            n, squares = _off(scored, total, below)
            np.add.at(cells_of, n, 1.0)
            np.add.at(squares_of, n, squares)
        there = np.flatnonzero(cells_of)
        pooled = _spread(there, cells_of[there], squares_of[there], self.noise)
        level: dict[tuple[int, ...], _Cells] = {}
        for attributes, scored, total, known, below in self._counted(depth):
            n, squares = _off(scored, total, below)
            t = _spread(n, np.ones(len(n)), squares, self.noise, pooled, _AS_MANY)
            mean = _mean(scored, total, below.mean)
            own = scored * t / (scored * t + self.noise) if self.noise > 0.0 else np.zeros(scored.shape)
            cells = _Cells(
                known,
                (1 - own) * below.mean + own * mean,
                own**2 * self.noise / np.maximum(scored, 1) + (1 - own) ** 2 * (t + below.variance),
            )
            if not last:
                level[attributes] = cells
            yield attributes, _Cells(below.known & ~known, cells.mean, cells.variance) if wanted else None
        self._below = level

    def _counted(self, depth: int) -> Iterator[tuple[tuple[int, ...], Floats, Floats, NDArray[np.bool_], _Cells]]:
        """Every set of attributes: scored instances of each cell, their sum, whether it is known, and its parents."""
        for attributes in combinations(range(len(self.widths)), depth):
            widths = [self.widths[a] for a in attributes]
            cell = np.zeros(len(self._columns[0]), np.int64)
            for a, width in zip(attributes, widths, strict=True):
                cell = cell * width + self._columns[a]
            size = int(np.prod(widths))
            inner = (slice(0, -1),) * depth
            counts = np.bincount(cell, minlength=size).reshape(widths)[inner]
            of_scored = cell if self._all_scored else cell[self._scored]
            scored = counts if self._all_scored else np.bincount(of_scored, minlength=size).reshape(widths)[inner]
            total = np.bincount(of_scored, self._scores, minlength=size).reshape(widths)[inner].astype(np.float64)
            yield (
                attributes,
                scored.astype(np.float64),
                total,
                counts >= self.min_count,
                self._parents(attributes, counts.shape),
            )

    def _parents(self, attributes: tuple[int, ...], shape: tuple[int, ...]) -> _Cells:
        """Of each cell, whether all parents are known, and the means of their means and variances."""
        known, mean, variance = np.ones(shape, bool), np.zeros(shape), np.zeros(shape)
        for axis in range(len(attributes)):
            parent = self._below[attributes[:axis] + attributes[axis + 1 :]]
            known &= np.expand_dims(parent.known, axis)
            mean += np.expand_dims(parent.mean, axis)
            variance += np.expand_dims(parent.variance, axis)
        return _Cells(known, mean / len(attributes), variance / len(attributes))


def _off(scored: Floats, total: Floats, below: _Cells) -> tuple[NDArray[np.int64], Floats]:
    """Of each cell that has scored instances: how many, and (y - b)²."""
    there = scored > 0
    n = scored[there]
    return n.astype(np.int64), (total[there] / n - below.mean[there]) ** 2


def _mean(scored: Floats, total: Floats, otherwise: Floats) -> Floats:
    return np.divide(total, scored, out=otherwise.copy(), where=scored > 0)


class _Best:
    """The best candidates so far, within the caps."""

    def __init__(self, schema: Schema, lattice: _Lattice, depth: int, max_per_class: int, max_predictions: int) -> None:
        self._schema = schema
        self._lattice = lattice
        self._caps = max_per_class, max_predictions
        self._n_items = int(schema.tag_counts.sum())
        # Ties go by names: the place of each item when the attributes, then the tags, are sorted.
        self._place = np.full(self._n_items + 1, -1)
        for place, item in enumerate(np.concatenate(lattice.items).tolist()):
            self._place[item] = place
        self._depth = depth
        self._parts: list[tuple[NDArray[np.int32], Floats, Floats]] = []
        self._held = 0

    def offer(self, attributes: tuple[int, ...], cells: _Cells) -> None:
        """Take the cells that `known` marks: here, the candidates."""
        at = np.flatnonzero(cells.known)
        if not at.size:
            return
        items = np.full((len(at), self._depth), self._n_items, np.int64)
        for axis, codes in enumerate(np.unravel_index(at, cells.known.shape)):
            items[:, axis] = self._lattice.items[attributes[axis]][codes]
        items.sort(axis=1)  # padding is larger than any item
        items[items == self._n_items] = -1
        mean, variance = cells.mean.reshape(-1)[at], cells.variance.reshape(-1)[at]
        self._parts.append((items.astype(np.int32), mean, np.sqrt(variance)))
        self._held += len(at)
        if self._held > _AT_ONCE:
            self._cut()

    def _cut(self) -> None:
        items, mean, deviation = (np.concatenate(column) for column in zip(*self._parts, strict=True))
        places = np.sort(np.where(items < 0, self._n_items, self._place[items]), axis=1)
        keys = row_keys(np.where(places == self._n_items, -1, places), self._n_items)
        order = np.lexsort((keys, mean - deviation))
        order = order[within_caps(class_of(self._schema, items[order]), *self._caps)]
        self._parts = [(items[order], mean[order], deviation[order])]
        self._held = len(order)

    def taken(self, *, nothing: bool = False) -> MissingSlices:
        if nothing or not self._parts:
            empty = np.empty(0)
            return MissingSlices(np.empty((0, self._depth), np.int32), empty, empty)
        self._cut()
        ((items, mean, deviation),) = self._parts
        return MissingSlices(items, self._lattice.overall - (mean - deviation), mean)
