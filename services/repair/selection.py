"""Which pool instances to train on next: those of the worst error slices first (paper 4.1), or in a given order."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from shared.errors import Precondition, invalid

Codes = NDArray[np.uint8] | NDArray[np.uint16]
Ints = NDArray[np.int32] | NDArray[np.int64]
Floats = NDArray[np.float64]
Words = NDArray[np.uint64]
Accept = Callable[[int], bool]  # a row of the pool that would be picked next -> whether it may be

_CACHE_BYTES = 256 << 20  # most memory for the bit sets of items
_STRIDE = 512  # words looked at together for the next row of a slice


@dataclass(frozen=True)
class Selection:
    """Picks in the order in which they were made, each with its reason; n rows."""

    index: NDArray[np.int64]  # (n,) row of the pool, none twice
    slice: NDArray[np.int64]  # (n,) position of the error slice that asked for it, -1 where none did
    matched: NDArray[np.int64]  # (E,) pool instances that match each error slice

    def __len__(self) -> int:
        return len(self.index)


@dataclass(frozen=True)
class Pool:
    """The instances that may be picked, N rows.

    ids         N different instance ids
    codes       (N, A) tag codes; a code >= the tag count of its attribute ("unknown") matches nothing
    tag_counts  (A,)   tags of each attribute

    Raises InvalidInput (arrays that do not fit each other, an id twice) and Precondition (no instance).
    """

    ids: Sequence[str]
    codes: Codes
    tag_counts: NDArray[np.int64]

    def __post_init__(self) -> None:
        check_ids(self.ids)
        if self.codes.ndim != 2 or not np.issubdtype(self.codes.dtype, np.unsignedinteger):
            raise invalid(
                "codes", f"is {self.codes.dtype} of shape {self.codes.shape}; give tag codes (instances, attributes)"
            )
        if len(self.codes) != len(self.ids):
            raise invalid("codes", f"has {len(self.codes)} rows for {len(self.ids)} ids")
        if self.codes.shape[1] != len(self.tag_counts):
            raise invalid(
                "codes",
                f"has {self.codes.shape[1]} attributes and the schema {len(self.tag_counts)}; "
                "tag the pool with the same schema",
            )


def select(
    pool: Pool,
    error_items: Ints,
    budget: int,
    *,
    first: Floats | None = None,
    spread: bool = False,
    accept: Accept | None = None,
) -> Selection:
    """Pick at most `budget` instances of the pool, those of the first error slices first (paper 4.1, "Integration with
    Model Repair").

    The error slices are asked in the order given; each takes the instances that match all its pairs and that no slice
    before it took. With `spread` they take one each, in turn, until the budget is full; else each takes all. A slice
    takes the instances with the lowest value of `first` (N,) first, NaN last, equal ones in order of their ids. So the
    picks do not depend on the order of the pool, and a smaller budget picks the head of a larger one. An instance that
    `accept` refuses is passed over for good.

    error_items (E, D) items (offset of the attribute + tag code) of the error slices, padded with -1

    Raises InvalidInput (budget < 1, items that are none of the schema) and Precondition (no error slices).
    """
    _check_budget(budget)
    _check_slices(error_items, int(pool.tag_counts.sum()))
    order = in_order(pool.ids, first)
    bits = _Bits(pool, order)
    pairs = [row[row >= 0].tolist() for row in error_items]
    matched = bits.counts(pairs)
    rows: list[NDArray[np.int64]] = [np.empty(0, np.int64)]
    slices: list[NDArray[np.int64]] = [np.empty(0, np.int64)]
    left = budget
    take = _by_turns if spread else _one_by_one
    for slice_, places in take(bits, pairs, np.flatnonzero(matched).tolist()):
        taken = take_first(order[places], left, accept)
        rows.append(taken)
        slices.append(np.full(len(taken), slice_))
        left -= len(taken)
        if not left:
            break
    return Selection(np.concatenate(rows), np.concatenate(slices), matched)


def in_turn(pool: Pool, error_items: Ints, first: Floats) -> Iterator[tuple[int, int]]:
    """As `select` with `spread`, one by one and without an end but that of the pool: (row, slice)."""
    _check_slices(error_items, int(pool.tag_counts.sum()))
    order = in_order(pool.ids, first)
    pairs = [row[row >= 0].tolist() for row in error_items]
    for slice_, places in _by_turns(_Bits(pool, order), pairs, range(len(pairs))):
        yield int(order[places[0]]), slice_


def match_counts(pool: Pool, error_items: Ints) -> NDArray[np.int64]:
    """(E,) pool instances that match each error slice."""
    _check_slices(error_items, int(pool.tag_counts.sum()))
    bits = _Bits(pool, np.arange(len(pool.ids)))
    return bits.counts([row[row >= 0].tolist() for row in error_items])


def take_first(order: NDArray[np.int64], budget: int, accept: Accept | None = None) -> NDArray[np.int64]:
    """The first `budget` rows of `order` that `accept` lets pass. InvalidInput for a budget < 1."""
    _check_budget(budget)
    if accept is None:
        return order[:budget]
    picks: list[int] = []
    for row in order.tolist():
        if accept(row):
            picks.append(row)
            if len(picks) == budget:
                break
    return np.array(picks, np.int64)


def in_order(ids: Sequence[str], first: Floats | None = None) -> NDArray[np.int64]:
    """(N,) rows by the lowest value of `first` (N,), NaN last, equal ones by id."""
    columns = {"id": pa.array(ids, pa.string())}
    keys = [("id", "ascending")]
    if first is not None:
        columns["first"] = pa.array(first, from_pandas=True)  # NaN as null, which is sorted last
        keys.insert(0, ("first", "ascending"))
    return np.asarray(pc.sort_indices(pa.table(columns), sort_keys=keys).to_numpy(), dtype=np.int64)


def random_order(ids: Sequence[str], seed: int) -> NDArray[np.int64]:
    """(N,) rows in the order of a hash of seed and id: the baseline (paper 5.5).

    It does not depend on the order of the pool. `seed` is any integer of 64 bits.
    """
    key = seed.to_bytes(8, "little", signed=True)
    digests = b"".join(hashlib.blake2b(text.encode(), digest_size=16, key=key).digest() for text in ids)
    return np.lexsort(np.frombuffer(digests, "<u8").reshape(-1, 2).T)


class _Bits:
    """The pool as bit sets, a bit a row in the order in which rows are taken; `free` are those not taken yet.

    A bit set is made when it is asked for, and kept as long as there is room.
    """

    def __init__(self, pool: Pool, order: NDArray[np.int64]) -> None:
        self._pool = pool
        self._order = order
        self._ends = np.cumsum(pool.tag_counts)
        width = -(-len(order) // 64)
        self._room = max(8, _CACHE_BYTES // (8 * width))
        self._kept: OrderedDict[int, Words] = OrderedDict()
        self.free = self._pack(np.ones(len(order), bool))

    def extent(self, items: Sequence[int], words: slice = slice(None)) -> Words:
        """The rows that have all `items`, or the part of them in these words."""
        found = self._of(items[0])[words].copy()
        for item in items[1:]:
            found &= self._of(item)[words]
        return found

    def counts(self, slices: Sequence[Sequence[int]]) -> NDArray[np.int64]:
        """Rows that have all items of each of the slices."""
        return np.array([int(np.bitwise_count(self.extent(items)).sum()) for items in slices], np.int64)

    def _of(self, item: int) -> Words:
        if item in self._kept:
            self._kept.move_to_end(item)
            return self._kept[item]
        column = int(np.searchsorted(self._ends, item, side="right"))
        code = item - int(self._ends[column] - self._pool.tag_counts[column])
        has = self._pool.codes[:, column] == code
        if len(self._kept) == self._room:
            self._kept.popitem(last=False)
        self._kept[item] = self._pack(has[self._order])
        return self._kept[item]

    def _pack(self, has: NDArray[np.bool_]) -> Words:
        octets = np.zeros(-(-len(has) // 64) * 8, np.uint8)
        packed = np.packbits(has, bitorder="little")
        octets[: len(packed)] = packed
        return octets.view("<u8")


def _one_by_one(
    bits: _Bits, pairs: Sequence[Sequence[int]], asked: Sequence[int]
) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """All rows of the first slice, then those of the second that are left, …"""
    for slice_ in asked:
        extent = bits.extent(pairs[slice_]) & bits.free
        bits.free ^= extent
        yield slice_, _places(extent)


def _by_turns(
    bits: _Bits, pairs: Sequence[Sequence[int]], asked: Sequence[int]
) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """A row of the first slice, one of the second, …, until no slice has one left."""
    word = dict.fromkeys(asked, 0)  # before it, a slice has no free row
    while asked:
        having = []
        for slice_ in asked:
            place = _next_free(bits, pairs[slice_], word[slice_])
            if place is None:
                continue
            word[slice_] = place // 64
            bits.free[place // 64] ^= np.uint64(1) << np.uint64(place % 64)
            having.append(slice_)
            yield slice_, np.array([place])
        asked = having


def _next_free(bits: _Bits, items: Sequence[int], start: int) -> int | None:
    """The first free row of a slice from word `start` on."""
    for at in range(start, len(bits.free), _STRIDE):
        part = slice(at, at + _STRIDE)
        found = bits.extent(items, part) & bits.free[part]
        words = np.flatnonzero(found)
        if len(words):
            lowest = int(found[words[0]])
            return (at + int(words[0])) * 64 + (lowest & -lowest).bit_length() - 1
    return None


def _places(words: Words) -> NDArray[np.int64]:
    """Which bits are set."""
    here = np.flatnonzero(words)
    octets = words[here].view(np.uint8).reshape(-1, 8)
    word, bit = np.nonzero(np.unpackbits(octets, axis=1, bitorder="little"))
    return np.asarray(here[word] * 64 + bit, np.int64)


def _check_budget(budget: int) -> None:
    if budget < 1:
        raise invalid("budget", f"is {budget}; give 1 or more")


def check_ids(ids: Sequence[str]) -> None:
    """Raise Precondition when there are no `ids`, InvalidInput when one comes twice."""
    if not len(ids):
        raise Precondition("the pool is empty; add instances to pick from to the dataset's pool split")
    if len(set(ids)) < len(ids):
        raise invalid("ids", f"hold {len(ids) - len(set(ids))} repeats; give each instance of the pool once")


def _check_slices(items: Ints, n_items: int) -> None:
    if not len(items):
        raise Precondition("there are no error slices to pick for; lower the margin or the minimum count")
    if items.ndim != 2 or not items.shape[1] or not np.issubdtype(items.dtype, np.integer):
        raise invalid("error_items", f"is {items.dtype} of shape {items.shape}; give integers (slices, depth)")
    wrong = (items < -1).any(axis=1) | (items >= n_items).any(axis=1) | (items < 0).all(axis=1)
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        raise invalid(
            f"error_items[{row}]",
            f"{items[row].tolist()} is no slice of the schema: give items 0 to {n_items - 1}, padded with -1",
        )
