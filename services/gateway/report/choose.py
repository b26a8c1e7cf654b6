"""Which two attributes are worth a heatmap, and the heatmap's numbers."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np
import numpy.typing as npt

# A heatmap with more tags than this on a side cannot be read.
MAX_TAGS = 16
# The choice is made on at most about this many instances, evenly thinned: it needs no more.
_MAX_ROWS = 50_000


def cross(
    codes: npt.NDArray[np.uint16],
    scores: npt.NDArray[np.float64],
    first: tuple[int, int],
    second: tuple[int, int],
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Mean score and count where two attributes meet.

    `codes` (n, attributes) uint16, `scores` (n,) in [0, 1] with NaN where not scored; `first` and `second` are
    (column of `codes`, size of the tag set). Returns mean (NaN where count is 0) and count, both
    (tags of first, tags of second). Instances without a score or with an unknown tag are left out.
    """
    (i, rows), (j, columns) = first, second
    a, b = codes[:, i].astype(np.int64), codes[:, j].astype(np.int64)
    kept = (a < rows) & (b < columns) & ~np.isnan(scores)
    cell = a[kept] * columns + b[kept]
    count = np.bincount(cell, minlength=rows * columns)
    total = np.bincount(cell, weights=scores[kept], minlength=rows * columns)
    mean = np.divide(total, count, out=np.full(rows * columns, np.nan), where=count > 0)
    return mean.reshape(rows, columns), count.reshape(rows, columns)


def widest_pairs(
    codes: npt.NDArray[np.uint16],
    scores: npt.NDArray[np.float64],
    tag_counts: Sequence[int],
    min_count: int,
    limit: int,
) -> list[tuple[int, int]]:
    """The pairs of attributes whose cells' means lie furthest from the overall mean, the widest first.

    The spread of a pair is the root of the mean, over scored instances, of the squared distance of their cell's
    mean from the overall mean; cells under `min_count` count as no distance, so that luck in small cells does not
    choose. No attribute is in two pairs. Attributes with more than MAX_TAGS tags are passed over; pairs without any
    spread are not given. At most `limit` pairs (i, j), i < j.
    """
    step = max(1, len(scores) // _MAX_ROWS)
    codes, scores = np.asfortranarray(codes[::step]), scores[::step]  # columns are read one at a time
    scored = ~np.isnan(scores)
    if not scored.any():
        return []
    overall = float(scores[scored].mean())
    readable = [a for a, tags in enumerate(tag_counts) if 2 <= tags <= MAX_TAGS]
    spreads: list[tuple[float, int, int]] = []
    for i, j in combinations(readable, 2):
        mean, count = cross(codes, scores, (i, tag_counts[i]), (j, tag_counts[j]))
        big = count * step >= max(1, min_count)
        squared = float((count[big] * (mean[big] - overall) ** 2).sum() / scored.sum())
        # Sums in another order differ in the last bits; what is equal but for them is equal.
        if round(squared, 12) > 0:
            spreads.append((-round(squared, 12), i, j))
    chosen: list[tuple[int, int]] = []
    used: set[int] = set()
    for _, i, j in sorted(spreads):
        if len(chosen) == limit:
            break
        if not used & {i, j}:
            chosen.append((i, j))
            used |= {i, j}
    return chosen
