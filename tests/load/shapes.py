"""Seeded tables in the shapes that the paper measures on, and one like a real table of binary factors."""

from __future__ import annotations

from dataclasses import dataclass
from math import comb
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

# How often each of the 16 factors holds: two on most images, the rest rare, as people label ImageNet photos.
_FACTOR_SHARES = (0.78, 0.66, 0.38, 0.31, 0.14, 0.12, 0.11, 0.09, 0.07, 0.05, 0.04, 0.04, 0.03, 0.02, 0.02, 0.01)
_N_CLASSES = 17


@dataclass(frozen=True)
class Table:
    """Codes (N, A) uint8, tag counts (A,) int64, one column of 0/1 scores (N, 1) float64."""

    codes: NDArray[np.uint8]
    tag_counts: NDArray[np.int64]
    scores: NDArray[np.float64]

    @property
    def offsets(self) -> NDArray[np.int64]:
        """First item of each attribute and, last, the number of items: (A + 1,) int64."""
        return np.concatenate(([0], np.cumsum(self.tag_counts)))

    def row_sets(self, max_depth: int) -> int:
        """Rows x attribute sets of at most `max_depth` attributes: what counting one by one has to touch."""
        n_rows, n_attributes = self.codes.shape
        return n_rows * sum(comb(n_attributes, d) for d in range(1, max_depth + 1))

    def save(self, path: Path) -> None:
        np.savez(path, codes=self.codes, tag_counts=self.tag_counts, scores=self.scores)

    @staticmethod
    def load(path: Path) -> Table:
        with np.load(path) as arrays:
            return Table(arrays["codes"], arrays["tag_counts"], arrays["scores"])


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


def binary_table(
    n_rows: int = 50_000, seed: int = 0
) -> tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.float64]]:
    """The same three for 16 yes/no factors, most of them rare, and a class of 17 tags: (N, 17).

    A factor is likelier in some classes than in others. About 76% of the scores are 1, fewer where more factors hold.
    """
    rng = np.random.default_rng(seed)
    label = rng.choice(_N_CLASSES, n_rows, p=rng.dirichlet(np.full(_N_CLASSES, 3.0)))
    codes = np.empty((n_rows, len(_FACTOR_SHARES) + 1), dtype=np.uint8)
    codes[:, -1] = label
    for a, share in enumerate(_FACTOR_SHARES):
        of_class = np.clip(share * rng.lognormal(sigma=0.4, size=_N_CLASSES), 0.0, 0.95)
        codes[:, a] = rng.random(n_rows) < of_class[label]
    risk = codes[:, 2:-1].sum(axis=1) * 0.5 + rng.normal(size=_N_CLASSES)[label] * 0.5 + rng.normal(size=n_rows)
    scores = (risk < np.quantile(risk, 0.76)).astype(np.float64)[:, None]
    return codes, np.array([2] * len(_FACTOR_SHARES) + [_N_CLASSES]), scores
