"""Every slice of a table with at least M rows and at most D pairs (paper 4.1): what the service calls.

Compiled kernels do the work (`walk.py`). Where numba is not installed `lattice.py` does, on numpy alone: the same
slices, more slowly.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from services.enumeration import lattice
from services.enumeration.error_slices import ErrorSlices, find_error_slices
from services.enumeration.lattice import MAX_SLICES, Cancel, Codes, Progress, Slices
from services.enumeration.selection import copied, holding, rank_order, reordered, take
from services.enumeration.work_units import Watch, core_count
from shared.errors import invalid
from shared.intervals import wilson_interval

if TYPE_CHECKING:
    from services.enumeration.walk import Walk

_COMPILED = find_spec("numba") is not None


def enumerate_slices(
    codes: Codes,
    tag_counts: ArrayLike,
    scores: NDArray[np.float64] | None,
    *,
    min_count: int,
    max_depth: int,
    must_hold: int | None = None,
    max_slices: int = MAX_SLICES,
    threads: int | None = None,
    on_progress: Progress | None = None,
    cancelled: Cancel | None = None,
) -> Slices:
    """All slices in one piece: as `stream_slices`; memory is the result and at most 100 megabytes."""
    watch = Watch(on_progress, cancelled)
    if not _COMPILED:
        return _by_lattice(codes, tag_counts, scores, min_count, max_depth, must_hold, max_slices, watch)
    walk = _walk(codes, tag_counts, scores, min_count, max_depth, must_hold, max_slices, watch)
    return walk.all(threads or core_count())


def stream_slices(
    codes: Codes,
    tag_counts: ArrayLike,
    scores: NDArray[np.float64] | None,
    *,
    min_count: int,
    max_depth: int,
    must_hold: int | None = None,
    max_slices: int = MAX_SLICES,
    threads: int | None = None,
    on_progress: Progress | None = None,
    cancelled: Cancel | None = None,
) -> Iterator[Slices]:
    """All slices of at most `max_depth` pairs with at least `min_count` rows, in chunks, in canonical order.

    codes: (N, A) uint8 or uint16; a code at or above its attribute's tag count matches nothing.
    tag_counts: (A,) tags of each attribute.
    scores: (N, K) float64 in [0, 1], NaN where a row is not scored; None for no columns.
    must_hold: only slices with a pair of this attribute.
    threads: all cores when None; the result does not depend on it.
    on_progress gets (done, total), and `cancelled` is asked, several times a second; the total grows until the last
    depth has begun.
    Raises InvalidInput (shapes, ranges), TooLarge (more than `max_slices`: estimated first, and counted as it goes)
    and Cancelled.
    """
    watch = Watch(on_progress, cancelled)
    if not _COMPILED:
        return iter([_by_lattice(codes, tag_counts, scores, min_count, max_depth, must_hold, max_slices, watch)])
    walk = _walk(codes, tag_counts, scores, min_count, max_depth, must_hold, max_slices, watch)
    return (copied(chunk) for chunk, _ in walk.borrowed(threads or core_count()))


@dataclass(frozen=True)
class FoundErrors:
    """Error slices of one score column in rank order, out of `candidates` slices that were enumerated.

    lowest: (E,) the lowest mean among the parents of each; overall, loss: mean of the column, and score lost in it.
    """

    slices: Slices
    lowest: NDArray[np.float64]
    column: int
    overall: float
    loss: float
    candidates: int

    def errors(self, start: int = 0, stop: int | None = None) -> ErrorSlices:
        """What the rule says of the slices at ranks `start` to `stop`; `index` is their place in `slices`."""
        scored, total = self.slices.scored[start:stop, self.column], self.slices.total[start:stop, self.column]
        mean = total / scored
        low, high = wilson_interval(mean, scored)
        share = (scored - total) / self.loss if self.loss > 0 else np.zeros(len(mean))
        index = np.arange(start, start + len(mean))
        return ErrorSlices(index, mean, self.overall - mean, self.lowest[start:stop] - mean, share, low, high)


def error_slices(
    codes: Codes,
    tag_counts: ArrayLike,
    scores: NDArray[np.float64],
    *,
    min_count: int,
    max_depth: int,
    margin: float,
    column: int = 0,
    top: int | None = None,
    must_hold: int | None = None,
    max_slices: int = MAX_SLICES,
    threads: int | None = None,
    on_progress: Progress | None = None,
    cancelled: Cancel | None = None,
) -> FoundErrors:
    """The error slices of one score column, as `find_error_slices` finds them among all slices (paper 4.1.4).

    Each slice is judged when it is made and only error slices are kept, or the first `top` of their ranking. Memory
    holds these and, beside them, the means of the slices of fewer than `max_depth` pairs: at most 50 megabytes more
    than the result at 28 million slices. The rest as in `stream_slices`; `max_slices` bounds the slices that are
    looked at. Raises InvalidInput also where no row is scored in `column`.
    """
    watch = Watch(on_progress, cancelled)
    if not 0 <= column < scores.shape[1]:
        raise invalid("column", f"is {column}; there are {scores.shape[1]} score columns")
    overall, loss = _overall(scores, column)
    if _COMPILED:
        from services.enumeration.error_rule import judged_slices

        kept, lowest, candidates = judged_slices(
            _walk(codes, tag_counts, scores, min_count, max_depth, must_hold, max_slices, watch),
            column, overall, margin, top, threads or core_count(),
        )  # fmt: skip
    else:
        everything = _by_lattice(codes, tag_counts, scores, min_count, max_depth, None, max_slices, watch)
        errors = find_error_slices(everything, column, overall, loss, margin=margin)
        lines = np.sort(errors.index)
        lowest = (errors.mean + errors.parent_drop)[np.argsort(errors.index)]
        held = holding(take(everything, lines), tag_counts, must_hold)
        kept, lowest, candidates = take(everything, lines[held]), lowest[held], len(everything)
    order = rank_order(kept, column)[:top]
    return FoundErrors(*reordered(kept, lowest, order), column, overall, loss, candidates)


def _overall(scores: NDArray[np.float64], column: int) -> tuple[float, float]:
    """Mean of the scores there are in `column`, and the score lost in it."""
    known, missing = scores[:, column], np.isnan(scores[:, column])
    if missing.any():
        known = known[~missing]
    if known.size == 0:
        raise invalid("scores", f"column {column} has no score")
    return float(known.mean()), float(known.size - known.sum())


def _walk(
    codes: Codes,
    tag_counts: ArrayLike,
    scores: NDArray[np.float64] | None,
    min_count: int,
    max_depth: int,
    must_hold: int | None,
    max_slices: int,
    watch: Watch,
) -> Walk:
    from services.enumeration.walk import Walk  # numba takes a moment to import; only those who enumerate wait for it

    return Walk(codes, tag_counts, scores, min_count, max_depth, must_hold, max_slices, watch)


def _by_lattice(
    codes: Codes,
    tag_counts: ArrayLike,
    scores: NDArray[np.float64] | None,
    min_count: int,
    max_depth: int,
    must_hold: int | None,
    max_slices: int,
    watch: Watch,
) -> Slices:
    found = lattice.enumerate_slices(
        codes,
        tag_counts,
        scores,
        min_count=min_count,
        max_depth=max_depth,
        max_slices=max_slices,
        on_progress=watch.on_progress,
        cancelled=watch.cancelled,
    )
    if must_hold is not None and not 0 <= must_hold < codes.shape[1]:
        raise invalid("must_hold", f"is {must_hold}; the table has attributes 0 to {codes.shape[1] - 1}")
    return take(found, holding(found, tag_counts, must_hold))
