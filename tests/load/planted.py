"""Tables with known faults, and how well a list of slices finds them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

NEAR = 0.8  # Jaccard similarity from which a slice counts as the planted one
_SHARES = (0.02, 0.08)  # of all instances, that a planted conjunction holds
_TRIES = 2_000


@dataclass(frozen=True)
class Planted:
    """One table with faults.

    codes: (N, A), as a tagger with noise sees it. scores: (N,) 0/1. risk: (N,) the true error rate of each instance.
    conjunctions: items of each fault. member: (N, P) bool, rows of each fault as `codes` shows them.
    """

    codes: NDArray[np.uint8]
    scores: NDArray[np.float64]
    risk: NDArray[np.float64]
    conjunctions: list[tuple[int, ...]]
    member: NDArray[np.bool_]


def plant(
    codes: NDArray[np.uint8],
    tag_counts: NDArray[np.int64],
    rng: np.random.Generator,
    *,
    conjunctions: int,
    tags: int,
    base_error: float,
    raised_by: float,
    noise: float,
) -> Planted:
    """Raise the error rate where one of `conjunctions` conjunctions of `tags` tags holds, then blur the tags.

    No two conjunctions use the same attribute. Each true conjunction holds 2 to 8% of the rows. With `noise` a cell is
    given another tag of its attribute, after the scores were drawn from the true tags.
    """
    faults = _conjunctions(codes, tag_counts, rng, conjunctions, tags)
    held = _members(codes, tag_counts, faults).any(axis=1)
    risk = np.where(held, base_error + raised_by, base_error)
    scores = (rng.random(len(codes)) >= risk).astype(np.float64)
    moved = rng.random(codes.shape) < noise
    step = 1 + rng.integers(0, np.maximum(tag_counts - 1, 1), codes.shape)
    seen = np.where(moved, (codes + step) % tag_counts, codes).astype(codes.dtype)
    return Planted(seen, scores, risk, faults, _members(seen, tag_counts, faults))


def _conjunctions(
    codes: NDArray[np.uint8], tag_counts: NDArray[np.int64], rng: np.random.Generator, how_many: int, tags: int
) -> list[tuple[int, ...]]:
    offsets = np.concatenate(([0], np.cumsum(tag_counts)))
    faults: list[tuple[int, ...]] = []
    free = np.arange(len(tag_counts))
    for _ in range(_TRIES):
        attributes = rng.permutation(free)[:tags]
        items = tuple(sorted(int(offsets[a] + rng.integers(tag_counts[a])) for a in attributes))
        share = _members(codes, tag_counts, [items]).mean()
        if _SHARES[0] <= share <= _SHARES[1]:
            faults.append(items)
            free = np.setdiff1d(free, attributes)
        if len(faults) == how_many:
            return faults
        if len(free) < tags:
            break
    raise ValueError(f"no {how_many} conjunctions of {tags} tags hold {_SHARES[0]:.0%} to {_SHARES[1]:.0%} of the rows")


def _members(
    codes: NDArray[np.uint8], tag_counts: NDArray[np.int64], faults: list[tuple[int, ...]]
) -> NDArray[np.bool_]:
    offsets = np.concatenate(([0], np.cumsum(tag_counts)))
    member = np.ones((len(codes), len(faults)), dtype=bool)
    for p, items in enumerate(faults):
        for item in items:
            a = int(np.searchsorted(offsets, item, side="right")) - 1
            member[:, p] &= codes[:, a] == item - offsets[a]
    return member


@dataclass(frozen=True)
class Listed:
    """L slices in the order that a method lists them.

    count: (L,) rows. shared: (L, P) of those, rows of each fault. risk: (L,) mean true error rate of the rows.
    """

    count: NDArray[np.int64]
    shared: NDArray[np.int64]
    risk: NDArray[np.float64]


@dataclass(frozen=True)
class Recovery:
    """What a list holds of P faults.

    exact, near, near_in_10: share of the faults whose very rows, rows with Jaccard >= 0.8, and these among the first
    10, are listed. first_hit: rank, from 1, of the first slice near to any fault; None when there is none.
    false_share: part of the list whose rows are no likelier to fail, by their true error rate, than all rows; 0
    for an empty list, as a false discovery rate counts it.
    """

    listed: int
    exact: float
    near: float
    near_in_10: float
    first_hit: int | None
    false_share: float


def recovery(listed: Listed, planted: Planted) -> Recovery:
    """Compare a list with what was planted."""
    jaccard = listed.shared / (listed.count[:, None] + planted.member.sum(axis=0) - listed.shared)
    near = jaccard >= NEAR
    hits = np.flatnonzero(near.any(axis=1))
    return Recovery(
        listed=len(listed.count),
        exact=float((jaccard == 1.0).any(axis=0).mean()),
        near=float(near.any(axis=0).mean()),
        near_in_10=float(near[:10].any(axis=0).mean()),
        first_hit=int(hits[0]) + 1 if hits.size else None,
        false_share=float((listed.risk <= planted.risk.mean() + 1e-9).mean()) if len(listed.count) else 0.0,
    )
