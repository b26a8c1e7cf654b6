"""Every slice of a table with at least M rows and at most D pairs, by compiled kernels (paper 4.1).

Depth by depth: the slices of d pairs are the frequent cells of joint counts, one for each slice of d - 2 pairs (the
prefix), over the items of later attributes. Prefixes in order give slices in order, so results stream, and nothing
is kept but the slices of d - 2 pairs. Which kernel counts is chosen for each depth by what it would cost.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from services.enumeration.bitset_kernel import BitSets
from services.enumeration.emission import SCORED, Lines, sums_of
from services.enumeration.encoding import Encoded, encode, item_sums
from services.enumeration.lattice import (
    MAX_SLICES,
    Cancel,
    Codes,
    Progress,
    Slices,
    Watch,
    estimate_slices,
    too_large,
)
from services.enumeration.request import Level, Request, level_of, most_slices
from services.enumeration.work_units import Crew, core_count, cut
from shared.errors import invalid

CHUNK_SLICES = 1 << 17  # about as many slices as one piece of work yields at most
PIECE_NANOSECONDS = 20e6  # and about as long as it takes at most


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
    """All slices of at most `max_depth` pairs with at least `min_count` rows, in one piece.

    As `stream_slices`; memory above the start is the result and at most 100 megabytes.
    """
    asked = _Asked(codes, tag_counts, scores, min_count, max_depth, must_hold, max_slices)
    return _join(asked, max_depth, threads, Watch(on_progress, cancelled))
