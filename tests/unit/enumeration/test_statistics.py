from itertools import combinations

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from services.enumeration.error_slices import find_error_slices
from services.enumeration.lattice import Slices, enumerate_slices, score_slices
from services.enumeration.statistics import (
    chance_of,
    confirm,
    found_by_chance,
    halves,
    hypergeometric_tail,
    p_values,
    permuted_scores,
    q_values,
    slice_significance,
)
from shared.errors import InvalidInput
from shared.intervals import mean_intervals, wilson_interval
from tests.load.shapes import paper_table
from tests.unit.enumeration import references
from tests.unit.enumeration.tables import tables

LEVELS = (0.05, 0.01, 0.001)


def beta(rng, n):
    return rng.beta(5, 1, n)


def missed(rng, n):
    """A third has nothing, the others about 0.8."""
    return np.where(rng.random(n) < 0.3, 0.0, np.clip(rng.normal(0.8, 0.08, n), 0, 1))


def rarely_missed(rng, n):
    return np.where(rng.random(n) < 0.05, 0.0, np.clip(rng.normal(0.9, 0.03, n), 0, 1))


def quarters(rng, n):
    return rng.choice([0, 0.25, 0.5, 0.75, 1], n, p=[0.05, 0.05, 0.1, 0.2, 0.6])


def mostly_one(rng, n):
    return np.where(rng.random(n) < 0.9, 1.0, rng.random(n))


SHAPES = [beta, missed, rarely_missed, quarters, mostly_one]
shapes = st.sampled_from(SHAPES)
seeds = st.integers(0, 2**32 - 1)


def every_draw(scores, n):
    """Sums of all draws of n, and the exact share of draws that sum to that or less."""
    sums = scores[np.array(list(combinations(range(len(scores)), n)))].sum(axis=1)
    ordered = np.sort(sums)
    return sums, np.searchsorted(ordered, sums + 1e-9, side="right") / len(sums)


class TestExactTail:
    @given(seeds, st.integers(1, 12), st.data())
    @settings(max_examples=60, deadline=None)
    def test_is_the_share_of_all_draws(self, seed, size, data):
        scores = np.random.default_rng(seed).integers(0, 2, size).astype(float)
        n = data.draw(st.integers(1, size))
        sums, exact = every_draw(scores, n)
        np.testing.assert_allclose(p_values(scores, np.full(len(sums), n), sums), exact, rtol=1e-12)

    @given(seeds, st.integers(2, 100_000), st.floats(0, 1))
    @settings(max_examples=40, deadline=None)
    def test_is_scipys(self, seed, population, share):
        rng = np.random.default_rng(seed)
        hits = round(share * population)
        n = rng.integers(1, population, 50, endpoint=True)
        k = np.where(rng.random(50) < 0.5, rng.hypergeometric(hits, population - hits, n), 0)
        k = np.maximum(k, np.maximum(0, n + hits - population))
        expected = scipy.stats.hypergeom.cdf(k, population, hits, n)
        np.testing.assert_allclose(hypergeometric_tail(population, hits, n, k), expected, rtol=1e-7, atol=1e-300)

    def test_counts_that_fit_four_bytes_but_not_with_those_of_the_whole(self):
        scores = (np.arange(100_000) % 5 > 0).astype(float)
        drawn, right = np.array([70_000, 10]), np.array([55_000, 5])
        narrow = p_values(scores, drawn.astype(np.int32), right.astype(float))
        np.testing.assert_array_equal(narrow, hypergeometric_tail(100_000, 80_000, drawn, right))

    def test_far_tails_do_not_vanish(self):
        p = hypergeometric_tail(7_057, 5_504, np.array([500]), np.array([250]))[0]
        assert p == pytest.approx(scipy.stats.hypergeom.cdf(250, 7_057, 5_504, 500), rel=1e-8)
        assert 0 < p < 1e-35

    @given(seeds)
    @settings(max_examples=20, deadline=None)
    def test_any_two_values_are_hits_and_misses(self, seed):
        rng = np.random.default_rng(seed)
        hit = rng.random(60) < 0.7
        n = rng.integers(1, 60, 30)
        k = rng.hypergeometric(hit.sum(), 60 - hit.sum(), n)
        p = p_values(hit.astype(float), n, k.astype(float))
        np.testing.assert_allclose(p_values(0.2 + 0.7 * hit, n, 0.2 * n + 0.7 * k), p, rtol=1e-12)


class TestPermutationTail:
    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("n", [10, 40, 1_000])
    def test_random_slices_are_as_rarely_low_as_they_claim(self, shape, n):
        """The size of the test, and that it is not bought by calling nothing low."""
        rng = np.random.default_rng(n)
        scores = shape(rng, 2_000)
        draws = 80_000 if n < 1_000 else 10_000
        order = (rng.permutation(scores) for _ in range(-(-draws // (2_000 // n))))
        sums = np.concatenate([o.reshape(-1, n).sum(axis=1) for o in order])
        p = p_values(scores, np.full(len(sums), n), sums)
        for level in LEVELS:
            noise = 4 * np.sqrt(level / len(sums))
            assert (p <= level).mean() <= level + noise
        assert (p <= 0.05).mean() > (0.005 if n == 10 else 0.01 if n == 40 else 0.035)

    @given(seeds, st.integers(3, 12), shapes, st.data())
    @settings(max_examples=80, deadline=None)
    def test_is_not_below_the_share_of_all_draws(self, seed, size, shape, data):
        scores = shape(np.random.default_rng(seed), size)
        n = data.draw(st.integers(1, size))
        sums, exact = every_draw(scores, n)
        p = p_values(scores, np.full(len(sums), n), sums)
        assert (p >= 0.95 * exact).all()
        assert (p <= 1).all()

    @given(seeds, shapes)
    @settings(max_examples=30, deadline=None)
    def test_rises_with_the_sum_and_follows_the_scale(self, seed, shape):
        rng = np.random.default_rng(seed)
        scores = shape(rng, 400)
        for n in (1, 10, 150, 395, 400):
            sums = np.linspace(np.sort(scores)[:n].sum(), np.sort(scores)[-n:].sum(), 200)
            p = p_values(scores, np.full(200, n), sums)
            assert (np.diff(p) >= 0).all()
            np.testing.assert_allclose(p_values(0.5 * scores, np.full(200, n), 0.5 * sums), p, rtol=1e-6)

    def test_is_close_to_the_truth_where_that_is_smooth(self):
        """Against the normal tail, which is right for a sum of 1,500 even scores; and one by one far out."""
        scores = np.random.default_rng(0).random(7_000)
        n, z = 1_500, np.array([-1.0, -3.0, -6.0])
        sums = n * scores.mean() + z * scores.std() * np.sqrt(n * (1 - n / 7_000))
        np.testing.assert_allclose(p_values(scores, np.full(3, n), sums), scipy.stats.norm.cdf(z), rtol=0.35)

    def test_sizes_that_share_a_curve_agree_with_their_neighbours(self):
        scores = np.random.default_rng(0).beta(5, 1, 5_000)
        n = np.arange(100, 4_900, 7)
        sums = n * scores.mean() - 3 * scores.std() * np.sqrt(n * (1 - n / 5_000))
        p = p_values(scores, n, sums)
        assert (np.abs(np.diff(np.log(p))) < 0.05).all()

    def test_nothing_scored_nothing_said_and_equal_scores_say_nothing(self):
        scores = np.array([0.5, 0.5, 0.5, np.nan])
        np.testing.assert_array_equal(p_values(scores, np.array([0, 2]), np.array([0.0, 1.0])), [np.nan, 1.0])
        nothing = p_values(np.full(3, np.nan), np.zeros(2, dtype=np.int64), np.zeros(2))
        assert np.isnan(nothing).all()

    def test_more_scored_than_there_are_is_refused(self):
        with pytest.raises(InvalidInput, match="scored"):
            p_values(np.array([0.0, 1.0]), np.array([3]), np.array([1.0]))


class TestQValues:
    @given(st.lists(st.floats(0, 1) | st.just(float("nan")), max_size=40))
    def test_are_benjamini_hochbergs(self, values):
        p = np.array(values, dtype=float)
        q = q_values(p)
        tested = p[~np.isnan(p)]
        np.testing.assert_array_equal(np.isnan(q), np.isnan(p))
        for i in np.flatnonzero(~np.isnan(p)):
            expected = min(min(1.0, x * len(tested) / (tested <= x).sum()) for x in tested if x >= p[i])
            assert q[i] == pytest.approx(expected, rel=1e-12)

    def test_shuffled_scores_seldom_have_any_slice_called(self):
        """Paper-shaped tags, nothing to find, every run counted in which anything at all has q <= 0.05."""
        codes, tag_counts, binary = paper_table(1_500, 14)
        runs = 200
        for scores in (binary[:, 0], np.rint(64 * missed(np.random.default_rng(1), 1_500)) / 64):
            shuffled = permuted_scores(scores, runs, seed=2)
            slices = enumerate_slices(codes, tag_counts, shuffled, min_count=10, max_depth=2)
            p = p_values(scores, slices.scored.reshape(-1), slices.total.reshape(-1)).reshape(-1, runs)
            called = sum(q_values(column).min() <= 0.05 for column in p.T)
            assert called <= runs * 0.05 + 3 * np.sqrt(runs * 0.05 * 0.95)
            assert found_by_chance(slices, scores.mean(), margin=0.2).mean > 1  # from which the rule alone is not safe

    def test_slices_with_few_scores_are_no_candidates(self):
        slices = Slices(np.array([[0], [1]]), np.array([9, 20]), np.array([[9], [10]]), np.array([[1.0], [2.0]]))
        scores = np.repeat([0.0, 1.0], [30, 70])
        p, q = slice_significance(slices, 0, scores, min_scored=10)
        assert np.isnan([p[0], q[0]]).all()
        assert q[1] == p[1] < 1e-3


class TestByChance:
    @given(st.lists(st.floats(0, 1) | st.just(float("nan")), min_size=1, max_size=30), st.integers(1, 5), seeds)
    def test_shuffling_keeps_the_scores_and_what_is_not_scored(self, values, permutations, seed):
        scores = np.array(values)
        shuffled = permuted_scores(scores, permutations, seed)
        assert shuffled.shape == (len(scores), permutations)
        for column in shuffled.T:
            np.testing.assert_array_equal(np.isnan(column), np.isnan(scores))
            np.testing.assert_array_equal(np.sort(column), np.sort(scores))
        np.testing.assert_array_equal(shuffled, permuted_scores(scores, permutations, seed))

    def test_every_order_is_as_likely(self):
        shuffled = permuted_scores(np.array([0.1, np.nan, 0.2, 0.3]), 6_000, seed=0)
        _, counts = np.unique(shuffled[[0, 2, 3]], axis=1, return_counts=True)
        assert len(counts) == 6
        assert (np.abs(counts - 1_000) < 150).all()

    @given(tables(values=(0.0, 1.0)), seeds)
    @settings(max_examples=30, deadline=None)
    def test_counts_what_the_rule_finds_in_each_column(self, table, seed):
        scores = table.scores[:, 0]
        if np.isnan(scores).all():
            return
        shuffled = permuted_scores(scores, 4, seed)
        slices = enumerate_slices(
            table.codes, table.tag_counts, shuffled, min_count=table.min_count, max_depth=table.max_depth
        )
        chance = found_by_chance(slices, float(np.nanmean(scores)), margin=0.125)
        found = references.algorithm_3(table.codes, table.tag_counts, table.min_count, table.max_depth)
        expected = [len(references.error_slices(found, column, 0.125)) for column in shuffled.T]
        assert chance.counts.tolist() == expected
        assert chance.mean == np.mean(expected)
        assert min(expected) <= chance.low <= chance.mean <= chance.high <= max(expected) or chance.low == chance.high

    def test_range_holds_the_middle_of_the_counts(self):
        chance = chance_of(np.arange(1_001))
        assert (chance.low, chance.mean, chance.high) == (25, 500, 975)

    def test_no_permutation_is_refused(self):
        with pytest.raises(InvalidInput, match="permutations"):
            permuted_scores(np.array([1.0]), 0, seed=0)


class TestIntervals:
    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("n", [10, 60, 400])
    def test_hold_the_true_mean(self, shape, n):
        rng = np.random.default_rng(n)
        truth = shape(rng, 1_000_000).mean()
        samples = shape(rng, 400 * n)
        low, high = mean_intervals(np.append(samples, 0.5), list(np.arange(400 * n).reshape(400, n)))
        assert ((low <= truth) & (truth <= high)).mean() >= 0.95 - 3 * np.sqrt(0.05 * 0.95 / 400)
        means = samples.reshape(400, n).mean(axis=1)
        assert ((low >= 0) & (low <= means) & (means <= high) & (high <= 1)).all()
        wilson_low, wilson_high = wilson_interval(means, np.full(400, n))
        assert (high - low).mean() < 1.05 * (wilson_high - wilson_low).mean()

    @pytest.mark.parametrize(("hits", "n"), [(0, 10), (3, 10), (10, 10), (200, 250), (397, 400)])
    def test_are_clopper_pearsons_on_zeros_and_ones(self, hits, n):
        scores = np.concatenate((np.ones(hits), np.zeros(n - hits), [0.5]))
        low, high = (x[0] for x in mean_intervals(scores, [np.arange(n)]))
        exact = scipy.stats.binomtest(hits, n).proportion_ci(method="exact")
        assert (low, high) == pytest.approx((exact.low, exact.high), abs=0.015 if n < 300 else 0.002)

    def test_are_wilsons_where_all_scores_are_zero_or_one(self):
        scores = np.array([0.0, 1.0, 1.0, np.nan, 1.0])
        low, high = mean_intervals(scores, [np.arange(4), np.array([3])])
        expected = wilson_interval(np.array([2 / 3]), np.array([3]))
        assert (low[0], high[0]) == (expected[0][0], expected[1][0])
        assert np.isnan([low[1], high[1]]).all()

    def test_equal_scores_are_no_certainty_and_order_means_nothing(self):
        rng = np.random.default_rng(0)
        scores = np.concatenate((np.full(10, 0.9), rng.random(30)))
        rows = rng.permutation(np.arange(10, 40))
        low, high = mean_intervals(scores, [np.arange(10), rows, rows[::-1]])
        assert low[0] < 0.8
        assert high[0] > 0.92
        assert (low[1], high[1]) == (low[2], high[2])


class TestConfirm:
    codes, tag_counts, _ = paper_table(3_000, 10)

    def run(self, scores, seed):
        return confirm(self.codes, self.tag_counts, scores, min_count=10, max_depth=2, margin=0.2, seed=seed)

    @given(st.lists(st.floats(0, 1) | st.just(float("nan")), max_size=50), seeds)
    def test_halves_are_even_at_every_score(self, values, seed):
        scores = np.array(values, dtype=float)
        search = halves(scores, seed)
        assert abs(int(search.sum()) * 2 - len(scores)) <= 1
        for level in np.unique(scores[~np.isnan(scores)]):
            low = scores <= level
            assert abs(int(search[low].sum()) * 2 - int(low.sum())) <= 1

    def test_a_planted_slice_is_confirmed(self):
        rng = np.random.default_rng(0)
        scores = (rng.random(3_000) < 0.85).astype(float)
        item = int(enumerate_slices(self.codes, self.tag_counts, None, min_count=300, max_depth=1).items[0, 0])
        rows = references.slice_rows(self.codes, self.tag_counts, [item])
        scores[rows] = rng.random(len(rows)) < 0.4
        result = self.run(scores, seed=1)
        planted = (result.items == [item, -1]).all(axis=1)
        assert planted.sum() == 1
        assert result.q[planted][0] < 1e-6
        search = halves(scores, 1)
        for half, scored, mean in (
            (search, result.found_scored, result.found_mean),
            (~search, result.held_scored, result.held_mean),
        ):
            known, total = score_slices(self.codes[half], self.tag_counts, result.items, scores[half][:, None])
            np.testing.assert_array_equal(scored, known[:, 0])
            np.testing.assert_allclose(mean, total[:, 0] / known[:, 0])

    def test_what_chance_found_is_not_confirmed(self):
        rng = np.random.default_rng(5)
        runs, found, called = 60, 0, 0
        for seed in range(runs):
            scores = (rng.random(3_000) < 0.8).astype(float)
            result = self.run(scores, seed=seed)
            found += len(result.items)
            called += bool((result.q <= 0.05).any())
        assert found > runs
        assert called <= runs * 0.05 + 3 * np.sqrt(runs * 0.05 * 0.95)

    def test_one_score_cannot_be_halved(self):
        scores = np.full(3_000, np.nan)
        scores[0] = 1.0
        with pytest.raises(InvalidInput, match="two halves"):
            self.run(scores, seed=0)

    def test_is_what_the_rule_finds_on_the_searched_half(self):
        scores = np.random.default_rng(2).random(3_000)
        search = halves(scores, 7)
        slices = enumerate_slices(
            self.codes[search], self.tag_counts, scores[search][:, None], min_count=10, max_depth=2
        )
        errors = find_error_slices(slices, 0, scores[search].mean(), 1.0, margin=0.2)
        result = self.run(scores, seed=7)
        np.testing.assert_array_equal(result.items, slices.items[errors.index])
