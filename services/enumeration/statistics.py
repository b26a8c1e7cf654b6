"""How much an error slice is to be believed: p-values, q-values, what chance alone would find, intervals (paper 5.3).

The paper names a slice by its mean alone; among very many small slices some are low by luck. The null hypothesis here
is that a slice is a random draw, without replacement, of its scored instances from all scored instances of the
dataset. It asks nothing of the scores, and a slice needs no more than its count and its sum to be tested.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import erfcx, expit, gammaln, ndtr, ndtri_exp

from services.enumeration.engine import error_slices
from services.enumeration.error_slices import find_error_slices
from services.enumeration.lattice import Codes, Counts, Items, Slices, score_slices
from shared.errors import invalid

Floats = NDArray[np.float64]

_PAIRS_AT_ONCE = 1 << 14  # tails summed together, so that they stay in cache
_TERMS_AT_ONCE = 16
_BINS = 128  # equally wide, and as many equally full, bins that stand for a dataset's scores
_EXACT_SIZES = 128  # slices (or complements) up to this size get a curve of their own
_SIZE_STEP = 0.02  # above it, sizes whose log odds n / (N - n) are this close share one
_CELLS_AT_ONCE = 1 << 21
_TILTS_BELOW, _TILTS_ABOVE = 40, 12  # points of a curve below and above the mean
_FARTHEST_BELOW, _FARTHEST_ABOVE = 40.0, 8.0  # its reach, about in standard deviations of the sum


def slice_significance(slices: Slices, column: int, scores: Floats, *, min_scored: int) -> tuple[Floats, Floats]:
    """p-value and q-value (S,) float64 of every slice in `column`; NaN where fewer than `min_scored` are scored.

    `scores` (N,) float64 are the column's scores, NaN where not scored. All slices with enough scores are candidates,
    also those that are not error slices: the q-values count every slice that was looked at.
    """
    scored = slices.scored[:, column]
    p = np.where(scored >= min_scored, p_values(scores, scored, slices.total[:, column]), np.nan)
    return p, q_values(p)


def p_values(scores: Floats, scored: NDArray[np.signedinteger], total: Floats) -> Floats:
    """One-sided p-value (S,) of each slice: how likely `scored` random instances sum to `total` or less.

    scores: (N,) float64 of the whole dataset, NaN where not scored. scored: (S,) integers and total: (S,) float64, the
    scored instances of each slice and the sum of their scores. NaN where `scored` is 0.

    Scores of two values (accuracy 0/1): the exact hypergeometric lower tail
    P(X <= k), X ~ Hypergeometric(N, instances with the higher score, n).

    Other scores: a saddlepoint approximation of the same permutation distribution (Robinson 1982; Skovgaard's double
    saddlepoint form, 1987). It works from the dataset's own scores, so their skewness counts at n = 10 as it must,
    where a t-test or a normal tail goes wrong; and it needs no sum of squares. Scores that pile up (a missed object
    has IoU 0, a found one about 0.8) make the sum lumpy, and a smooth tail then finds up to half as many again as it
    should at n = 10. So the tail takes the correction for a lattice as wide as that of two-valued scores with the
    tilted standard deviation s and skewness g, h = s sqrt(4 + g**2): exact when scores are two-valued, and vanishing
    as n grows. It never exceeds the Chernoff bound, which holds for every n (Hoeffding 1963, Theorem 4).
    Of slices drawn at random from skewed, lumpy and tied scores, the share with p <= a was 0.05 to 0.75 of a at
    n = 10, for a from 0.05 to 0.0001, and at n = 1,500 0.6 to 1 of a = 0.05.
    """
    known = scores[~np.isnan(scores)]
    out = np.full(scored.shape, np.nan)
    has = np.flatnonzero(scored > 0)
    if has.size == 0:
        return out
    if scored.max() > known.size:
        raise invalid("scored", f"a slice has {scored.max()} scored instances, the dataset {known.size}")
    n, s = scored[has].astype(np.int64), total[has]
    low, high = known.min(), known.max()
    if low == high:
        out[has] = 1.0
    elif ((known == low) | (known == high)).all():
        hits = np.rint((s - n * low) / (high - low)).astype(np.int64)
        out[has] = hypergeometric_tail(known.size, int((known == high).sum()), n, hits)
    else:
        out[has] = _permutation_tail(known, n, s)
    return out


def hypergeometric_tail(population: int, hits: int, drawn: NDArray[np.int64], drawn_hits: NDArray[np.int64]) -> Floats:
    """P(X <= drawn_hits) (S,), X the hits among `drawn` of `population` of which `hits` are hits.

    Each distinct pair is worked out once, to a relative error of about 1e-14 times the population's log factorial.
    """
    keys, inverse = np.unique(drawn * (population + 1) + drawn_hits, return_inverse=True)
    n, k = np.divmod(keys, population + 1)
    below = k * population <= n * hits  # sum the shorter side of the mean
    log_factorial = gammaln(np.arange(population + 1) + 1.0)
    tail = np.empty(len(keys))
    for side, there, at in ((below, hits, k), (~below, population - hits, n - k - 1)):
        where = np.flatnonzero(side)
        for start in range(0, len(where), _PAIRS_AT_ONCE):
            part = where[start : start + _PAIRS_AT_ONCE]
            tail[part] = _sum_down(population, there, n[part], at[part], log_factorial)
    tail = np.where(below, tail, 1.0 - tail)
    return np.asarray(np.clip(tail, 0.0, 1.0)[inverse])


def _sum_down(population: int, hits: int, n: NDArray[np.int64], k: NDArray[np.int64], log_factorial: Floats) -> Floats:
    """P(X <= k) for k at or below the mean: the terms from k down, each from the one above, until they vanish."""
    tail = np.zeros(len(n))
    active = np.flatnonzero(k >= np.maximum(0, n + hits - population))
    n, k = n[active], k[active]
    misses = population - hits

    def log_choose(a: NDArray[np.int64] | int, b: NDArray[np.int64]) -> Floats:
        return np.asarray(log_factorial[a] - log_factorial[b] - log_factorial[a - b])

    first = np.exp(log_choose(hits, k) + log_choose(misses, n - k) - log_choose(population, n))
    # term(j - 1) / term(j) = j (misses - n + j) / ((hits - j + 1) (n - j + 1)); past the last term all are zero.
    j, ones = k.astype(np.float64), np.ones(len(n))
    state = np.stack((first, ones, ones, j, misses - n + j, hits - j + 1.0, n - j + 1.0))
    while active.size:
        first, terms, sums, j, others, hits_left, draws_left = state
        for _ in range(_TERMS_AT_ONCE):
            terms *= j
            terms *= others
            terms /= hits_left * draws_left
            sums += terms
            j -= 1.0
            others -= 1.0
            hits_left += 1.0
            draws_left += 1.0
        done = terms <= 1e-16 * sums
        tail[active[done]] = first[done] * sums[done]
        active, state = active[~done], state[:, ~done]
    return tail


def _permutation_tail(known: Floats, n: NDArray[np.int64], total: Floats) -> Floats:
    """P(sum of n of `known` <= total) by saddlepoint curves, one for each size or for sizes that are close."""
    size, mean = known.size, float(known.mean())
    variance = float(known.var())
    out = np.ones(len(n))
    inner = np.flatnonzero(n < size)  # the whole dataset has one sum only
    if inner.size == 0:
        return out
    n, total = n[inner], total[inner]
    spread = np.sqrt(variance * n * (size - n) / (size - 1))
    z = (total - n * mean) / spread
    sizes, which = np.unique(n, return_inverse=True)
    step = np.rint(np.log(sizes / (size - sizes)) / _SIZE_STEP).astype(np.int64)
    alone = np.minimum(sizes, size - sizes) <= _EXACT_SIZES
    _, first, group = np.unique(
        np.where(alone, sizes, size - step.min() + step), return_index=True, return_inverse=True
    )
    z_curves, r_curves = _tail_curves(*_histogram(known), sizes[first])
    order = np.argsort(group[which], kind="stable")
    ends = np.searchsorted(group[which][order], np.arange(len(first) + 1))
    p = np.empty(len(n))
    for g in range(len(first)):
        lines = order[ends[g] : ends[g + 1]]
        p[lines] = ndtr(np.interp(z[lines], z_curves[g], r_curves[g]))
    out[inner] = p
    return out


def _histogram(known: Floats) -> tuple[Floats, Floats]:
    """Values (G,) and how many instances have each (G,): all of them if few, else means of narrow and full bins."""
    values, counts = np.unique(known, return_counts=True)
    if len(values) <= 2 * _BINS:
        return values, counts.astype(np.float64)
    edges = np.unique(
        np.concatenate(
            (
                np.linspace(values[0], values[-1], _BINS + 1)[1:-1],
                np.quantile(known, np.arange(1, _BINS) / _BINS, method="inverted_cdf"),
            )
        )
    )
    bins = np.searchsorted(edges, values, side="right")
    mass = np.bincount(bins, counts, len(edges) + 1).astype(np.float64)
    total = np.bincount(bins, counts * values, len(edges) + 1)
    return total[mass > 0] / mass[mass > 0], mass[mass > 0]


def _tail_curves(values: Floats, weights: Floats, sizes: NDArray[np.int64]) -> tuple[Floats, Floats]:
    """For each size (J,) points of its lower tail: standardised sums z and normal quantiles r of the tail (J, T)."""
    bend = 6.0
    below = -np.sinh(bend * np.arange(_TILTS_BELOW, 0, -1) / _TILTS_BELOW) / np.sinh(bend) * _FARTHEST_BELOW
    above = np.sinh(bend / 2 * np.arange(1, _TILTS_ABOVE + 1) / _TILTS_ABOVE) / np.sinh(bend / 2) * _FARTHEST_ABOVE
    reach = np.concatenate((below, above))
    z, r = np.empty((len(sizes), len(reach))), np.empty((len(sizes), len(reach)))
    step = max(1, _CELLS_AT_ONCE // (len(reach) * len(values)))
    size = weights.sum()
    mean = weights @ values / size
    centred = values - mean
    variance = weights @ centred**2 / size
    for start in range(0, len(sizes), step):
        n = sizes[start : start + step].astype(np.float64)[:, None]
        spread = np.sqrt(variance * n * (size - n) / (size - 1))
        tilt = reach / spread
        total, log_p = (
            x.reshape(tilt.shape)
            for x in _saddlepoint(centred, weights, np.broadcast_to(n, tilt.shape).reshape(-1), tilt.reshape(-1))
        )
        z[start : start + step] = total / spread
        log_p = np.minimum(log_p, _chernoff(centred, weights, n, tilt, total))
        r[start : start + step] = ndtri_exp(np.minimum(log_p, -1e-15))
    return np.asarray(np.maximum.accumulate(z, axis=1)), np.asarray(np.maximum.accumulate(r, axis=1))


def _saddlepoint(values: Floats, weights: Floats, n: Floats, tilt: Floats) -> tuple[Floats, Floats]:
    """Sums (P,) that the tilts (P,) lead to for draws of n (P,), and the log of P(sum <= that sum) (P,).

    With K(a, t) = sum log(1 + exp(a + t x)) over the dataset, (a, t) solves dK/da = n, dK/dt = sum.
    """
    size = weights.sum()
    offset = _solve_offset(values, weights, n, tilt)
    logits = offset[:, None] + tilt[:, None] * values
    drawn = expit(logits)
    total = drawn @ (weights * values)
    variances = weights * drawn * (1.0 - drawn)
    k_aa = variances.sum(axis=1)
    share = n / size
    log_odds = np.log(share / (1.0 - share))
    at_null = -size * np.log1p(-share) - log_odds * n
    at_tilt = np.logaddexp(0.0, logits) @ weights - offset * n - tilt * total
    w = np.sign(tilt) * np.sqrt(np.maximum(2.0 * (at_null - at_tilt), 1e-300))
    span = _span(values, weights * np.where((share <= 0.5)[:, None], drawn, 1.0 - drawn))
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):  # at the very lowest sum nothing varies
        middle = variances @ values / k_aa
        k_tt = (variances * (values - middle[:, None]) ** 2).sum(axis=1)  # the determinant of K'' is k_aa * k_tt
        u = -np.expm1(span * tilt) / span * np.sqrt(k_aa * k_tt / (size * share * (1.0 - share)))
        rest = 1.0 / w + 1.0 / u
        lower = -(w**2) / 2 - np.log(np.sqrt(2 * np.pi)) + np.log(np.sqrt(np.pi / 2) * erfcx(-w / np.sqrt(2)) + rest)
        upper = np.log(np.clip(ndtr(w) + np.exp(-(w**2) / 2) / np.sqrt(2 * np.pi) * rest, 0.0, 1.0))
    log_p = np.where(w < 0, lower, upper)
    log_p = np.where(np.isnan(log_p), 0.0, log_p)
    return total, np.minimum(log_p, 0.0)


def _chernoff(values: Floats, weights: Floats, n: Floats, tilt: Floats, total: Floats) -> Floats:
    """Log of a bound on P(sum of n <= total) for each size and point (J, T); `tilt` (J, T), `values` have mean 0.

    E exp(t (S - s)) for any t <= 0, where drawing with replacement only makes it larger, so M(t)**n will do for the
    mean of exp(t S). What is left out sums to -S, and bounds it likewise. The least over all tilts of the size.
    """
    size = weights.sum()
    below = tilt < 0
    bound = np.zeros(total.shape)
    for drawn, sign in ((n, 1.0), (size - n, -1.0)):
        logs = sign * tilt[..., None] * values
        most = logs.max(axis=2)
        log_mgf = most + np.log(np.exp(logs - most[..., None]) @ weights / size)
        exponents = np.where(below, drawn * log_mgf, np.inf)[:, None, :] - tilt[:, None, :] * total[:, :, None]
        bound = np.minimum(bound, exponents.min(axis=2))
    return bound


def _solve_offset(values: Floats, weights: Floats, n: Floats, tilt: Floats) -> Floats:
    """a (P,) with sum of weights * expit(a + tilt * values) = n: Newton's steps, halved intervals where they leave."""
    size = weights.sum()
    log_odds = np.log(n / (size - n))
    ends = tilt[:, None] * np.array([values.min(), values.max()])
    low, high = log_odds - ends.max(axis=1), log_odds - ends.min(axis=1)
    logs = tilt[:, None] * values
    most = logs.max(axis=1)
    a = np.clip(np.log(n) - most - np.log(np.exp(logs - most[:, None]) @ weights), low, high)
    active = np.arange(len(n))
    for _ in range(200):
        drawn = expit(a[active, None] + logs[active])
        found = drawn @ weights
        slope = (drawn * (1.0 - drawn)) @ weights
        wanted = n[active]
        few = found < wanted
        low[active] = np.where(few, a[active], low[active])
        high[active] = np.where(few, high[active], a[active])
        open_ = np.abs(found - wanted) > 1e-11 * wanted
        active = active[open_]
        if active.size == 0:
            break
        found, slope, wanted = found[open_], slope[open_], wanted[open_]
        with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
            # On the log scale the count is nearly straight where few are drawn, which is the usual case.
            next_ = a[active] + np.log(wanted / found) * found / slope
        inside = (next_ > low[active]) & (next_ < high[active])
        a[active] = np.where(inside, next_, (low[active] + high[active]) / 2)
    return np.asarray(a)


def _span(values: Floats, weights: Floats) -> Floats:
    """Distance (P,) of the two values of a two-valued score with the sd and skewness of `values` under each (P, G)."""
    total = weights.sum(axis=1)
    mean = weights @ values / total
    off = values - mean[:, None]
    variance = np.maximum((weights * off**2).sum(axis=1) / total, 1e-300)
    third = (weights * off**3).sum(axis=1) / total
    return np.asarray(np.sqrt(4.0 * variance + (third / variance) ** 2))


def q_values(p: Floats) -> Floats:
    """Benjamini-Hochberg q-value of each p-value, same shape; NaN is no test and stays NaN.

    q(i) = min over j >= i of m p(j) / j, p ascending, m tests: calling all with q <= a keeps the expected share of
    false calls at most a when tests are independent or positively dependent, as overlapping slices are.
    """
    q = np.full(p.shape, np.nan)
    tested = np.flatnonzero(~np.isnan(p))
    order = tested[np.argsort(p[tested], kind="stable")]
    raised = p[order] * (len(order) / np.arange(1, len(order) + 1))
    q[order] = np.minimum(np.minimum.accumulate(raised[::-1])[::-1], 1.0)
    return q


def permuted_scores(scores: Floats, permutations: int, seed: int) -> Floats:
    """(N, permutations) float64: `scores` (N,) shuffled among the scored instances, once a column; NaN stay put."""
    if permutations < 1:
        raise invalid("permutations", f"is {permutations}; give at least 1")
    known = np.flatnonzero(~np.isnan(scores))
    out = np.full((len(scores), permutations), np.nan)
    rng = np.random.default_rng(seed)
    for b in range(permutations):
        out[known, b] = rng.permutation(scores[known])
    return out


@dataclass(frozen=True)
class Chance:
    """How many error slices shuffled scores give: nothing is wrong with any of them.

    counts: (B,) int64, one a permutation. mean: the number to expect. low, high: their 2.5% and 97.5% quantiles.
    """

    counts: NDArray[np.int64]
    mean: float
    low: float
    high: float


def found_by_chance(slices: Slices, overall_mean: float, *, margin: float) -> Chance:
    """Count the error slices of every score column of `slices`, columns as `permuted_scores` makes them.

    `overall_mean` is that of the scores before they were shuffled; the rule is that of `find_error_slices`.
    """
    n_columns = slices.scored.shape[1]
    if n_columns == 0:
        raise invalid("permutations", "there is no score column; give at least 1")
    return chance_of(
        np.array(
            [len(find_error_slices(slices, k, overall_mean, 0.0, margin=margin)) for k in range(n_columns)],
            dtype=np.int64,
        )
    )


def chance_of(counts: NDArray[np.int64]) -> Chance:
    """Sum up the counts (B,) of all permutations, which may have been made a few columns at a time."""
    low, high = np.quantile(counts, [0.025, 0.975])
    return Chance(counts, float(counts.mean()), float(low), float(high))


@dataclass(frozen=True)
class Confirmation:
    """F error slices found on one half of the instances, in rank order, and tested on the other.

    items: (F, D) int32. found_scored, found_mean: (F,) on the half they were found on. held_scored, held_mean, p, q:
    (F,) on the other half; the q-values count the found slices only. NaN where that half has no scored instance.
    """

    items: Items
    found_scored: Counts
    found_mean: Floats
    held_scored: NDArray[np.int64]
    held_mean: Floats
    p: Floats
    q: Floats


def halves(scores: Floats, seed: int) -> NDArray[np.bool_]:
    """(N,) bool, true in the half to search: of every two instances next to each other by score one goes to each."""
    rng = np.random.default_rng(seed)
    order = np.lexsort((rng.random(len(scores)), scores))  # NaN, not scored, comes last
    coins = rng.random(-(-len(scores) // 2)) < 0.5
    search = np.empty(len(scores), dtype=np.bool_)
    search[order] = np.column_stack((coins, ~coins)).reshape(-1)[: len(scores)]
    return search


def confirm(
    codes: Codes,
    tag_counts: ArrayLike,
    scores: Floats,
    *,
    min_count: int,
    max_depth: int,
    margin: float,
    seed: int,
) -> Confirmation:
    """Error slices found on a random half of the instances (paper 4.1, 5.3) and tested on the half not looked at.

    codes (N, A), tag_counts (A,), scores (N,) as in `enumerate_slices`; `min_count` counts the searched half. Within
    the held half the scores are still exchangeable when nothing is wrong, so the p-values need no care for the search.
    Raises what `enumerate_slices` raises, and InvalidInput when a half has no scored instance.
    """
    search = halves(scores, seed)
    known = ~np.isnan(scores)
    if not (known & search).any() or not (known & ~search).any():
        raise invalid("scores", "there are too few to split in two halves; score at least 2 instances")
    found_scores, held_scores = scores[search], scores[~search]
    found = error_slices(
        codes[search], tag_counts, found_scores[:, None], min_count=min_count, max_depth=max_depth, margin=margin
    )
    items = found.slices.items
    scored_columns, total_columns = score_slices(codes[~search], tag_counts, items, held_scores[:, None])
    scored, total = scored_columns[:, 0], total_columns[:, 0]
    p = p_values(held_scores, scored, total)
    return Confirmation(
        items=items,
        found_scored=found.slices.scored[:, 0],
        found_mean=found.errors().mean,
        held_scored=scored,
        held_mean=np.divide(total, scored, out=np.full(len(total), np.nan), where=scored > 0),
        p=p,
        q=q_values(p),
    )
