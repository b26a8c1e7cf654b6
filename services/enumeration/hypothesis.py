"""A slice that a person has in mind: any tags, scored on demand like those that were enumerated (paper 4.1.1, 5.3)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from services.enumeration.lattice import Codes
from services.enumeration.statistics import Floats, p_values
from shared.errors import Violation, refuse
from shared.intervals import mean_intervals

Tags = Mapping[int, Collection[int]]


@dataclass(frozen=True)
class Hypothesis:
    """What the scores say of one slice.

    count, scored: its instances, and those of them with a score. mean: their mean score; overall_mean: the dataset's.
    drop: overall less slice. error_share: the slice's part of all lost score, the sum of 1 - score. interval_low,
    interval_high: 95%, of the mean. p: how likely as many random instances do as badly or worse. There is one test
    here, so no q-value; one who tries many combinations must count them. NaN where nothing is scored.
    """

    count: int
    scored: int
    mean: float
    overall_mean: float
    drop: float
    error_share: float
    interval_low: float
    interval_high: float
    p: float


def hypothesis_rows(codes: Codes, tag_counts: ArrayLike, tags: Tags) -> NDArray[np.int64]:
    """Rows (n,) int64, ascending, that hold any of the given tags for each attribute named.

    codes: (N, A) and tag_counts: (A,) as in `enumerate_slices`. tags: attribute -> tag codes, any of which will do.
    Unknown codes match nothing. Raises InvalidInput that names every attribute or tag that is not there.
    """
    counts = np.asarray(tag_counts, dtype=np.int64)
    found = [] if tags else [Violation("tags", "there are none; name at least one attribute and its tags")]
    for attribute, wanted in tags.items():
        if not 0 <= attribute < len(counts):
            found.append(Violation("tags", f"attribute {attribute} is not one of the {len(counts)}, counted from 0"))
        elif not wanted:
            found.append(Violation("tags", f"attribute {attribute} has no tag; give at least one"))
        else:
            n_tags = int(counts[attribute])
            found += [
                Violation("tags", f"attribute {attribute} has {n_tags} tags, counted from 0; there is no {tag}")
                for tag in wanted
                if not 0 <= tag < n_tags
            ]
    refuse(found)
    member = np.ones(len(codes), dtype=np.bool_)
    for attribute, wanted in tags.items():
        member &= np.isin(codes[:, attribute], np.array(sorted(wanted), dtype=np.int64))
    return np.flatnonzero(member)


def score_hypothesis(codes: Codes, tag_counts: ArrayLike, scores: Floats, tags: Tags) -> Hypothesis:
    """The statistics of an error slice for the rows that `hypothesis_rows` gives; scores (N,), NaN not scored."""
    rows = hypothesis_rows(codes, tag_counts, tags)
    inside = scores[rows][~np.isnan(scores[rows])]
    known = scores[~np.isnan(scores)]
    n, nothing = inside.size, float("nan")
    mean = float(inside.mean()) if n else nothing
    overall = float(known.mean()) if known.size else nothing
    loss = float((1.0 - known).sum())
    low, high = mean_intervals(scores, [rows])
    return Hypothesis(
        count=len(rows),
        scored=n,
        mean=mean,
        overall_mean=overall,
        drop=overall - mean,
        error_share=float((1.0 - inside).sum()) / loss if loss > 0 else 0.0,
        interval_low=float(low[0]),
        interval_high=float(high[0]),
        p=float(p_values(scores, np.array([n]), np.array([inside.sum()]))[0]),
    )
