"""Memory that is freed stays with the process, for the next request."""

from __future__ import annotations

import ctypes

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
