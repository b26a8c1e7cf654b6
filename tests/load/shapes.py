"""Seeded tables in the shapes that the paper measures on."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def paper_table(
    n_rows: int = 7_057, n_attributes: int = 47, seed: int = 0
) -> tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.float64]]:
    """Codes (N, A) uint8, tag counts (A,) and one 0/1 score column (N, 1): 2 to 6 skewed, correlated tags.

    Attributes follow a few hidden scene factors, which also make the model fail, so that the table has the mixed
    joint counts of tagged images. About 78% of the scores are 1.
    """
    rng = np.random.default_rng(seed)
    factors = rng.normal(size=(n_rows, 6))
    tag_counts = rng.integers(2, 7, n_attributes)
    codes = np.empty((n_rows, n_attributes), dtype=np.uint8)
    for a, n_tags in enumerate(tag_counts):
        mix = rng.normal(size=6) * 0.35
        latent = factors @ mix + rng.normal(size=n_rows)
        weights = rng.dirichlet(np.full(n_tags, 2.0))
        edges = np.quantile(latent, np.cumsum(weights)[:-1])
        codes[:, a] = rng.permutation(n_tags)[np.searchsorted(edges, latent, side="right")]
    risk = factors @ (rng.normal(size=6) * 0.5) + rng.normal(size=n_rows)
    scores = (risk < np.quantile(risk, 0.78)).astype(np.float64)[:, None]
    return codes, tag_counts, scores
