from itertools import combinations, product

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from services.enumeration.error_slices import find_error_slices
from services.enumeration.lattice import Slices, enumerate_slices, item_offsets
from services.enumeration.models import (
    changes,
    difference_slices,
    paired_p_values,
    paired_scores,
    paired_significance,
    worst_overlap,
)
from shared.errors import InvalidInput, Precondition
from tests.load.shapes import paper_table
from tests.unit.enumeration import references
from tests.unit.enumeration.tables import tables

seeds = st.integers(0, 2**32 - 1)


def one_pair_slices(mean):
    """Slices of 10 instances each, with the given means (S, K)."""
    mean = np.asarray(mean, dtype=float)
    n = len(mean)
    return Slices(
        np.arange(n, dtype=np.int32)[:, None], np.full(n, 10), np.full(mean.shape, 10, dtype=np.int64), 10 * mean
    )


class TestOverlap:
    @given(tables(), st.sampled_from((0.1, 0.25, 1.0)))
    @settings(max_examples=60, deadline=None)
    def test_is_the_share_of_the_worst_that_are_the_others_worst_too(self, table, worst):
        slices = enumerate_slices(
            table.codes, table.tag_counts, table.scores, min_count=table.min_count, max_depth=min(table.max_depth, 3)
        )
        everywhere = [s for s in range(len(slices)) if (slices.scored[s] > 0).all()]
        if not everywhere:
            with pytest.raises(Precondition):
                worst_overlap(slices, worst=worst)
            return
        size = -(-len(everywhere) * int(worst * 100) // 100)
        mean = slices.total[everywhere] / slices.scored[everywhere]
        sets = []
        for k in range(mean.shape[1]):
            ranked = sorted(range(len(everywhere)), key=lambda s: (mean[s, k], -slices.count[everywhere[s]], s))
            sets.append(set(ranked[:size]))
        overlap = worst_overlap(slices, worst=worst)
        assert overlap.size == size
        for a, b in product(range(len(sets)), repeat=2):
            assert overlap.share[a, b] == pytest.approx(len(sets[a] & sets[b]) / size)
        pairs = [len(a & b) / size for a, b in combinations(sets, 2)]
        assert np.isnan(overlap.average) if not pairs else overlap.average == pytest.approx(np.mean(pairs))

    def test_of_models_that_agree_of_opposites_and_of_strangers(self):
        mean = np.random.default_rng(0).random(10_000)
        stranger = np.random.default_rng(1).random(10_000)
        overlap = worst_overlap(one_pair_slices(np.column_stack((mean, mean**2, 1 - mean, stranger))))
        assert overlap.share[0].tolist()[:3] == [1.0, 1.0, 0.0]
        assert overlap.share[0, 3] == pytest.approx(0.1, abs=0.03)

    @pytest.mark.parametrize("worst", [0.0, 1.5, float("nan")])
    def test_a_part_out_of_range_is_refused(self, worst):
        with pytest.raises(InvalidInput, match="worst"):
            worst_overlap(one_pair_slices([[0.5]]), worst=worst)


def every_swap(baseline, candidate):
    """Exact sign-flip p-value: the share of all ways to swap the two scores that lose as much or more."""
    difference = baseline - candidate
    signs = np.array(list(product((-1, 1), repeat=len(difference))))
    return (signs @ difference >= difference.sum() - 1e-9).mean()


class TestPairedTest:
    @given(seeds, st.integers(1, 10))
    @settings(max_examples=80, deadline=None)
    def test_of_zeros_and_ones_is_the_share_of_all_swaps(self, seed, n):
        baseline, candidate = np.random.default_rng(seed).integers(0, 2, (2, n)).astype(float)
        lost, square = (baseline - candidate).sum(), ((baseline - candidate) ** 2).sum()
        p = paired_p_values(np.array([lost]), np.array([square]), binary=True)[0]
        assert p == pytest.approx(every_swap(baseline, candidate), rel=1e-12)

    @given(seeds, st.integers(0, 5_000))
    @settings(max_examples=40, deadline=None)
    def test_of_zeros_and_ones_is_mcnemars(self, seed, trials):
        worse = int(np.random.default_rng(seed).integers(0, trials, endpoint=True))
        p = paired_p_values(np.array([2.0 * worse - trials]), np.array([float(trials)]), binary=True)[0]
        expected = scipy.stats.binomtest(worse, trials, 0.5, "greater").pvalue if worse else 1.0
        assert p == pytest.approx(expected, rel=1e-9)

    @given(seeds, st.integers(1, 12), st.sampled_from((0.0, 0.001, 0.05, 0.5)))
    @settings(max_examples=150, deadline=None)
    def test_of_scores_in_between_is_never_below_the_share_of_all_swaps(self, seed, n, shift):
        rng = np.random.default_rng(seed)
        difference = rng.choice([0.0, 0.05, 1.0], n) * rng.choice([-1, 1], n) * rng.random(n) + shift
        p = paired_p_values(np.array([difference.sum()]), np.array([(difference**2).sum()]), binary=False)[0]
        assert p >= every_swap(difference, np.zeros(n)) - 1e-12

    def test_of_scores_in_between_can_tell(self):
        rng = np.random.default_rng(0)
        baseline = rng.beta(8, 2, 40)
        candidate = np.clip(baseline - rng.normal(0.1, 0.1, 40), 0, 1)
        lost, square = (baseline - candidate).sum(), ((baseline - candidate) ** 2).sum()
        worse = paired_p_values(np.array([lost, -lost]), np.array([square, square]), binary=False)
        assert worse[0] < 1e-3
        assert worse[1] == 1.0

    def test_no_difference_is_no_evidence(self):
        for binary in (True, False):
            assert paired_p_values(np.zeros(2), np.array([0.0, 4.0]), binary=binary)[0] == 1.0

    @given(tables(values=(0.0, 1.0)) | tables())
    @settings(max_examples=30, deadline=None)
    def test_works_from_the_sums_of_the_slices(self, table):
        baseline, candidate = table.scores[:, 0], table.scores[::-1, 0]
        if np.isnan(baseline + candidate).all():
            with pytest.raises(Precondition, match="both"):
                paired_scores(baseline, candidate)
            return
        paired = paired_scores(baseline, candidate)
        np.testing.assert_array_equal(np.isnan(paired), np.repeat(np.isnan(baseline + candidate)[:, None], 3, axis=1))
        slices = enumerate_slices(table.codes, table.tag_counts, paired, min_count=2, max_depth=2)
        p = paired_significance(slices, paired, min_scored=3)
        np.testing.assert_array_equal(np.isnan(p), slices.scored[:, 0] < 3)
        found = references.algorithm_3(table.codes, table.tag_counts, 2, 2)
        binary = set(np.unique(baseline[~np.isnan(baseline + candidate)])) <= {0.0, 1.0}
        for value, rows in zip(p, sorted_extents(found), strict=True):
            difference = (baseline - candidate)[rows]
            difference = difference[~np.isnan(difference)]
            if len(difference) >= 3:
                lost, square = np.array([difference.sum()]), np.array([(difference**2).sum()])
                assert value == pytest.approx(paired_p_values(lost, square, binary=binary)[0], rel=1e-5, abs=1e-7)

    def test_scores_of_other_instances_are_refused(self):
        with pytest.raises(InvalidInput, match="candidate"):
            paired_scores(np.zeros(3), np.zeros(4))


def sorted_extents(found):
    return [found[s] for s in sorted(found, key=lambda s: (len(s), s))]


class TestDifferenceSlices:
    @given(tables(values=(0.0, 1.0)) | tables(values=(0.0, 0.5, 1.0)), seeds, st.sampled_from((0.0, 0.125)))
    @settings(max_examples=60, deadline=None)
    def test_are_the_error_slices_of_the_difference(self, table, seed, margin):
        baseline = table.scores[:, 0]
        candidate = np.random.default_rng(seed).permutation(baseline)
        difference = candidate - baseline
        if np.isnan(difference).all():
            return
        paired = paired_scores(baseline, candidate)
        depth = min(table.max_depth, 3)
        slices = enumerate_slices(table.codes, table.tag_counts, paired, min_count=table.min_count, max_depth=depth)
        result = difference_slices(slices, paired, margin=margin, min_scored=1)
        found = references.algorithm_3(table.codes, table.tag_counts, table.min_count, depth)
        # The rule on (1 + difference) / 2, which is a score, with half the margin; eighths add up exactly.
        expected = references.error_slices(found, (1 + difference) / 2, margin / 2)
        offsets = item_offsets(table.tag_counts)
        got = [[int(i) for i in slices.items[s] if i >= 0] for s in result.index]
        assert got == [[int(offsets[a] + t) for a, t in pairs] for pairs in expected]
        for e, pairs in enumerate(expected):
            rows = found[pairs][~np.isnan(difference[found[pairs]])]
            assert result.baseline_mean[e] == pytest.approx(baseline[rows].mean())
            assert result.candidate_mean[e] == pytest.approx(candidate[rows].mean())
        p = paired_significance(slices, paired, min_scored=1)
        np.testing.assert_array_equal(result.p, p[result.index])
        assert (result.q >= result.p).all()

    def test_find_where_one_model_fell_behind(self):
        codes, tag_counts, scores = paper_table(3_000, 8)
        baseline = scores[:, 0]
        hit = (codes[:, 3] == 0) & (codes[:, 6] == 0)
        candidate = np.where(hit & (np.random.default_rng(0).random(3_000) < 0.5), 0.0, baseline)
        paired = paired_scores(baseline, candidate)
        slices = enumerate_slices(codes, tag_counts, paired, min_count=10, max_depth=2)
        result = difference_slices(slices, paired, margin=0.2, min_scored=10)
        offsets = item_offsets(tag_counts)
        assert slices.items[result.index[0]].tolist() == [offsets[3], offsets[6]]
        assert result.q[0] < 1e-6
        back = paired_scores(candidate, baseline)
        slices = enumerate_slices(codes, tag_counts, back, min_count=10, max_depth=2)
        assert len(difference_slices(slices, back, margin=0.2, min_scored=10).index) == 0


class TestChanges:
    def sort(self, means, overall, margin=0.2):
        slices = one_pair_slices(means)
        errors = [find_error_slices(slices, k, overall[k], 1.0, margin=margin) for k in (0, 1)]
        return slices, changes(slices, *errors, overall, margin=margin)

    def test_what_became_of_each(self):
        means = [[0.3, 0.8], [0.3, 0.2], [0.8, 0.4], [0.3, 0.5], [0.4, 0.4], [0.9, 0.9]]
        _, result = self.sort(means, (0.8, 0.8))
        assert result.fixed.tolist() == [0]
        assert result.regressed.tolist() == [1]
        assert result.new.tolist() == [2]
        assert result.kept.tolist() == [4, 3]
        np.testing.assert_allclose(np.column_stack((result.baseline_mean, result.candidate_mean)), means)

    def test_the_largest_change_of_the_summed_score_is_told_first(self):
        means = np.array([[0.3, 0.9], [0.5, 0.61], [0.5, 0.9], [0.3, 0.2], [0.5, 0.1], [0.9, 0.5], [0.9, 0.2]])
        count = np.array([10, 90, 20, 10, 10, 10, 10])
        items = np.arange(len(means), dtype=np.int32)[:, None]
        slices = Slices(items, count, np.column_stack((count, count)), count[:, None] * means)
        errors = [find_error_slices(slices, k, 0.8, 1.0, margin=0.2) for k in (0, 1)]
        result = changes(slices, *errors, (0.8, 0.8), margin=0.2)
        assert result.fixed.tolist() == [1, 2, 0]
        assert result.regressed.tolist() == [4, 3]
        assert result.new.tolist() == [6, 5]

    def test_a_slice_hidden_by_a_parent_as_bad_is_not_fixed(self):
        items = np.array([[0, -1], [0, 2]], dtype=np.int32)
        items = np.concatenate((items[:1], [[2, -1]], items[1:])).astype(np.int32)
        mean = np.array([[0.7, 0.25], [0.75, 0.75], [0.25, 0.25]])
        slices = Slices(items, np.full(3, 20), np.full((3, 2), 20), 20 * mean)
        errors = [find_error_slices(slices, k, 0.8, 1.0, margin=0.2) for k in (0, 1)]
        assert [e.index.tolist() for e in errors] == [[2], [0]]
        result = changes(slices, *errors, (0.8, 0.8), margin=0.2)
        assert (result.fixed.tolist(), result.new.tolist(), result.kept.tolist()) == ([], [0], [2])

    @given(tables(values=(0.0, 0.5, 1.0)), seeds)
    @settings(max_examples=40, deadline=None)
    def test_every_error_slice_is_one_of_the_four(self, table, seed):
        scores = np.column_stack((table.scores[:, 0], np.random.default_rng(seed).permutation(table.scores[:, 0])))
        if np.isnan(scores[:, 0]).all():
            return
        slices = enumerate_slices(table.codes, table.tag_counts, scores, min_count=2, max_depth=2)
        overall = tuple(float(x) for x in np.nanmean(scores, axis=0))
        errors = [find_error_slices(slices, k, overall[k], 1.0, margin=0.125) for k in (0, 1)]
        result = changes(slices, *errors, overall, margin=0.125)
        parts = [result.fixed, result.regressed, result.new, result.kept]
        assert sorted(np.concatenate(parts)) == sorted({*errors[0].index, *errors[1].index})
        assert set(result.fixed) <= set(errors[0].index)
        assert set(result.new) <= set(errors[1].index)
