import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.enumeration.bitset import ScorePlanes, pack, popcount, word_count


@given(st.integers(0, 5), st.integers(0, 300), st.integers(0, 2**32 - 1))
def test_popcount_of_packed_sets_is_their_size(n_sets, n_rows, seed):
    member = np.random.default_rng(seed).random((n_sets, n_rows)) < 0.5
    words = pack(member)
    assert words.shape == (n_sets, word_count(n_rows))
    assert popcount(words).tolist() == member.sum(axis=1).tolist()


@pytest.mark.parametrize("n_words", [(1 << 24) // 64, (1 << 24) // 64 + 1])
def test_popcount_is_exact_where_float32_ends(n_words):
    words = np.full((1, n_words), np.iinfo(np.uint64).max, dtype=np.uint64)
    assert popcount(words).tolist() == [n_words * 64]
    words[0, -1] = 1
    assert popcount(words).tolist() == [(n_words - 1) * 64 + 1]


@pytest.mark.parametrize("value", [0.1, 1 / 3, 1.0, 1e-12])
def test_sums_over_a_million_rows_are_within_a_billionth(value):
    n_rows = 1_000_000
    (column,) = ScorePlanes(np.full((n_rows, 1), value)).on(None)
    everything = pack(np.ones((1, n_rows), dtype=bool))
    assert column.total(everything)[0] == pytest.approx(n_rows * value, abs=1e-9)


def test_equal_sets_have_equal_sums_on_any_order_of_rows():
    rng = np.random.default_rng(0)
    planes = ScorePlanes(rng.random((500, 1)))
    member = rng.random(500) < 0.3
    sums = set()
    for _ in range(20):
        rows = rng.permutation(500)
        sums.add(planes.on(rows)[0].total(pack(member[rows][None]))[0])
    assert len(sums) == 1
