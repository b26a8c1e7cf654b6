"""May the candidate replace the baseline? Yes, unless it is worse on a slice by more than is allowed (paper 4.1, 5.3).

A build must not fail by chance, and the slices on which a candidate looks worst are those on which it was unlucky.
So a drop counts only when a paired test on the same instances finds it too, with the number of slices looked at
taken into account: the baseline's error slices and the slices with a limit of their own, which are known before the
candidate is looked at, among each other; all others among every slice there is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from services.enumeration.error_slices import find_error_slices
from services.enumeration.lattice import Slices
from services.enumeration.models import BASELINE, CANDIDATE, SQUARE, paired_p_values, paired_significance
from services.enumeration.statistics import Floats, q_values
from shared.errors import Violation, refuse
from shared.intervals import is_binary

Describe = Callable[[tuple[int, ...]], str]

_SHOWN = 3
_TESTS = 3  # of the slices known beforehand, of all slices, of the dataset as a whole: Bonferroni


@dataclass(frozen=True)
class Severity:
    """The limit for slices whose candidate mean is `below` or more under the candidate's overall mean."""

    name: str
    below: float
    max_drop: float


@dataclass(frozen=True)
class Regression:
    """A drop from baseline to candidate that is more than is allowed; the whole dataset has no items.

    Means are over the `scored` instances that both models have scored. q: the p-value of the paired test, corrected
    for the slices looked at. limit: the drop that was allowed. reason: all of it in words.
    """

    items: tuple[int, ...]
    scored: int
    baseline_mean: float
    candidate_mean: float
    drop: float
    limit: float
    q: float
    reason: str


@dataclass(frozen=True)
class Verdict:
    """passed; why, in one line; the regressions, the whole dataset first and then the largest excess over its limit.

    compared: slices with enough instances scored by both models. judged: those of them held to a limit.
    """

    passed: bool
    reason: str
    regressions: tuple[Regression, ...]
    compared: int
    judged: int


def gate(
    slices: Slices,
    paired: Floats,
    *,
    max_drop: float,
    margin: float,
    min_scored: int,
    max_overall_drop: float | None = None,
    slice_limits: Mapping[tuple[int, ...], float] | None = None,
    severities: Sequence[Severity] = (),
    every_slice: bool = False,
    max_false_alarm: float = 0.05,
    describe: Describe = str,
) -> Verdict:
    """Judge a candidate against a baseline on one enumeration.

    slices: with the sums of the columns of `paired_scores`; paired: (N, 3), what that gave. Judged are the error
    slices of either model by the paper's rule with `margin`, and those in `slice_limits`; with `every_slice` all that
    have at least `min_scored` instances scored by both. A judged slice fails when its mean drops by more than its
    limit and the paired test agrees: its corrected p-value is at most `max_false_alarm`, which bounds the chance that a
    candidate that is nowhere worse is stopped: a third of it for the slices known beforehand, for all slices, and for
    the dataset as a whole. The limit is that of `slice_limits` (items, ascending), else of the gravest of
    `severities` that the candidate's slice reaches, else `max_drop`. The dataset as a whole may drop by
    `max_overall_drop`, or `max_drop` when None.

    Never passes when nothing was compared: no slice has enough instances, or a slice with a limit of its own is not
    there or has too few. `describe` says items in words for the reasons.
    Raises InvalidInput for limits out of range.
    """
    limits = dict(slice_limits or {})
    _check(max_drop, max_overall_drop, limits, severities, max_false_alarm)
    scored = slices.scored[:, BASELINE]
    enough = scored >= max(min_scored, 1)
    compared = int(enough.sum())
    if compared == 0:
        why = f"nothing could be compared: no slice has {min_scored} instances that both models have scored"
        return Verdict(False, f"{why}; add scores of the same instances, or lower the number asked for", (), 0, 0)
    named, missing = _positions(slices, limits, enough)
    if missing:
        told = ", ".join(describe(items) for items in missing[:_SHOWN])
        why = f"{len(missing)} slices with a limit of their own could not be compared: {told}"
        return Verdict(False, f"{why}; they are not there or have under {min_scored} scores", (), compared, 0)

    known = paired[~np.isnan(paired[:, BASELINE])]
    overall = known.mean(axis=0)
    errors = [find_error_slices(slices, k, float(overall[k]), 0.0, margin=margin).index for k in (BASELINE, CANDIDATE)]
    planned = np.zeros(len(slices), dtype=np.bool_)
    planned[errors[BASELINE]] = planned[list(named)] = True
    judged = planned.copy()
    judged[errors[CANDIDATE]] = True
    judged = enough & (np.ones_like(judged) if every_slice else judged)

    mean = np.divide(slices.total, slices.scored, out=np.full(slices.total.shape, np.nan), where=slices.scored > 0)
    limit = np.full(len(slices), max_drop)
    for severity in sorted(severities, key=lambda s: s.below):
        limit[overall[CANDIDATE] - mean[:, CANDIDATE] >= severity.below] = severity.max_drop
    for position, own in named.items():
        limit[position] = own
    p = paired_significance(slices, paired, min_scored=max(min_scored, 1))
    anywhere, beforehand = q_values(p), q_values(np.where(planned, p, np.nan))
    q = np.minimum(1.0, _TESTS * np.fmin(anywhere, beforehand))

    drop = mean[:, BASELINE] - mean[:, CANDIDATE]
    with np.errstate(invalid="ignore"):
        failed = np.flatnonzero(judged & (drop > limit + 1e-12) & (q <= max_false_alarm))
    failed = failed[np.lexsort((failed, -scored[failed], -(drop - limit)[failed]))]
    regressions = [
        _regression(_items(slices, int(i)), int(scored[i]), mean[i], float(limit[i]), float(q[i]), describe)
        for i in failed
    ]
    whole_limit = max_drop if max_overall_drop is None else max_overall_drop
    whole_p = paired_p_values(
        np.array([known[:, BASELINE].sum() - known[:, CANDIDATE].sum()]),
        np.array([known[:, SQUARE].sum()]),
        binary=is_binary(known[:, : CANDIDATE + 1]),
    )
    whole_q = min(1.0, _TESTS * float(whole_p[0]))
    if overall[BASELINE] - overall[CANDIDATE] > whole_limit + 1e-12 and whole_q <= max_false_alarm:
        regressions.insert(0, _regression((), len(known), overall, whole_limit, whole_q, describe))
    return Verdict(
        not regressions,
        _summary(regressions, int(judged.sum()), compared),
        tuple(regressions),
        compared,
        int(judged.sum()),
    )


def _check(
    max_drop: float,
    max_overall_drop: float | None,
    limits: Mapping[tuple[int, ...], float],
    severities: Sequence[Severity],
    max_false_alarm: float,
) -> None:
    drops = [("max_drop", max_drop)]
    drops += [("max_overall_drop", max_overall_drop)] if max_overall_drop is not None else []
    drops += [("slice_limits", own) for own in limits.values()]
    drops += [("severities", s.max_drop) for s in severities]
    found = [Violation(name, f"is {x}; a drop is from 0 to 1") for name, x in drops if not 0.0 <= x <= 1.0]
    found += [Violation("severities", f"'{s.name}' has no number below") for s in severities if math.isnan(s.below)]
    if not 0.0 < max_false_alarm < 1.0:
        found.append(Violation("max_false_alarm", f"is {max_false_alarm}; give a chance between 0 and 1"))
    refuse(found)


def _positions(
    slices: Slices, limits: Mapping[tuple[int, ...], float], enough: NDArray[np.bool_]
) -> tuple[dict[int, float], list[tuple[int, ...]]]:
    """Position -> limit of the slices with a limit of their own, and those that cannot be compared."""
    named, missing = {}, []
    for items, own in limits.items():
        line = np.full(slices.items.shape[1], -1)
        at = np.zeros(0, dtype=np.int64)
        if 0 < len(items) <= len(line):
            line[: len(items)] = sorted(items)
            at = np.flatnonzero((slices.items == line).all(axis=1) & enough)
        if at.size:
            named[int(at[0])] = own
        else:
            missing.append(items)
    return named, missing


def _items(slices: Slices, position: int) -> tuple[int, ...]:
    return tuple(int(i) for i in slices.items[position] if i >= 0)


def _regression(
    items: tuple[int, ...], scored: int, mean: Floats, limit: float, q: float, describe: Describe
) -> Regression:
    before, after = float(mean[BASELINE]), float(mean[CANDIDATE])
    where = describe(items) if items else "the whole dataset"
    reason = (
        f"{where}: mean fell from {before:.3f} to {after:.3f} on {scored:,} instances, "
        f"a drop of {before - after:.3f} where {limit:.3f} is allowed (corrected p = {q:.2g})"
    )
    return Regression(items, scored, before, after, before - after, limit, q, reason)


def _summary(regressions: Sequence[Regression], judged: int, compared: int) -> str:
    looked = f"{judged:,} of {compared:,} slices held to a limit"
    if not regressions:
        return f"passed: no drop beyond its limit that chance would not explain ({looked}, and the whole dataset)"
    more = f"; and {len(regressions) - 1:,} more" if len(regressions) > 1 else ""
    return f"failed: {regressions[0].reason}{more} ({looked})"
