import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from services.gateway.report.choose import MAX_TAGS, cross, widest_pairs
from shared.schema import UNKNOWN

TAGS = [3, 2, 4, 2]


@st.composite
def tables(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    n = draw(st.integers(0, 40))
    columns = [draw(st.lists(st.sampled_from([*range(t), UNKNOWN]), min_size=n, max_size=n)) for t in TAGS]
    score = st.sampled_from([0.0, 0.25, 1.0, float("nan")])
    scores = draw(st.lists(score, min_size=n, max_size=n))
    return np.array(columns, np.uint16).reshape(len(TAGS), n).T, np.array(scores, np.float64)


@given(tables())
def test_cross_equals_a_count_by_hand(table: tuple[np.ndarray, np.ndarray]) -> None:
    codes, scores = table
    mean, count = cross(codes, scores, (0, 3), (2, 4))
    assert mean.shape == count.shape == (3, 4)
    for a in range(3):
        for b in range(4):
            cell = [s for c, s in zip(codes, scores, strict=True) if (c[0], c[2]) == (a, b) and not np.isnan(s)]
            assert count[a, b] == len(cell)
            np.testing.assert_allclose(mean[a, b], np.mean(cell) if cell else np.nan)


@given(tables(), st.integers(1, 5), st.randoms())
def test_pairs_are_apart_and_do_not_hang_on_the_order_of_rows(
    table: tuple[np.ndarray, np.ndarray], min_count: int, random: object
) -> None:
    codes, scores = table
    pairs = widest_pairs(codes, scores, TAGS, min_count, limit=2)
    used = [attribute for pair in pairs for attribute in pair]
    assert len(set(used)) == len(used) <= 4
    assert all(i < j for i, j in pairs)
    order = list(range(len(scores)))
    random.shuffle(order)  # type: ignore[attr-defined]
    assert widest_pairs(codes[order], scores[order], TAGS, min_count, limit=2) == pairs


def test_an_interaction_is_found_that_neither_attribute_shows_alone() -> None:
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 2, (4000, 5)).astype(np.uint16)
    scores = (codes[:, 1] ^ codes[:, 3]).astype(np.float64)
    assert widest_pairs(codes, scores, [2] * 5, min_count=10, limit=1) == [(1, 3)]


def test_cells_under_the_count_do_not_choose() -> None:
    rng = np.random.default_rng(1)
    codes = rng.integers(0, 2, (400, 4)).astype(np.uint16)
    scores = np.where(codes[:, 2] ^ codes[:, 3], 0.95, 0.75)
    codes[:, :2] = 0
    codes[:9, :2] = 1
    scores[:9] = 0.0
    assert widest_pairs(codes, scores, [2] * 4, min_count=1, limit=1) != [(2, 3)]
    assert widest_pairs(codes, scores, [2] * 4, min_count=10, limit=1) == [(2, 3)]


def test_no_pair_without_spread_scores_or_readable_tags() -> None:
    codes = np.zeros((20, 2), np.uint16)
    assert widest_pairs(codes, np.ones(20), [2, 2], 1, 1) == []
    assert widest_pairs(codes, np.full(20, np.nan), [2, 2], 1, 1) == []
    codes[::2] = 1
    scores = np.tile([0.0, 1.0], 10)
    assert widest_pairs(codes, scores, [2, 2], 1, 1) == [(0, 1)]
    assert widest_pairs(codes, scores, [2, MAX_TAGS + 1], 1, 1) == []
