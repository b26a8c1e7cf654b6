"""Models side by side, on the slices of one dataset (paper 5.3): what they share, where they differ, what changed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import bdtr, ndtr

from services.enumeration.error_slices import ErrorSlices, find_error_slices
from services.enumeration.lattice import Slices
from services.enumeration.statistics import Floats, q_values
from shared.errors import Precondition, invalid
from shared.intervals import is_binary

BASELINE, CANDIDATE, SQUARE = range(3)  # columns of `paired_scores`

_RADEMACHER = 1.0 / (4.0 * ndtr(-np.sqrt(2.0)))  # about 3.178, the best there is


@dataclass(frozen=True)
class Overlap:
    """How much of their worst slices K models share.

    share: (K, K) float64, the part of one model's worst slices that are among the other's. average: its mean over
    pairs of different models, NaN for a single one. size: how many slices the worst are.
    """

    share: Floats
    average: float
    size: int


def worst_overlap(slices: Slices, *, worst: float = 0.1) -> Overlap:
    """Overlap of the `worst` part of the slices by mean, between the models in the columns of `slices` (paper 5.3).

    Slices that some model has no score for are left out. As many as `worst` of the others, rounded up, are taken for
    each model; equal means go to the larger slice, then the shorter, then the earlier. By chance, `worst` is shared.
    Raises InvalidInput when `worst` is not above 0 and at most 1, Precondition when no slice is scored by all models.
    """
    if not 0.0 < worst <= 1.0:
        raise invalid("worst", f"is {worst}; give a part above 0, at most 1")
    everywhere = np.flatnonzero((slices.scored > 0).all(axis=1))
    if everywhere.size == 0 or slices.scored.shape[1] == 0:
        raise Precondition("no slice has a score from every model; add scores of the same instances for each")
    everywhere = everywhere[np.argsort(-slices.count[everywhere], kind="stable")]
    means = slices.total[everywhere] / slices.scored[everywhere]
    size = int(np.ceil(worst * len(everywhere) - 1e-9))
    member = np.zeros(means.shape, dtype=np.float64)
    for k in range(means.shape[1]):
        member[np.argsort(means[:, k], kind="stable")[:size], k] = 1.0
    share = member.T @ member / size
    pairs = share[~np.eye(len(share), dtype=np.bool_)]
    return Overlap(share, float(pairs.mean()) if pairs.size else float("nan"), size)


def paired_scores(baseline: Floats, candidate: Floats) -> Floats:
    """(N, 3) float64: baseline, candidate and squared difference of two models' scores (N,), to enumerate or score.

    NaN in every column where either model has no score, so that all sums are over the same instances.
    Raises Precondition when no instance has both.
    """
    if baseline.shape != candidate.shape:
        raise invalid("candidate", f"has {candidate.size} scores, the baseline {baseline.size}; give one an instance")
    columns = np.column_stack((baseline, candidate, (candidate - baseline) ** 2)).astype(np.float64)
    columns[np.isnan(columns).any(axis=1)] = np.nan
    if np.isnan(columns).all():
        raise Precondition("no instance has a score from both models; nothing can be compared")
    return columns


def paired_p_values(lost: Floats, square: Floats, *, binary: bool) -> Floats:
    """One-sided p-value (S,) that the candidate is worse, from the same instances scored by both models.

    lost: (S,) sum over the slice of baseline - candidate. square: (S,) sum of the squared differences. The null: on
    each instance the two scores may as well be swapped, so each difference has a random sign.

    `binary` scores: exact, the binomial tail over the instances that one model has right and the other wrong
    (McNemar's exact test): P(X >= w), X ~ Binomial(square, 1/2), w = (square + lost) / 2 the newly wrong.

    Others: a bound on the tail of such a sign-flip sum that holds for every n and every set of differences,
    with z = lost / sqrt(square) the least of 1/2, exp(-z**2 / 2) (Hoeffding 1963) and 3.178 (1 - Phi(z)) (Bentkus and
    Dzindzalieta 2015, the best constant): honest for small n, where a paired t-test of skewed differences is not, for
    p-values up to about three times too large. Equal scores everywhere, or none, give 1.
    """
    if binary:
        trials = np.rint(square)
        worse = np.rint((square + lost) / 2.0)
        return np.asarray(np.where(worse > 0, bdtr(trials - worse, trials.astype(np.int64), 0.5), 1.0))
    z = np.divide(lost, np.sqrt(square), out=np.zeros(len(lost)), where=square > 0)
    bound = np.minimum(np.minimum(0.5, np.exp(-(z**2) / 2.0)), _RADEMACHER * ndtr(-z))
    return np.where(z > 1e-6, bound, 1.0)  # sums that cancel leave a rounding error


def paired_significance(slices: Slices, paired: Floats, *, min_scored: int) -> Floats:
    """p-value (S,) that the candidate is worse on each slice; NaN where fewer than `min_scored` have both scores.

    `slices` hold the columns of `paired_scores`, and `paired` is what it gave.
    """
    lost = slices.total[:, BASELINE] - slices.total[:, CANDIDATE]
    p = paired_p_values(lost, slices.total[:, SQUARE], binary=is_binary(paired[:, : CANDIDATE + 1]))
    return np.where(slices.scored[:, BASELINE] >= min_scored, p, np.nan)


@dataclass(frozen=True)
class DifferenceSlices:
    """E slices on which the candidate falls behind the baseline more than elsewhere, worst first.

    index: (E,) int64, positions in the Slices. baseline_mean, candidate_mean: (E,) on the instances both have scored.
    p, q: (E,) of the paired test that the candidate is worse on the slice; q counts every slice with enough scores.
    """

    index: NDArray[np.int64]
    baseline_mean: Floats
    candidate_mean: Floats
    p: Floats
    q: Floats


def difference_slices(slices: Slices, paired: Floats, *, margin: float, min_scored: int) -> DifferenceSlices:
    """The error slices of the difference between two models (paper 4.1.4's rule on candidate - baseline).

    Kept are slices whose mean difference is below the overall difference by more than `margin` and below that of
    every parent. `slices` hold the columns of `paired_scores`, and `paired` is what it gave. Swap the models for the
    slices on which the candidate is ahead.
    """
    known = paired[~np.isnan(paired[:, BASELINE])]
    # (1 + candidate - baseline) / 2 lies in [0, 1] as a score does.
    level = (slices.scored[:, BASELINE] + (slices.total[:, CANDIDATE] - slices.total[:, BASELINE])) / 2.0
    overall = (len(known) + (known[:, CANDIDATE].sum() - known[:, BASELINE].sum())) / 2.0 / len(known)
    shifted = Slices(slices.items, slices.count, slices.scored[:, :1], level[:, None])
    found = find_error_slices(shifted, 0, float(overall), 0.0, margin=margin / 2.0)
    p = paired_significance(slices, paired, min_scored=min_scored)
    q = q_values(p)
    scored = slices.scored[found.index, BASELINE]
    return DifferenceSlices(
        index=found.index,
        baseline_mean=slices.total[found.index, BASELINE] / scored,
        candidate_mean=slices.total[found.index, CANDIDATE] / scored,
        p=p[found.index],
        q=q[found.index],
    )


@dataclass(frozen=True)
class Changes:
    """What became of the error slices of two versions, V positions each, the most telling first.

    These are, of kept ones, the lowest means of the candidate, and of others the largest change of the slice's summed
    score: a small slice may change much by luck, and one that crosses the margin since the overall mean moved is last.
    fixed: below the margin in the baseline, no more in the candidate. new: the other way round. regressed: below it in
    both, and lower now. kept: below it in both, not lower. baseline_mean, candidate_mean: (S,) float64 of all slices,
    NaN where not scored.
    """

    fixed: NDArray[np.int64]
    regressed: NDArray[np.int64]
    new: NDArray[np.int64]
    kept: NDArray[np.int64]
    baseline_mean: Floats
    candidate_mean: Floats


def changes(
    slices: Slices, baseline: ErrorSlices, candidate: ErrorSlices, overall: tuple[float, float], *, margin: float
) -> Changes:
    """Sort the error slices of either of two versions by what changed.

    slices: of one enumeration, with the sums of the baseline and the candidate in its first two columns. baseline,
    candidate: the error slices of each, positions in `slices`. overall: the overall mean of each. A slice that is
    named in one version only because in the other a parent is just as bad is below the margin in both: kept or
    regressed, not fixed or new.
    """
    scored, total = slices.scored[:, :2], slices.total[:, :2]
    means = np.divide(total, scored, out=np.full(total.shape, np.nan), where=scored > 0)
    either = np.union1d(baseline.index, candidate.index)
    order = np.lexsort((either, -slices.count[either], means[either, 1]))
    either = either[order]
    moved = (means[either, 1] - means[either, 0]) * slices.count[either]

    def telling(which: NDArray[np.bool_], direction: int) -> NDArray[np.int64]:
        lines = np.flatnonzero(which)
        return either[lines[np.argsort(-direction * moved[lines], kind="stable")]]

    with np.errstate(invalid="ignore"):
        was, is_ = (means[either] < np.array(overall) - margin).T
    lower = means[either, 1] < means[either, 0]
    return Changes(
        fixed=telling(was & ~is_, 1),
        regressed=telling(was & is_ & lower, -1),
        new=telling(~was & is_, -1),
        kept=either[was & is_ & ~lower],
        baseline_mean=means[:, 0],
        candidate_mean=means[:, 1],
    )
