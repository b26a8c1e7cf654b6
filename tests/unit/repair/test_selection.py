"""Selection from a pool against the rule in plain Python."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.repair import selection
from services.repair.selection import Pool, in_order, in_turn, match_counts, random_order, select, take_first
from shared.errors import InvalidInput, Precondition

UNKNOWN = 65535


@st.composite
def pools(draw):
    """A pool, error slices, a budget, what is taken first, and the ids that are refused."""
    counts = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    n = draw(st.integers(1, 100))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    codes = np.stack([rng.integers(0, c, n) for c in counts], axis=1).astype(np.uint16)
    codes[rng.random(codes.shape) < 0.1] = UNKNOWN
    if draw(st.booleans()):
        codes = np.minimum(codes, 255).astype(np.uint8)
    ids = [f"{'é' if i % 3 else 'x'}{i}" for i in rng.permutation(n)]
    offsets = np.concatenate([[0], np.cumsum(counts)])
    depth = draw(st.integers(1, 3))
    rows = []
    for _ in range(draw(st.integers(1, 8))):
        size = draw(st.integers(1, min(depth, len(counts))))
        at = np.sort(rng.choice(len(counts), size, replace=False))
        rows.append([*(int(offsets[a] + rng.integers(counts[a])) for a in at), *[-1] * (depth - size)])
    first = np.where(rng.random(n) < 0.2, np.nan, rng.integers(0, 5, n)) if draw(st.booleans()) else None
    refused = {i for i in ids if rng.random() < 0.2} if draw(st.booleans()) else set()
    pool = Pool(ids, codes, np.array(counts))
    return pool, np.array(rows, np.int32), draw(st.integers(1, n + 5)), first, refused


def moved(pool, first, order):
    there = Pool([pool.ids[i] for i in order], pool.codes[order], pool.tag_counts)
    return there, None if first is None else first[order]


def extents(pool, items):
    pair_of = [(a, code) for a, count in enumerate(pool.tag_counts) for code in range(count)]
    wanted = [[pair_of[item] for item in row if item >= 0] for row in items.tolist()]
    return [[i for i in range(len(pool.ids)) if all(pool.codes[i, a] == c for a, c in pairs)] for pairs in wanted]


def reference(pool, items, budget, first, refused, spread):
    """(id, slice) of each pick."""

    def key(i):
        value = np.nan if first is None else first[i]
        return np.isnan(value), value if not np.isnan(value) else 0, pool.ids[i].encode()

    queues = [sorted(extent, key=key) for extent in extents(pool, items)]
    taken, picks = set(), []

    def ask(rank, turns):
        for _ in range(turns):
            left = [i for i in queues[rank] if i not in taken]
            if not left or len(picks) == budget:
                return
            taken.add(left[0])
            if pool.ids[left[0]] not in refused:
                picks.append((pool.ids[left[0]], rank))

    for _ in range(len(pool.ids) if spread else 1):
        for rank in range(len(queues)):
            ask(rank, 1 if spread else len(pool.ids))
    return picks


def told(chosen, pool):
    return list(zip([pool.ids[i] for i in chosen.index], chosen.slice.tolist(), strict=True))


def choose(pool, items, budget, first, refused, spread):
    accept = (lambda row: pool.ids[row] not in refused) if refused else None
    return select(pool, items, budget, first=first, spread=spread, accept=accept)


@pytest.fixture(params=[None, 1], ids=["roomy cache", "tight cache"])
def cache(request, monkeypatch):
    if request.param:
        monkeypatch.setattr(selection, "_CACHE_BYTES", request.param)
        monkeypatch.setattr(selection, "_STRIDE", request.param)


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("spread", [False, True], ids=["one by one", "in turn"])
class TestSelect:
    # The fixture sets constants, the same for every example.
    def test_equals_the_reference(self, spread):
        @given(pools())
        @settings(max_examples=50, deadline=None)
        def check(given_):
            pool, items, budget, first, refused = given_
            chosen = choose(pool, items, budget, first, refused, spread)
            assert told(chosen, pool) == reference(pool, items, budget, first, refused, spread)
            assert chosen.matched.tolist() == [len(extent) for extent in extents(pool, items)]
            assert chosen.matched.tolist() == match_counts(pool, items).tolist()
            assert len(chosen) <= budget
            assert len(set(chosen.index.tolist())) == len(chosen)

        check()

    def test_the_order_of_the_pool_does_not_matter(self, spread):
        @given(pools(), st.integers(0, 2**32 - 1))
        @settings(max_examples=50, deadline=None)
        def check(given_, seed):
            pool, items, budget, first, refused = given_
            other, other_first = moved(pool, first, np.random.default_rng(seed).permutation(len(pool.ids)))
            one = choose(pool, items, budget, first, refused, spread)
            two = choose(other, items, budget, other_first, refused, spread)
            assert told(one, pool) == told(two, other)

        check()

    def test_a_smaller_budget_picks_the_head_of_a_larger_one(self, spread):
        @given(pools())
        @settings(max_examples=50, deadline=None)
        def check(given_):
            pool, items, budget, first, refused = given_
            every = choose(pool, items, len(pool.ids), first, refused, spread)
            some = choose(pool, items, budget, first, refused, spread)
            assert some.index.tolist() == every.index.tolist()[:budget]

        check()


@given(pools())
@settings(max_examples=50, deadline=None)
def test_slices_in_turn_are_those_of_a_spread(given_):
    pool, items, budget, first, _ = given_
    first = np.zeros(len(pool.ids)) if first is None else first
    chosen = select(pool, items, budget, first=first, spread=True)
    assert list(in_turn(pool, items, first))[:budget] == list(
        zip(chosen.index.tolist(), chosen.slice.tolist(), strict=True)
    )


CODES = np.zeros((3, 2), np.uint16)
GOOD = {"ids": ["a", "b", "c"], "codes": CODES, "tag_counts": np.array([2, 3])}
ITEMS = np.array([[0, 2]], np.int32)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"ids": ["a", "b", "a"]}, "ids"),
        ({"ids": ["a", "b"]}, "codes"),
        ({"tag_counts": np.array([2])}, "codes"),
        ({"codes": np.zeros((3, 2))}, "codes"),
        ({"codes": np.zeros(3, np.uint16)}, "codes"),
    ],
)
def test_a_pool_that_does_not_fit_together_names_the_field(change, field):
    with pytest.raises(InvalidInput) as caught:
        Pool(**GOOD | change)
    assert caught.value.violations[0].field == field


@pytest.mark.parametrize(
    ("items", "budget", "field"),
    [
        (ITEMS, 0, "budget"),
        (ITEMS, -5, "budget"),
        (np.array([[0, 5]], np.int32), 1, "error_items[0]"),
        (np.array([[-1, -1]], np.int32), 1, "error_items[0]"),
        (np.array([[0, -2]], np.int32), 1, "error_items[0]"),
        (np.array([0], np.int32), 1, "error_items"),
    ],
)
def test_bad_input_names_the_field(items, budget, field):
    with pytest.raises(InvalidInput) as caught:
        select(Pool(**GOOD), items, budget)
    assert caught.value.violations[0].field == field


def test_an_empty_pool_and_no_error_slices_are_missing_steps():
    with pytest.raises(Precondition, match="pool is empty"):
        Pool([], np.zeros((0, 2), np.uint16), np.array([2, 3]))
    with pytest.raises(Precondition, match="no error slices"):
        select(Pool(**GOOD), np.empty((0, 2), np.int32), 1)


def test_a_pool_that_matches_nothing_gives_no_picks():
    chosen = select(Pool(**GOOD | {"codes": np.full((3, 2), UNKNOWN, np.uint16)}), ITEMS, 1)
    assert len(chosen) == 0
    assert chosen.matched.tolist() == [0]


IDS = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=8), min_size=1, max_size=40, unique=True)
SEEDS = st.integers(-(2**63), 2**63 - 1)


@given(IDS, SEEDS, st.randoms(use_true_random=False))
def test_the_random_order_depends_on_ids_and_seed_alone(ids, seed, random):
    order = random_order(ids, seed)
    assert sorted(order.tolist()) == list(range(len(ids)))
    shuffled = ids.copy()
    random.shuffle(shuffled)
    assert [ids[i] for i in order] == [shuffled[i] for i in random_order(shuffled, seed)]


def test_random_puts_every_instance_among_the_first_equally_often():
    ids = [f"image {i}" for i in range(40)]
    picked = np.concatenate([random_order(ids, seed)[:10] for seed in range(2000)])
    often = np.bincount(picked, minlength=40)
    # Binomial: 500 expected, standard deviation 19.4; the seeds are fixed, so this either holds or does not.
    assert abs(often - 500).max() < 5 * 19.4


def test_what_is_not_known_comes_last_and_equal_ones_by_id():
    values = np.array([np.nan, 2.0, 1.0, 2.0, np.nan])
    assert in_order(["e", "d", "c", "b", "a"], values).tolist() == [2, 3, 1, 4, 0]


@given(st.permutations(range(12)), st.integers(1, 15), st.sets(st.integers(0, 11)))
def test_the_first_rows_that_pass_are_taken(order, budget, refused):
    taken = take_first(np.array(order), budget, lambda row: row not in refused)
    assert taken.tolist() == [row for row in order if row not in refused][:budget]
    assert take_first(np.array(order), budget).tolist() == order[:budget]


def test_a_budget_below_one_is_refused():
    with pytest.raises(InvalidInput, match="budget"):
        take_first(np.arange(3), 0)
