"""Memory that is freed stays with the process, for the next request."""

from __future__ import annotations

import ctypes
import math
import mmap
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import DTypeLike, NDArray

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # as in malloc.h of glibc
_KEPT_BYTES = 64 << 20  # of what is free at the end of an arena
_LARGEST_BYTES = 32 << 20  # of what comes from an arena; glibc takes no more


def keep_freed_memory() -> None:
    """Have this process keep some of the memory that it frees, where its C library is glibc.

    New pages cost as much as all that is written to them: a third of the time of a small enumeration, which has some
    megabytes to work in and to put its slices in. glibc gives these back to the system whenever they are free.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(_MMAP_THRESHOLD, _LARGEST_BYTES)
    mallopt(_TRIM_THRESHOLD, _KEPT_BYTES)


def from_arrow(shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
    """An array with nothing in it, of Arrow's memory, which keeps also large pieces for a while when they are free.

    The system clears pages before it hands them out, which takes longer than to write millions of slices to them.
    Raises MemoryError.
    """
    kind = np.dtype(dtype)
    size = math.prod(shape)
    return np.frombuffer(pa.allocate_buffer(size * kind.itemsize), dtype=kind, count=size).reshape(shape)


def as_it_fills(shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
    """An array of which what is written takes memory, to the next 4096 bytes: for what is small, but may be large.

    Where numpy has it, the system hands memory out in two megabytes at a time. Raises MemoryError.
    """
    kind = np.dtype(dtype)
    size = math.prod(shape)
    try:
        pages = mmap.mmap(-1, max(1, size * kind.itemsize), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError from error
    return np.frombuffer(pages, dtype=kind, count=size).reshape(shape)
