"""Copies past the cache put what they copy where it belongs, and nothing anywhere else."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.enumeration import engine, walk
from services.enumeration.streaming import stream
from tests.unit.enumeration.tables import tables


@given(
    dtype=st.sampled_from([np.int16, np.int32, np.float64]),
    width=st.sampled_from([None, 1, 3, 4]),
    n=st.integers(0, 200),
    first=st.integers(0, 40),
    skip=st.integers(0, 9),
    after=st.integers(0, 40),
)
def test_lines_go_to_their_place_whatever_line_of_memory_they_begin_in(dtype, width, n, first, skip, after):
    shape = () if width is None else (width,)
    source = np.arange(1, 1 + (n + skip) * (width or 1)).astype(dtype).reshape(n + skip, *shape)[skip:]
    target = np.zeros((first + n + after, *shape), dtype=dtype)
    stream(source, target, first)
    assert (target[first : first + n] == source).all()
    assert not target[:first].any()
    assert not target[first + n :].any()


@given(tables())
def test_a_large_result_is_what_a_small_one_is(table):
    request = {"min_count": table.min_count, "max_depth": table.max_depth}
    usual = engine.enumerate_slices(table.codes, table.tag_counts, table.scores, **request)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(walk, "STREAMED_BYTES", 0)
        large = engine.enumerate_slices(table.codes, table.tag_counts, table.scores, **request)
    for name in ("items", "count", "scored", "total"):
        np.testing.assert_array_equal(getattr(large, name), getattr(usual, name))
