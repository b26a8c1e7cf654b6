"""Compiles every kernel, so that the first request does not wait for it.

    python -m services.enumeration.warm

Run when an image is built: what is compiled is stored beside the source and read from there, also when the file
system is read-only by then.
"""

from __future__ import annotations

import time
from typing import cast

import numpy as np

from services.enumeration import engine, walk
from services.enumeration.bitset_kernel import FILLS, BitSets
from services.enumeration.emission import Lines
from services.enumeration.encoding import encode
from services.enumeration.lattice import Codes
from services.enumeration.level import level_of
from services.enumeration.streaming import stream


def warm() -> None:
    """Call every kernel with every type of codes and items it is called with."""
    rng = np.random.default_rng(0)
    scores = np.where(rng.random((300, 2)) < 0.1, np.nan, rng.random((300, 2)))
    right = np.round(rng.random((300, 1)))  # 0 and 1, and none missing: of types of their own
    few, many = [3] * 5, [3] * 4 + [40_000]  # tags whose numbers fit two bytes, and some that do not
    for dtype, tag_counts in ((np.uint8, few), (np.uint16, few), (np.uint8, many), (np.uint16, many)):
        codes = cast(Codes, rng.integers(0, 3, (300, 5)).astype(dtype))
        table = encode(codes, tag_counts, scores, 5)
        level = level_of(table, 2, np.zeros((1, 0), dtype=np.int32), np.array([300]), 5, walk.NO_ITEM)
        lines = Lines(1000, 2, sum(tag_counts), 2, True)
        for kernel in walk.KERNELS:
            kernel(table, 2).fill(level, np.array([0, 1, 0, table.n_items]), lines)
        bit_sets = BitSets(table, 3)
        level = level_of(table, 3, np.zeros((0, 1), dtype=np.int32), np.zeros(0, dtype=np.int64), 5, walk.NO_ITEM)
        for fill in FILLS:
            bit_sets.fill_by(fill, level, np.zeros(4, dtype=np.int64), lines)
        for column in (lines.items, lines.count, lines.scored, lines.total):
            stream(column[:0], column, 0)
        for some in (scores, right):
            engine.error_slices(codes, tag_counts, some, min_count=5, max_depth=3, margin=0.0)


if __name__ == "__main__":
    started = time.perf_counter()
    warm()
    print(f"compiled in {time.perf_counter() - started:.1f} s")
