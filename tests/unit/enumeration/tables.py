"""Random tag tables for hypothesis."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st


@dataclass(frozen=True)
class Table:
    codes: np.ndarray
    tag_counts: np.ndarray
    scores: np.ndarray
    min_count: int
    max_depth: int


@st.composite
def tables(draw: st.DrawFn, values: tuple[float, ...] = (), max_rows: int = 150) -> Table:
    """Tables with constant, skewed and copied attributes, unknown codes, NaN scores, M above N and D above A.

    `values` are the scores that occur; any in [0, 1] when empty.
    """
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n_rows = draw(st.integers(0, max_rows))
    tag_counts = np.array(draw(st.lists(st.integers(1, 4), min_size=1, max_size=5)))
    dtype = draw(st.sampled_from((np.uint8, np.uint16)))
    codes = np.zeros((n_rows, len(tag_counts)), dtype=dtype)
    for a, n_tags in enumerate(tag_counts):
        codes[:, a] = rng.choice(n_tags, n_rows, p=rng.dirichlet(np.ones(n_tags)))
        if a and draw(st.booleans()):
            copied = rng.random(n_rows) < 0.9
            codes[copied, a] = np.minimum(codes[copied, a - 1], n_tags - 1)
    unknown = rng.random(codes.shape) < draw(st.sampled_from((0.0, 0.2)))
    codes[unknown] = draw(st.sampled_from((np.iinfo(dtype).max, 4)))
    n_scores = draw(st.integers(1, 3))
    scores = rng.choice(values, (n_rows, n_scores)) if values else rng.random((n_rows, n_scores))
    scores[rng.random(scores.shape) < draw(st.sampled_from((0.0, 0.3)))] = np.nan
    return Table(codes, tag_counts, scores, draw(st.integers(1, 12)), draw(st.integers(1, 6)))
