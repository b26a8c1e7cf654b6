"""Cutting one depth of the lattice into pieces of work, and doing them on all cores in order."""

from __future__ import annotations

import os
import time
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import cache
from threading import Condition
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from services.enumeration.lattice import Cancel, Cancelled, Progress

Piece = TypeVar("Piece")
Result = TypeVar("Result")

_ROWS_FOR_ONE = 1 << 15  # a pass over so many is over before other threads have begun
_LOOK_SECONDS = 0.1  # a caller is told, and asked whether to go on, this often


class Watch:
    """Passes progress on and cancellation in, several times a second."""

    def __init__(self, on_progress: Progress | None, cancelled: Cancel | None) -> None:
        self.on_progress = on_progress
        self.cancelled = cancelled
        self._next = 0.0
        self.done = 0
        self.total = 0

    def look(self) -> None:
        """Raise Cancelled when the caller wants no more."""
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + _LOOK_SECONDS
        if self.cancelled is not None and self.cancelled():
            raise Cancelled("the enumeration was cancelled")
        if self.on_progress is not None and self.total:
            self.on_progress(self.done, self.total)

    def finish(self) -> None:
        if self.on_progress is not None:
            self.on_progress(max(self.total, 1), max(self.total, 1))


def core_count() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def cut(
    prefix_slices: NDArray[np.float64],
    prefix_cost: NDArray[np.float64],
    rows_of: Callable[[int], tuple[NDArray[np.float64], NDArray[np.float64]]],
    together: NDArray[np.int64] | None = None,
    *,
    most_slices: float,
    most_cost: float,
) -> list[NDArray[np.int64]]:
    """Pieces (first prefix, last prefix, first row, last row) (4,) in canonical order.

    Each prefix has an upper bound of its slices and a cost, (P,) each; a prefix that is too much for one piece is cut
    by the rows of its joint count, whose bounds and costs `rows_of` gives by position of the item, (I,) each. Prefixes
    `together` (U + 1,), from one of these to the next, are counted at once and never cut.
    """
    every_row = np.iinfo(np.int32).max
    ends = np.arange(len(prefix_slices) + 1) if together is None else together
    slices, costs = (np.cumsum(values)[ends[1:] - 1].tolist() for values in (prefix_slices, prefix_cost))
    pieces: list[NDArray[np.int64]] = []
    start = 0
    while start < len(slices):
        stop = _reach(slices, start, most_slices, costs, most_cost)
        if stop > start or together is not None:
            stop = max(stop, start + 1)
            pieces.append(np.array([ends[start], ends[stop], 0, every_row]))
        else:
            stop = start + 1
            row_slices, row_costs = (np.cumsum(values).tolist() for values in rows_of(start))
            row = 0
            while row < len(row_slices):
                end = max(row + 1, _reach(row_slices, row, most_slices, row_costs, most_cost))
                pieces.append(np.array([start, stop, row, end]))
                row = end
        start = stop
    return pieces


def _reach(a: list[float], start: int, most_a: float, b: list[float], most_b: float) -> int:
    """First index past `start` at which one of the running sums has grown by more than its limit."""
    base_a, base_b = (a[start - 1], b[start - 1]) if start else (0.0, 0.0)
    return min(bisect_right(a, base_a + most_a), bisect_right(b, base_b + most_b))


@cache
def pool(threads: int) -> ThreadPoolExecutor:
    """So many threads, for all who ask: to start one takes as long as a piece of work. What they do may wait only for
    what another thread has begun.
    """
    return ThreadPoolExecutor(threads, thread_name_prefix="slices")


def in_parts(n_rows: int, work: Callable[[int, int], Result]) -> list[Result]:
    """What `work` returns for rows begin to end - 1, of which there are as many parts as cores where rows are many."""
    n_parts = core_count() if n_rows > _ROWS_FOR_ONE else 1
    bounds = [n_rows * p // n_parts for p in range(n_parts + 1)]
    others = [pool(n_parts).submit(work, *bounds[p : p + 2]) for p in range(1, n_parts)]
    try:
        results = [work(0, bounds[1])]
        for p, other in enumerate(others, start=1):
            # Whoever calls this may be one of these threads, and hold up the rest: what none has begun is done here.
            results.append(work(*bounds[p : p + 2]) if other.cancel() else other.result())
        return results
    finally:
        wait([other for other in others if not other.cancel()])


class Idle(Generic[Result]):
    """Things that one thread uses at a time, made when all are in use."""

    def __init__(self, make: Callable[[], Result]) -> None:
        self._make = make
        self._idle: deque[Result] = deque()

    @contextmanager
    def one(self) -> Iterator[Result]:
        thing = self.take()
        try:
            yield thing
        finally:
            self.give(thing)

    def take(self) -> Result:
        try:
            return self._idle.pop()
        except IndexError:
            return self._make()

    def give(self, thing: Result) -> None:
        self._idle.append(thing)


def looking(look: Callable[[], None], work: Callable[[], Result]) -> Result:
    """What `work` returns, several times a second asking `look`, which raises where nobody waits for it any more."""
    other = ThreadPoolExecutor(1)
    try:
        result = other.submit(work)
        while not wait((result,), timeout=_LOOK_SECONDS).done:
            look()
        return result.result()
    finally:
        other.shutdown(wait=False)


class Crew:
    """Threads that do pieces of work; the kernels release the GIL."""

    def __init__(self, threads: int, watch: Watch) -> None:
        self.threads = threads
        self._watch = watch

    def each(self, pieces: Sequence[Piece], work: Callable[[Piece], Result]) -> Iterator[Result]:
        """Results of `work` in the order of `pieces`, a few of them ahead of the reader."""
        if self.threads == 1 or len(pieces) < 2:
            for piece in pieces:
                self._watch.look()
                yield work(piece)
            return
        ahead: deque[Future[Result]] = deque()
        try:
            for piece in pieces:
                ahead.append(pool(self.threads).submit(work, piece))
                if len(ahead) > self.threads:
                    yield self._first(ahead)
            while ahead:
                yield self._first(ahead)
        finally:
            wait([future for future in ahead if not future.cancel()])

    def _first(self, ahead: deque[Future[Result]]) -> Result:
        """The first result of those ahead, which stays among them while it is waited for: a caller may cancel."""
        while not wait((ahead[0],), timeout=_LOOK_SECONDS).done:
            self._watch.look()
        self._watch.look()
        return ahead.popleft().result()

    def place(
        self,
        pieces: Sequence[Piece],
        work: Callable[[Piece], Result],
        place: Callable[[Result], Callable[[], None]],
    ) -> None:
        """Do `work` for all `pieces`; `place` gets the results in their order, and what it returns is called beside.

        Threads take the pieces by themselves, this one among them: to be handed each would take longer than some last.
        """
        line = _Line(pieces, work, place, ahead=2 * self.threads)
        others = [pool(self.threads).submit(line.help, lambda: None) for _ in range(min(self.threads, len(pieces)) - 1)]
        try:
            line.help(self._watch.look)
            others = [other for other in others if not other.cancel()]
            while wait(others, timeout=_LOOK_SECONDS).not_done:
                line.look(self._watch.look)
        finally:
            wait([other for other in others if not other.cancel()])
        line.check()


class _Line(Generic[Piece, Result]):
    """Pieces of work that threads take in turn, and their results, which wait for those before them."""

    def __init__(
        self,
        pieces: Sequence[Piece],
        work: Callable[[Piece], Result],
        place: Callable[[Result], Callable[[], None]],
        ahead: int,
    ) -> None:
        self._pieces, self._work, self._place, self._ahead = pieces, work, place, ahead
        self._taken, self._placed = 0, 0
        self._done: dict[int, Result] = {}
        self._failed: BaseException | None = None
        self._moved = Condition()

    def help(self, look: Callable[[], None]) -> None:
        """Take pieces until there are no more, or one has failed; `look` may raise."""
        try:
            while (number := self._next(look)) is not None:
                look()
                result = self._work(self._pieces[number])
                for then in self._give(number, result):
                    then()
        except BaseException as error:  # noqa: BLE001  # raised by `check`, in the thread that asked
            self._stop(error)

    def look(self, look: Callable[[], None]) -> None:
        """Where `look` raises, the others stop."""
        try:
            look()
        except BaseException as error:  # noqa: BLE001  # raised by `check`, as what the others meet
            self._stop(error)

    def _stop(self, error: BaseException) -> None:
        with self._moved:
            self._failed = self._failed or error
            self._moved.notify_all()

    def check(self) -> None:
        """Raise what a thread has met."""
        if self._failed is not None:
            raise self._failed

    def _next(self, look: Callable[[], None]) -> int | None:
        """The number of a piece that nobody has taken; few results wait for one that takes long."""
        with self._moved:
            while self._failed is None and self._taken < len(self._pieces):
                if self._taken < self._placed + self._ahead:
                    self._taken += 1
                    return self._taken - 1
                self._moved.wait(_LOOK_SECONDS)
                look()
            return None

    def _give(self, number: int, result: Result) -> list[Callable[[], None]]:
        """Hand in a result; what there is to do for those whose turn has come."""
        with self._moved:
            self._done[number] = result
            then = []
            while self._failed is None and self._placed in self._done:
                then.append(self._place(self._done.pop(self._placed)))
                self._placed += 1
            if then:
                self._moved.notify_all()
            return then
