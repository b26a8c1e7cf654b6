"""Picks that differ from each other: k-center over vectors, and near-copies told by their pixels."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from shared.errors import InvalidInput, NotFound
from shared.images.reader import RGB

NEAR_BITS = 16  # of 256: copies that were scaled or compressed anew differ in fewer
_SIDE = 16
_BLOCK_CELLS = 1 << 24  # floats held at once beside the vectors

Floats = NDArray[np.float32]
Accept = Callable[[int], bool]


def k_center(
    vectors: Floats, known: Floats, budget: int, order: NDArray[np.int64], accept: Accept
) -> NDArray[np.int64]:
    """Greedy k-center (core-set; Sener and Savarese 2018): each pick is the row farthest from all picks and `known`.

    vectors (N, D) and known (L, D) float32, D >= 1, in one space; L may be 0, then the first row of `order` begins.
    order (N,) puts rows first that are equally far; what `accept` refuses is passed over. At most `budget` rows.
    """
    ordered = vectors[order]
    squares = np.einsum("ij,ij->i", ordered, ordered)
    distance = np.full(len(ordered), np.inf, np.float32)
    step = max(1, _BLOCK_CELLS // max(1, len(ordered)))
    for start in range(0, len(known), step):
        part = known[start : start + step]
        apart = squares[:, None] + np.einsum("ij,ij->i", part, part) - 2 * (ordered @ part.T)
        distance = np.minimum(distance, apart.min(axis=1))
    picks: list[int] = []
    while len(picks) < budget:
        place = int(distance.argmax())
        if distance[place] == -np.inf:
            break
        row = int(order[place])
        if accept(row):
            picks.append(row)
            apart = squares + squares[place] - 2 * (ordered @ ordered[place])
            np.minimum(distance, apart, out=distance, where=distance > -np.inf)
        distance[place] = -np.inf
    return np.array(picks, np.int64)


def tag_vectors(codes: NDArray[np.uint16], tag_counts: NDArray[np.int64]) -> Floats:
    """(N, all tags) float32, 1 where an instance has the tag: the squared distance is twice the number of attributes in
    which two instances differ; an unknown tag differs from each by half."""
    offsets = np.cumsum(tag_counts) - tag_counts
    vectors = np.zeros((len(codes), int(tag_counts.sum())), np.float32)
    for column, count in enumerate(tag_counts.tolist()):
        rows = np.flatnonzero(codes[:, column] < count)
        vectors[rows, offsets[column] + codes[rows, column]] = 1.0
    return vectors


def picture_hash(image: RGB) -> NDArray[np.uint64]:
    """(4,) 256 bits of an image (H, W, 3) uint8: where grey grows lighter to the right, on a grid of 16 x 16."""
    grey = Image.fromarray(image).convert("L").resize((_SIDE + 1, _SIDE), Image.Resampling.BOX)
    values = np.asarray(grey, dtype=np.int16)
    return np.packbits(values[:, 1:] > values[:, :-1]).view(np.uint64)


class Distinct:
    """Says for one image after the other whether it differs from all that were kept before it."""

    def __init__(self, open_image: Callable[[int], RGB]) -> None:
        self._open = open_image
        self._hashes = np.empty((64, _SIDE * _SIDE // 64), np.uint64)
        self._kept = 0
        self.copies = 0
        self.unreadable = 0

    def keep(self, row: int) -> bool:
        """Whether the image of `row` can be read and is no near-copy of one that was kept; it is kept then."""
        try:
            found = picture_hash(self._open(row))
        except (InvalidInput, NotFound):
            self.unreadable += 1
            return False
        if (np.bitwise_count(self._hashes[: self._kept] ^ found).sum(axis=1) < NEAR_BITS).any():
            self.copies += 1
            return False
        if self._kept == len(self._hashes):
            self._hashes = np.concatenate([self._hashes, np.empty_like(self._hashes)])
        self._hashes[self._kept] = found
        self._kept += 1
        return True
