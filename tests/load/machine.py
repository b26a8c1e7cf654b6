"""What the machine allows: memory taken by one call, and the speed of the simplest loops that counting is made of."""

from __future__ import annotations

import mmap
import multiprocessing
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from numba import njit

_SPAWN = multiprocessing.get_context("spawn")
_PAGE = os.sysconf("SC_PAGE_SIZE")
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Peak:
    """Bytes of a call: `above_start` at its highest over what the process held before, `output` in its result."""

    above_start: int
    output: int


def peak_of(call: Callable[..., Any], warm: tuple[Any, ...], arguments: tuple[Any, ...]) -> Peak:
    """The peak of `call(*arguments)` in a process of its own, after `call(*warm)` has loaded what it needs.

    `call` returns the bytes of its result, which it must hold till then.
    """
    pipe, theirs = _SPAWN.Pipe()
    process = _SPAWN.Process(target=_measure, args=(theirs, call, warm, arguments), daemon=True)
    process.start()
    theirs.close()
    try:
        peak: Peak = pipe.recv()
    finally:
        process.join()
    return peak


def _measure(pipe: Connection, call: Callable[..., Any], warm: tuple[Any, ...], arguments: tuple[Any, ...]) -> None:
    call(*warm)
    _CLEAR.write_text("5")  # the high water mark starts again from what is held now
    before = _status("VmRSS")
    output = call(*arguments)
    pipe.send(Peak(_status("VmHWM") - before, output))


def _status(name: str) -> int:
    """Bytes that the kernel reports for this process."""
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(name + ":"))
    return int(line.split()[1]) * 1024


def touch_memory() -> None:
    """Write to most of the free memory once: a virtual machine gets its pages from the host when first touched, at ten
    times and more what they cost later, and whoever runs first would pay for all."""
    pages = os.sysconf("SC_AVPHYS_PAGES") * 8 // 10
    held = np.empty(pages * _PAGE, dtype=np.uint8)
    held[::_PAGE] = 1


@dataclass(frozen=True)
class Limits:
    """One core: seconds to add a row's score to a small table in cache, and bytes a second that are copied."""

    update_s: float
    copied_bytes_per_s: float


def limits() -> Limits:
    """The best of several passes over arrays that do not fit the cache (copy), and that do (updates)."""
    rng = np.random.default_rng(0)
    cells = rng.integers(0, 1_000, 1 << 16).astype(np.uint16)
    values = rng.integers(0, 1 << 20, 1 << 16)
    sums = np.zeros(1_000, dtype=np.int64)
    _add(cells, values, sums)
    update = min(_timed(lambda: _add(cells, values, sums)) for _ in range(50)) / cells.size
    source = np.ones(1 << 25, dtype=np.int64)
    target = np.zeros_like(source)
    copied = min(_timed(lambda: np.copyto(target, source)) for _ in range(5))
    return Limits(update, source.nbytes / copied)


def written(n_bytes: int) -> float:
    """Seconds in which one core fills so many bytes that the process has never had before, in pages as numpy asks for
    them; the best of 3."""

    def fill() -> None:
        with mmap.mmap(-1, n_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as pages:
            pages.madvise(mmap.MADV_HUGEPAGE)
            np.frombuffer(pages, dtype=np.uint8)[:] = 1

    return min(_timed(fill) for _ in range(3))


def _timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


@njit(nogil=True)
def _add(cells: Any, values: Any, sums: Any) -> None:
    for i in range(cells.size):
        sums[cells[i]] += values[i]
