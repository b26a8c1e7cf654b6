"""Runs rivals in turn, each in a process of its own that is killed when it takes too long."""

from __future__ import annotations

import gc
import multiprocessing
import os
import resource
import statistics
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from services.enumeration.allocator import keep_freed_memory
from tests.load.found import Fingerprint, Found, fingerprint, items_of
from tests.load.rivals import RIVALS, Rival
from tests.load.samples import Disagreement
from tests.load.shapes import Table, paper_table

_SPAWN = multiprocessing.get_context("spawn")  # a rival's threads and imports stay its own
AGAIN_S, STEADY_S = 10.0, 0.5
_AT_ONCE = 2  # slow rivals, a core each
_READ_LIMIT_S = 300.0  # for making its input and for reading its result, neither of which counts


@dataclass
class Outcome:
    """What came of one rival on one table."""

    name: str
    seconds: list[float] = field(default_factory=list)
    found: Fingerprint | None = None
    problem: str | None = None

    @property
    def median(self) -> float | None:
        return statistics.median(self.seconds) if self.seconds else None


def contest(
    table: Table,
    names: Sequence[str],
    scratch: Path,
    *,
    min_count: int,
    max_depth: int,
    limit_s: float,
    rounds: int,
    enough_s: float,
) -> list[Outcome]:
    """Each of `names` up to `rounds` times, taking turns; the others are checked against the first.

    A rival that has run `enough_s` in all drops out of the later rounds, and one that takes longer than `limit_s` is
    killed. Slow ones, which use one core, run once, after the others, two at a time. A run of less than AGAIN_S is made
    again at once, and again until STEADY_S are used, and the median of these counts: a virtual machine that gives free
    pages back to its host gets them again at forty times the price, and a core that was idle is slow at first, which is
    nobody's speed. Raises Disagreement when slices, counts or sums differ.
    """
    path = scratch / "table.npz"
    table.save(path)
    outcomes = {name: Outcome(name) for name in names}
    runners: dict[str, _Runner] = {}

    def turn(name: str) -> None:
        outcome = outcomes[name]
        if name not in runners:
            runners[name] = _Runner(name, path, min_count, max_depth)
        try:
            seconds, found = runners[name].run(limit_s, read=not outcome.seconds)
            outcome.seconds.append(seconds)
            outcome.found = found or outcome.found
        except Stopped as stopped:
            outcome.problem = str(stopped)
        if RIVALS[name].slow or outcome.problem or sum(outcome.seconds) >= enough_s:
            runners.pop(name).stop()

    slow = [name for name in names if RIVALS[name].slow]
    in_turn = [name for name in names if name not in slow]
    try:
        for number in range(rounds):
            for name in in_turn:
                if number == 0 or name in runners:
                    turn(name)
        for runner in runners.values():
            runner.stop()
        runners.clear()
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            list(pool.map(turn, slow))
    finally:
        for runner in runners.values():
            runner.stop()
    _compare(outcomes, names)
    return list(outcomes.values())


def _compare(outcomes: dict[str, Outcome], names: Sequence[str]) -> None:
    first = outcomes[names[0]]
    if first.found is None:
        raise Disagreement(f"{first.name}: {first.problem}")
    for name in names[1:]:
        found = outcomes[name].found
        if found is not None and RIVALS[name].lists_all and (difference := found.disagrees(first.found)):
            raise Disagreement(f"{name} and {first.name}: {difference}")


class Stopped(Exception):
    """A rival did not get to its end; says why."""


class _Runner:
    def __init__(self, name: str, path: Path, min_count: int, max_depth: int) -> None:
        self._pipe, theirs = _SPAWN.Pipe()
        self._process = _SPAWN.Process(target=_work, args=(theirs, name, path, min_count, max_depth), daemon=True)
        self._process.start()
        theirs.close()
        self._ready = False

    def run(self, limit_s: float, *, read: bool) -> tuple[float, Fingerprint | None]:
        """Seconds of one run and, if `read`, the fingerprint of what it found."""
        if not self._ready:
            self._receive(_READ_LIMIT_S, f"its input was not ready in {_READ_LIMIT_S:.0f} s")
            self._ready = True
        self._pipe.send(read)
        seconds: float = self._receive(limit_s, f"not finished in {limit_s:g} s")
        found = self._receive(_READ_LIMIT_S, "its result could not be read in time") if read else None
        return seconds, found

    def _receive(self, limit_s: float, late: str) -> Any:
        if not self._pipe.poll(limit_s):
            raise Stopped(late)
        try:
            kind, value = self._pipe.recv()
        except EOFError:
            raise Stopped("its process died") from None
        if kind == "failed":
            raise Stopped(value)
        return value

    def stop(self) -> None:
        self._process.kill()
        self._process.join()
        self._pipe.close()


def _work(pipe: Connection, name: str, path: Path, min_count: int, max_depth: int) -> None:
    """The process of one rival: makes its input, then runs whenever it is asked to."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    resource.setrlimit(resource.RLIMIT_DATA, (memory * 7 // 10,) * 2)  # a rival that fills the machine fails alone
    try:
        warnings.simplefilter("ignore")  # what a rival deprecates is not news here
        keep_freed_memory()  # as the service does
        table, rival = Table.load(path), RIVALS[name]
        run, read = rival.prepare(table, min_count, max_depth)
        _warm(rival)
        gc.disable()  # a collector that walks millions of tuples would be counted against their maker
        pipe.send(("ready", None))
        while True:
            wanted = pipe.recv()
            result, took = _timed(run)
            if took < AGAIN_S:
                del result
                gc.collect()
                result, took = _steady(run)
            pipe.send(("ran", took))
            if wanted:
                found = read(result)
                if not rival.lists_all:
                    check_counts(table, found, max_depth)
                pipe.send(("found", fingerprint(found)))
                del found
            del result
            gc.collect()
    except EOFError:
        return
    except ImportError as error:
        pipe.send(("failed", f"not installed ({error})"))
    except MemoryError:
        pipe.send(("failed", "ran out of memory"))
    except Exception as error:  # noqa: BLE001 - whatever goes wrong in a rival is said in its place
        traceback.print_exc()
        pipe.send(("failed", f"failed: {type(error).__name__}: {error}"[:200]))


def _timed(run: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    result = run()
    return result, time.perf_counter() - start


def _steady(run: Callable[[], Any]) -> tuple[Any, float]:
    """The last result, and the median of as many runs as STEADY_S hold, or of one."""
    result, took = _timed(run)
    times = [took]
    while sum(times) + took < STEADY_S:
        del result
        result, took = _timed(run)
        times.append(took)
    return result, statistics.median(times)


def _warm(rival: Rival) -> None:
    """One run on a small table: imports and compilation are nobody's speed."""
    run, _ = rival.prepare(Table(*paper_table(300, 6)), 10, 3)
    run()


def check_counts(table: Table, found: Found, max_depth: int) -> None:
    """Raise Disagreement unless each of `found` has the count and the sum that a look at the table gives."""
    items = items_of(found.keys, int(table.offsets[-1]), max_depth)
    attribute = np.repeat(np.arange(len(table.tag_counts)), table.tag_counts)
    for number, line in enumerate(items):
        member = np.ones(len(table.codes), dtype=bool)
        for item in line[line >= 0]:
            member &= table.codes[:, attribute[item]] == item - table.offsets[attribute[item]]
        seen = int(member.sum()), round(table.scores[member, 0].sum())
        told = int(found.count[number]), None if found.total is None else int(found.total[number])
        if seen[0] != told[0] or told[1] not in (None, seen[1]):
            raise Disagreement(f"items {line.tolist()} have count and sum {seen}, not {told}")
