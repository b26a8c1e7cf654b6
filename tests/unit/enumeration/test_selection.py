import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from services.enumeration.lattice import Slices
from services.enumeration.selection import rank_order, reordered


def random_slices(n, seed, scored_apart):
    rng = np.random.default_rng(seed)
    count = rng.integers(10, 14, n)
    scored = count[:, None] - rng.integers(0, 3, (n, 2)) if scored_apart else np.broadcast_to(count[:, None], (n, 2))
    total = rng.integers(0, 4, (n, 2)) * scored / 4  # many equal means
    return Slices(rng.integers(-1, 50, (n, 3)).astype(np.int32), count, scored, total)


sizes = st.integers(0, 30) | st.integers(990, 4_000)


@given(n=sizes, seed=st.integers(0, 2**32 - 1), scored_apart=st.booleans())
def test_rank_order_is_that_of_one_sort_by_all_keys(n, seed, scored_apart):
    slices = random_slices(n, seed, scored_apart)
    for column in range(2):
        mean = slices.total[:, column] / slices.scored[:, column]
        np.testing.assert_array_equal(rank_order(slices, column), np.lexsort((np.arange(n), -slices.count, mean)))


@given(n=sizes, seed=st.integers(0, 2**32 - 1), scored_apart=st.booleans())
def test_reordered_are_the_same_slices_in_another_order(n, seed, scored_apart):
    slices, beside = random_slices(n, seed, scored_apart), np.arange(n, dtype=np.float64)
    expected = random_slices(n, seed, scored_apart)
    order = np.random.default_rng(seed).permutation(n)[: n // 2 + 1]
    found, told = reordered(slices, beside, order)
    for name in ("items", "count", "scored", "total"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name)[order])
    np.testing.assert_array_equal(told, order)
