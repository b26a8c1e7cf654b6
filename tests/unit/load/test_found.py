"""Comparing what two tools found: equal means equal, and every difference shows."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.load.found import Found, ascending, fingerprint, items_of, keys_of


@st.composite
def slices(draw: st.DrawFn) -> tuple[np.ndarray, int]:
    """Distinct lines of items (S, 4), ascending and padded with -1, and the number of items."""
    n_items = draw(st.integers(1, 40))
    sets = draw(st.sets(st.frozensets(st.integers(0, n_items - 1), min_size=1, max_size=4), min_size=1, max_size=30))
    lines = [sorted(s) + [-1] * (4 - len(s)) for s in sets]
    return np.array(lines), n_items


@given(slices())
def test_a_key_tells_its_items(given_slices: tuple[np.ndarray, int]) -> None:
    items, n_items = given_slices
    keys = keys_of(items, n_items)
    assert len(np.unique(keys)) == len(items)
    np.testing.assert_array_equal(items_of(keys, n_items, 4), items)


@given(slices(), st.randoms(use_true_random=False))
def test_the_order_of_items_and_slices_is_nothing(given_slices: tuple[np.ndarray, int], random: object) -> None:
    items, n_items = given_slices
    count = np.arange(len(items)) + 10
    rng = np.random.default_rng(random.getrandbits(32))
    order = rng.permutation(len(items))
    shuffled = rng.permuted(items[order], axis=1)
    here = Found(keys_of(items, n_items), count)
    there = Found(keys_of(ascending(shuffled), n_items), count[order])
    assert fingerprint(here) == fingerprint(there)
    assert fingerprint(here).disagrees(fingerprint(there)) is None


@given(slices(), st.data())
def test_every_difference_shows(given_slices: tuple[np.ndarray, int], data: st.DataObject) -> None:
    items, n_items = given_slices
    keys, count, total = keys_of(items, n_items), np.arange(len(items)) + 10, np.arange(len(items))
    one = fingerprint(Found(keys, count, total))
    at = data.draw(st.integers(0, len(items) - 1))
    changed = count.copy()
    changed[at] += data.draw(st.sampled_from((-1, 1, 7)))
    assert (
        fingerprint(Found(keys, changed, total)).disagrees(one)
        == "the same number of slices, but other slices or counts"
    )
    assert (
        fingerprint(Found(keys[1:], count[1:], total[1:])).disagrees(one)
        == f"{len(keys) - 1} slices against {len(keys)}"
    )
    assert (
        fingerprint(Found(keys, count, changed)).disagrees(one)
        == "the same slices and counts, but other sums of scores"
    )
    assert fingerprint(Found(keys, count)).disagrees(one) is None
    if len(keys) > 1:
        swapped = count.copy()
        other = (at + 1) % len(keys)
        swapped[[at, other]] = swapped[[other, at]]
        assert fingerprint(Found(keys, swapped, total)).disagrees(one) is not None


def test_too_wide_keys_are_refused() -> None:
    with pytest.raises(ValueError, match="64-bit"):
        keys_of(np.zeros((1, 8), dtype=np.int32), 400)
