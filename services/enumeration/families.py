"""Error slices in a form that is read: near-copies together, the errors they cover, and which tag is to blame.

The paper's slices overlap (A.1.7): one cause shows up as many slices. Everything here is about given slices, E
lines of items in rank order, and costs what those slices and their extents cost.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import csr_array

from services.enumeration.bitset import Words, pack, popcount, word_count
from services.enumeration.error_slices import Lattice
from services.enumeration.lattice import Codes, Items, Slices, item_offsets
from shared.errors import TooLarge

Look = Callable[[], None]

MAX_BYTES = 1 << 30  # of all extents together

_BLOCK = 256  # slices compared at once
_BLOCK_CELLS = 1 << 24  # cells of the bit sets unpacked at once
_CHUNK_WORDS = 1 << 16  # words of the sets compared at once: half a megabyte, so that they stay in cache


@dataclass(frozen=True)
class Extents:
    """The rows of E slices, as bit sets and one after another.

    words: (E, w) uint64, as `bitset.pack` makes them. rows: (members,) int32, those of slice e ascending at
    rows[starts[e] : starts[e + 1]]. starts: (E + 1,) int64. n_rows: rows of the table.
    """

    words: Words
    rows: NDArray[np.int32]
    starts: NDArray[np.int64]
    n_rows: int

    def __len__(self) -> int:
        return len(self.words)

    @property
    def count(self) -> NDArray[np.int64]:
        """(E,) rows of each slice."""
        return np.diff(self.starts)

    def of(self, slice_: int) -> NDArray[np.int32]:
        """The rows of one slice."""
        return self.rows[self.starts[slice_] : self.starts[slice_ + 1]]

    def at(self, index: NDArray[np.int64]) -> Extents:
        """The extents of the slices at `index` (e,)."""
        count = self.count[index]
        starts = np.concatenate(([0], np.cumsum(count)))
        places = np.repeat(self.starts[index] - starts[:-1], count) + np.arange(int(starts[-1]))
        return Extents(self.words[index], self.rows[places], starts, self.n_rows)


def extents_of(codes: Codes, tag_counts: ArrayLike, items: Items, look: Look = lambda: None) -> Extents:
    """The rows of each slice: codes (N, A) and tag_counts (A,) as in `enumerate_slices`, items (E, D) padded with -1.

    Takes N / 8 bytes a slice and 4 a member; TooLarge when that is more than `MAX_BYTES`. `look` is called several
    times a second, here as below, and may raise.
    """
    offsets = item_offsets(tag_counts)
    used = np.unique(items[items >= 0])
    attribute = np.searchsorted(offsets, used, side="right") - 1
    width = word_count(len(codes))
    sets = np.empty((len(used) + 1, width), dtype=np.uint64)
    for line, (item, a) in enumerate(zip(used, attribute, strict=True)):
        sets[line] = pack((codes[:, a] == item - offsets[a])[None])[0]
    sets[-1] = pack(np.ones((1, len(codes)), dtype=np.bool_))[0]  # a missing pair leaves every row in
    line_of = np.where(items >= 0, np.searchsorted(used, items), len(used))
    size = 8 * width * len(items)
    _check_size(size, len(items))
    words = np.empty((len(items), width), dtype=np.uint64)
    rows, counts = [np.zeros(0, dtype=np.int32)], [np.zeros(1, dtype=np.int64)]
    step = max(1, _BLOCK_CELLS // max(1, len(codes)))
    for start in range(0, len(items), step):
        look()
        lines = line_of[start : start + step]
        block = words[start : start + step]
        block[:] = sets[lines[:, 0]]
        for column in range(1, items.shape[1]):
            block &= sets[lines[:, column]]
        counts.append(popcount(block))
        size += 4 * int(counts[-1].sum())
        _check_size(size, len(items))
        rows.append(_members(block))
    return Extents(words, np.concatenate(rows), np.cumsum(np.concatenate(counts)), len(codes))


def _members(block: Words) -> NDArray[np.int32]:
    """The rows of sets (e, w), one set after another; most words of a small slice are empty and passed over."""
    used = np.flatnonzero(block)
    bits = np.unpackbits(block.reshape(-1)[used].view(np.uint8), bitorder="little")
    word, bit = np.divmod(np.flatnonzero(bits.view(np.bool_)), 64)
    return np.asarray(used[word] % block.shape[1] * 64 + bit, dtype=np.int32)


def how_many_fit(n_rows: int, count: NDArray[np.signedinteger]) -> int:
    """Of slices with `count` (E,) rows each, how many of the first have extents of at most `MAX_BYTES`."""
    return int((np.cumsum(8 * word_count(n_rows) + 4 * count.astype(np.int64)) <= MAX_BYTES).sum())


def _check_size(size: int, n_slices: int) -> None:
    if size > MAX_BYTES:
        raise TooLarge(
            f"the instances of {n_slices:,} slices take {size / 2**20:,.0f} MiB or more, "
            f"at most {MAX_BYTES / 2**20:,.0f} are allowed; give fewer slices, the worst ones first",
            metadata={"estimate": str(size), "limit": str(MAX_BYTES)},
        )


@dataclass(frozen=True)
class Families:
    """Which slice each of E slices is told by.

    representative: (E,) int64, position of the slice that stands for it; its own when it stands for itself.
    similarity: (E,) float64, Jaccard similarity of the two extents; 1 when they are equal.
    """

    representative: NDArray[np.int64]
    similarity: NDArray[np.float64]

    @property
    def leaders(self) -> NDArray[np.int64]:
        """(F,) int64, the representatives, by the best rank that their family holds."""
        leaders, best = np.unique(self.representative, return_index=True)
        return leaders[np.argsort(best)]


def families(extents: Extents, items: Items, *, similarity: float = 0.8, look: Look = lambda: None) -> Families:
    """Group slices of nearly the same instances (paper A.1.7), given in rank order.

    Slices are taken from the clearest on: fewest pairs, then larger count, then better rank. Each joins the first
    taken before it that stands for a family and whose extent is at least `similarity` alike,
    |A and B| / |A or B|; else it stands for a family of its own. So a member is always that near to the slice that it
    is told by, and never shorter. Two sets so alike share a row among the rarest (1 - similarity) |A| + 1 of each
    (the prefix filter of set joins); only pairs that do are compared.
    """
    n_slices, count = len(extents), extents.count
    order = np.lexsort((np.arange(n_slices), -count, (items >= 0).sum(axis=1)))
    prefixes = _prefixes(extents, similarity, look)
    representative = np.arange(n_slices)
    alike = np.ones(n_slices)
    leads = np.zeros(n_slices, dtype=np.bool_)
    leaders = np.zeros(0, dtype=np.int64)  # in the order taken
    for start in range(0, n_slices, _BLOCK):
        look()
        block = order[start : start + _BLOCK]
        others = np.concatenate((leaders, block))
        shared = prefixes[block] @ prefixes[others].T
        left, right = np.repeat(np.arange(len(block)), np.diff(shared.indptr)), shared.indices
        sizes, their_sizes = count[block][left], count[others][right]
        near = np.minimum(sizes, their_sizes) >= similarity * np.maximum(sizes, their_sizes)
        near &= right < left + len(leaders)
        key = np.sort(left[near] * len(others) + right[near])
        left, right = np.divmod(key, len(others))
        a, b = block[left], others[right]
        jaccard = _jaccard(extents, a, b, look)
        near = jaccard >= similarity
        left, b, jaccard = left[near], b[near], jaccard[near]
        bounds = np.searchsorted(left, np.arange(len(block) + 1))
        for i, slice_ in enumerate(block):
            candidates = slice(bounds[i], bounds[i + 1])
            standing = np.flatnonzero(leads[b[candidates]])
            if standing.size:
                representative[slice_] = b[candidates][standing[0]]
                alike[slice_] = jaccard[candidates][standing[0]]
            else:
                leads[slice_] = True
        leaders = np.concatenate((leaders, block[leads[block]]))
    return Families(representative, alike)


def _prefixes(extents: Extents, similarity: float, look: Look) -> csr_array:
    """(E, N) 0/1: the rows of each slice that are rarest among all slices, as many as two alike slices must share."""
    rarest = np.argsort(np.bincount(extents.rows, minlength=extents.n_rows), kind="stable")
    place = np.empty(extents.n_rows, dtype=np.int32)
    place[rarest] = np.arange(extents.n_rows, dtype=np.int32)
    # The smallest overlap is rounded down by a hair, so that no pair at the very threshold is lost.
    length = extents.count - np.ceil(similarity * extents.count - 1e-9).astype(np.int64) + 1
    kept = np.minimum(length, extents.count)
    ends = np.concatenate(([0], np.cumsum(kept)))
    first = np.empty(int(ends[-1]), dtype=np.int32)
    for slice_, n in enumerate(kept.tolist()):
        look()
        if n:
            first[ends[slice_] : ends[slice_ + 1]] = np.partition(place[extents.of(slice_)], n - 1)[:n]
    return csr_array((np.ones(len(first), dtype=np.int32), rarest[first], ends), shape=(len(extents), extents.n_rows))


def _jaccard(extents: Extents, a: NDArray[np.int64], b: NDArray[np.int64], look: Look) -> NDArray[np.float64]:
    """Jaccard similarity (P,) of the slices at `a` and `b` (P,), in order of `a`."""
    words, common = extents.words, np.zeros(len(a), dtype=np.int64)
    step = max(1, _CHUNK_WORDS // max(1, words.shape[1]))
    runs = np.concatenate(([0], np.flatnonzero(np.diff(a)) + 1, [len(a)]))
    for low, high in itertools.pairwise(runs.tolist()):
        look()
        for at in range(low, high, step):
            pairs = slice(at, min(at + step, high))
            common[pairs] = popcount(words[b[pairs]] & words[a[at]])
    return np.asarray(common / (extents.count[a] + extents.count[b] - common))


@dataclass(frozen=True)
class Cover:
    """Slices in the order in which they cover most of the errors not covered yet.

    order: (C,) int64, positions of the slices. share: (C,) float64, the part of all lost score that the slice and those
    before it hold.
    """

    order: NDArray[np.int64]
    share: NDArray[np.float64]


def greedy_cover(extents: Extents, scores: NDArray[np.float64], look: Look = lambda: None) -> Cover:
    """Cover the errors by few slices: "12 slices hold 90% of the errors". Give the families' leaders.

    scores: (N,) float64, NaN where not scored; an instance loses 1 - score. Each step takes the slice with the most
    lost score in rows that no slice before it holds, the first of equals, until none adds any. No other choice of as
    many slices holds more than 1 / (1 - 1/e) times as much. The work is that of visiting each member once, and of
    looking over the slices once a step.
    """
    loss = np.nan_to_num(1.0 - scores, nan=0.0)
    whole = float(loss.sum())
    lost = loss[extents.rows] > 0
    slice_, members = np.repeat(np.arange(len(extents)), extents.count)[lost], extents.rows[lost]
    look()
    gain = np.bincount(slice_, loss[members], len(extents)).astype(np.float64)
    holders = slice_[np.argsort(members, kind="stable")]
    look()
    row_starts = np.concatenate(([0], np.cumsum(np.bincount(members, minlength=extents.n_rows))))
    # Sums that are taken apart row by row keep a rounding error; below it nothing is left.
    nothing = 1e-9
    covered = np.zeros(extents.n_rows, dtype=np.bool_)
    order: list[int] = []
    new: list[float] = []
    while len(order) < len(extents):
        look()
        best = int(np.argmax(gain >= gain.max() - nothing))
        if gain[best] <= nothing:
            break
        rows = extents.of(best)
        rows = rows[~covered[rows]]
        rows = rows[loss[rows] > 0]
        covered[rows] = True
        order.append(best)
        new.append(float(loss[rows].sum()))
        sizes = row_starts[rows + 1] - row_starts[rows]
        at = np.repeat(row_starts[rows] - (np.cumsum(sizes) - sizes), sizes) + np.arange(int(sizes.sum()))
        gain -= np.bincount(holders[at], np.repeat(loss[rows], sizes), len(extents))
        gain[best] = -1.0
    share = np.cumsum(np.array(new) / whole) if new else np.zeros(0)
    return Cover(np.array(order, dtype=np.int64), share)


def tag_blame(slices: Slices, column: int, overall_mean: float, index: NDArray[np.int64]) -> NDArray[np.float64]:
    """Each pair's share of a slice's drop (E, D) float64 for the slices at `index` (E,); 0 where `items` is padded.

    The Shapley value over the 2^d sub-slices of a slice of d pairs, v(T) = `overall_mean` - mean of the slice T,
    v(none) = 0: the mean, over all orders of adding the pairs, of what a pair takes off the score,
    sum over T without i of |T|! (d - |T| - 1)! / d! (v(T and i) - v(T)). A line sums to the slice's drop.
    `slices` must hold every parent of its slices, as an enumeration does; ValueError when one is missing.
    """
    scored, total = slices.scored[:, column], slices.total[:, column]
    lattice = Lattice(slices.items)
    blame = np.zeros((len(index), slices.items.shape[1]))
    for depth in np.unique(lattice.depth[index]):
        lines = np.flatnonzero(lattice.depth[index] == depth)
        items = slices.items[index[lines], :depth]
        drop = np.zeros((1 << depth, len(lines)))
        for subset in range(1, 1 << depth):
            pairs = [i for i in range(depth) if subset >> i & 1]
            at = lattice.find(items[:, pairs])
            drop[subset] = overall_mean - total[at] / scored[at]
        for pair, subset in itertools.product(range(depth), range(1 << depth)):
            if not subset >> pair & 1:
                weight = 1.0 / (depth * math.comb(int(depth) - 1, subset.bit_count()))
                blame[lines, pair] += weight * (drop[subset | 1 << pair] - drop[subset])
    return blame
