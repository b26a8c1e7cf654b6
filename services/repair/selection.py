"""Which pool instances to train on next: those of the worst error slices first (paper 4.1), or at random."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shared.errors import Precondition, invalid

Ints = NDArray[np.int32] | NDArray[np.int64]
Floats = NDArray[np.float32] | NDArray[np.float64]

_BITSET_BYTES = 256 << 20  # most memory for the bit sets of one chunk of pool rows


@dataclass(frozen=True)
class Selection:
    """Picks in the order in which they were made, each with its reason; n rows."""

    index: NDArray[np.int64]  # (n,) row of the pool, none twice
    slice: NDArray[np.int64]  # (n,) position in rank order of the error slice that asked for it, -1 at random
    mean: NDArray[np.float64]  # (n,) mean score of that slice, NaN at random
    unmatched: NDArray[np.int64]  # (u,) positions of the error slices that match no instance of the pool

    def __len__(self) -> int:
        return len(self.index)


def select(
    pool_codes: NDArray[np.uint8] | NDArray[np.uint16],
    tag_counts: Sequence[int] | Ints,
    error_items: Ints,
    error_mean: Floats,
    budget: int,
    *,
    ids: Sequence[str],
) -> Selection:
    """Pick at most `budget` pool instances, those of the lowest mean first (paper 4.1, "Integration with Model
    Repair").

    The error slices are asked in rank order; each takes the instances that match all its pairs and that no
    slice before it took, in order of their ids, until the budget is full. So the picks do not depend on the
    order of the pool, and a smaller budget picks the head of a larger one.

    pool_codes  (N, A) tag codes of the pool; a code >= the tag count of its attribute ("unknown") matches nothing
    tag_counts  (A,)   tags of each attribute
    error_items (E, D) items (offset of the attribute + tag code) of the error slices, worst first, padded with -1
    error_mean  (E,)   mean score of each
    ids         N different instance ids, in the order of `pool_codes`

    Raises InvalidInput (budget < 1, arrays that do not fit each other, an id twice) and Precondition (empty
    pool, no error slices).
    """
    counts = np.asarray(tag_counts, np.int64)
    _check_pool(ids, budget)
    _check_codes(pool_codes, counts, len(ids))
    _check_slices(error_items, error_mean, counts)

    rows, slices, unmatched = _first_slices(pool_codes, counts, error_items, budget)
    # Keep the slices that the budget reaches, then sort their rows by id (a string sort, so only of these).
    order = np.argsort(slices, kind="stable")
    if len(order) > budget:
        order = order[: np.searchsorted(slices[order], slices[order[budget - 1]], side="right")]
    by_id = order[sorted(range(len(order)), key=[ids[i] for i in rows[order].tolist()].__getitem__)]
    picks = by_id[np.argsort(slices[by_id], kind="stable")][:budget]
    return Selection(rows[picks], slices[picks], error_mean.astype(np.float64)[slices[picks]], unmatched)


def random_selection(ids: Sequence[str], budget: int, seed: int) -> Selection:
    """Pick at most `budget` instances at random: the baseline (paper 5.5).

    The order is that of a hash of seed and id, so it does not depend on the order of the pool, and a smaller
    budget picks the head of a larger one. `seed` is any integer of 64 bits. Raises InvalidInput (budget < 1, an
    id twice) and Precondition (empty pool).
    """
    _check_pool(ids, budget)
    key = seed.to_bytes(8, "little", signed=True)
    digests = b"".join(hashlib.blake2b(text.encode(), digest_size=16, key=key).digest() for text in ids)
    draws = np.frombuffer(digests, "<u8").reshape(-1, 2)
    index = np.lexsort(draws.T)[:budget]
    return Selection(index, np.full(len(index), -1), np.full(len(index), np.nan), np.empty(0, np.int64))


def _first_slices(
    codes: NDArray[np.uint8] | NDArray[np.uint16], counts: NDArray[np.int64], items: Ints, budget: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Pool rows and the first slice that matches each, and the slices that match no row.

    Of each chunk of rows, all rows of the first slices are there until they fill the budget; further ones could
    not be picked.
    """
    used, slots = np.unique(items.astype(np.int64), return_inverse=True)
    if used[0] < 0:  # padding
        used, slots = used[1:], slots - 1
    pairs = [row[row >= 0].tolist() for row in slots.reshape(items.shape)]
    chunk = max(64, _BITSET_BYTES * 8 // len(used) // 64 * 64)
    unmatched = np.ones(len(items), bool)
    rows: list[NDArray[np.int64]] = []
    slices: list[NDArray[np.int64]] = []
    for start in range(0, len(codes), chunk):
        part = codes[start : start + chunk]
        bits = _bitsets(part, counts, used)
        left = budget
        free = ~np.zeros(bits.shape[1], np.uint64)  # rows that no slice took yet
        extent = np.empty_like(free)
        for i, (head, *tail) in enumerate(pairs):
            if left <= 0 and not unmatched[i]:
                continue
            np.copyto(extent, bits[head])
            for slot in tail:
                extent &= bits[slot]
            if unmatched[i]:
                unmatched[i] = not extent.any()
            if left <= 0 or unmatched[i]:
                continue
            extent &= free
            words = np.flatnonzero(extent)
            if len(words):
                free[words] ^= extent[words]
                octets = extent[words].view(np.uint8).reshape(-1, 8)
                word, bit = np.nonzero(np.unpackbits(octets, axis=1, bitorder="little"))
                rows.append(words[word] * 64 + bit + start)
                slices.append(np.full(len(bit), i))
                left -= len(bit)
    nothing = [np.empty(0, np.int64)]
    return np.concatenate(rows or nothing), np.concatenate(slices or nothing), np.flatnonzero(unmatched)


def _bitsets(
    codes: NDArray[np.uint8] | NDArray[np.uint16], counts: NDArray[np.int64], used: NDArray[np.int64]
) -> NDArray[np.uint64]:
    """For each item of `used` (ascending) the rows that have it, a bit a row; (len(used), words)."""
    bits = np.zeros((len(used), -(-len(codes) // 64)), np.uint64)
    octets = bits.view(np.uint8)
    ends = np.cumsum(counts)
    attributes = np.searchsorted(ends, used, side="right")
    tag_codes = used - (ends - counts)[attributes]
    for attribute in np.unique(attributes):
        column = np.ascontiguousarray(codes[:, attribute])
        for slot in np.flatnonzero(attributes == attribute):
            packed = np.packbits(column == int(tag_codes[slot]), bitorder="little")
            octets[slot, : len(packed)] = packed
    return bits


def _check_pool(ids: Sequence[str], budget: int) -> None:
    if budget < 1:
        raise invalid("budget", f"is {budget}; give 1 or more")
    if not len(ids):
        raise Precondition("the pool is empty; add instances to pick from to the dataset's pool split")
    if len(set(ids)) < len(ids):
        raise invalid("ids", f"hold {len(ids) - len(set(ids))} repeats; give each instance of the pool once")


def _check_codes(codes: NDArray[np.uint8] | NDArray[np.uint16], counts: NDArray[np.int64], n_ids: int) -> None:
    if codes.ndim != 2 or not np.issubdtype(codes.dtype, np.unsignedinteger):
        raise invalid("pool_codes", f"is {codes.dtype} of shape {codes.shape}; give tag codes (instances, attributes)")
    if len(codes) != n_ids:
        raise invalid("pool_codes", f"has {len(codes)} rows for {n_ids} ids")
    if codes.shape[1] != len(counts):
        raise invalid(
            "pool_codes",
            f"has {codes.shape[1]} attributes and the schema {len(counts)}; tag the pool with the same schema",
        )


def _check_slices(items: Ints, means: Floats, counts: NDArray[np.int64]) -> None:
    if not len(items):
        raise Precondition("there are no error slices to pick for; lower the margin or the minimum count")
    if items.ndim != 2 or not items.shape[1] or not np.issubdtype(items.dtype, np.integer):
        raise invalid("error_items", f"is {items.dtype} of shape {items.shape}; give integers (slices, depth)")
    if means.shape != (len(items),) or not np.isfinite(means).all():
        raise invalid("error_mean", f"must be {len(items)} numbers, one for each error slice")
    n_items = int(counts.sum())
    wrong = (items < -1).any(axis=1) | (items >= n_items).any(axis=1) | (items < 0).all(axis=1)
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        raise invalid(
            f"error_items[{row}]",
            f"{items[row].tolist()} is no slice of the schema: give items 0 to {n_items - 1}, padded with -1",
        )
