"""Cutting one depth of the lattice into pieces of work, and doing them on all cores in order."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Result = TypeVar("Result")

_LOOK_SECONDS = 0.1  # a caller who waits for a piece is asked this often whether to go on


def core_count() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def cut(
    prefix_slices: NDArray[np.float64],
    prefix_cost: NDArray[np.float64],
    rows_of: Callable[[int], tuple[NDArray[np.float64], NDArray[np.float64]]],
    *,
    most_slices: float,
    most_cost: float,
) -> Iterator[NDArray[np.int64]]:
    """Pieces (first prefix, last prefix, first row, last row) (4,) in canonical order.

    Each prefix has an upper bound of its slices and a cost, (P,) each; a prefix that is too much for one piece is cut
    by the rows of its joint count, whose bounds and costs `rows_of` gives by position of the item, (I,) each.
    """
    slices, costs = np.cumsum(prefix_slices), np.cumsum(prefix_cost)
    start = 0
    while start < len(slices):
        stop = _reach(slices, start, most_slices, costs, most_cost)
        if stop > start:
            yield np.array([start, stop, 0, np.iinfo(np.int32).max])
        else:
            stop = start + 1
            row_slices, row_costs = (np.cumsum(values) for values in rows_of(start))
            row = 0
            while row < len(row_slices):
                end = max(row + 1, _reach(row_slices, row, most_slices, row_costs, most_cost))
                yield np.array([start, stop, row, end])
                row = end
        start = stop


def _reach(a: NDArray[np.float64], start: int, most_a: float, b: NDArray[np.float64], most_b: float) -> int:
    """First index past `start` at which one of the running sums has grown by more than its limit."""
    base_a, base_b = (a[start - 1], b[start - 1]) if start else (0.0, 0.0)
    return int(min(np.searchsorted(a, base_a + most_a, "right"), np.searchsorted(b, base_b + most_b, "right")))


class Crew:
    """Threads that do pieces of work; the kernels release the GIL."""

    def __init__(self, threads: int, look: Callable[[], None]) -> None:
        self._threads = threads
        self._look = look
        self._pool: ThreadPoolExecutor | None = None

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def each(self, pieces: list[NDArray[np.int64]], work: Callable[[NDArray[np.int64]], Result]) -> Iterator[Result]:
        """Results of `work` in the order of `pieces`, a few of them ahead of the reader."""
        if self._threads == 1 or len(pieces) < 2:
            for piece in pieces:
                self._look()
                yield work(piece)
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="slices")
        ahead: deque[Future[Result]] = deque()
        for piece in pieces:
            ahead.append(self._pool.submit(work, piece))
            if len(ahead) > 2 * self._threads:
                yield self._wait(ahead.popleft())
        while ahead:
            yield self._wait(ahead.popleft())

    def _wait(self, result: Future[Result]) -> Result:
        while True:
            self._look()
            try:
                return result.result(timeout=_LOOK_SECONDS)
            except NotYet:
                if result.done():
                    raise
