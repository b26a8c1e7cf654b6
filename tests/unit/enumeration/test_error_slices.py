from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.enumeration.error_slices import find_error_slices
from services.enumeration.lattice import Slices, enumerate_slices, item_offsets
from shared.intervals import wilson_interval
from tests.unit.enumeration import references
from tests.unit.enumeration.tables import tables

# Quarters add up exactly, so that the reference's means are the very numbers of the rule.
exact_scores = tables(values=(0.0, 1.0)) | tables(values=(0.0, 0.25, 0.5, 1.0))


def overall(scores):
    """Mean and lost score of one column; mean 0 where nothing is scored."""
    known = scores[~np.isnan(scores)]
    return (known.mean() if len(known) else 0.0), (1 - known).sum()


def find(slices, scores, margin, column=0):
    mean, loss = overall(scores[:, column])
    return find_error_slices(slices, column, mean, loss, margin=margin)


@given(table=exact_scores, margin=st.sampled_from((0.0, 0.125, 0.2)))
@settings(max_examples=150, deadline=None)
def test_is_the_papers_rule(table, margin):
    arguments = (table.codes, table.tag_counts)
    slices = enumerate_slices(*arguments, table.scores, min_count=table.min_count, max_depth=table.max_depth)
    found = references.algorithm_3(*arguments, table.min_count, table.max_depth)
    offsets = item_offsets(table.tag_counts)
    for column in range(table.scores.shape[1]):
        scores = table.scores[:, column]
        expected = references.error_slices(found, scores, margin)
        errors = find(slices, table.scores, margin, column)
        got = [[int(i) for i in slices.items[s] if i >= 0] for s in errors.index]
        assert got == [[int(offsets[a] + t) for a, t in pairs] for pairs in expected]

        mean, loss = overall(scores)
        for e, pairs in enumerate(expected):
            inside = scores[found[pairs]]
            inside = inside[~np.isnan(inside)]
            parents = [pairs[:i] + pairs[i + 1 :] for i in range(len(pairs))]
            best = min(np.nanmean(scores[found[p]]) if p else mean for p in parents)
            assert errors.mean[e] == pytest.approx(inside.mean(), abs=1e-12)
            assert errors.drop[e] == pytest.approx(mean - inside.mean(), abs=1e-12)
            assert errors.parent_drop[e] == pytest.approx(best - inside.mean(), abs=1e-12)
            assert errors.error_share[e] == pytest.approx((1 - inside).sum() / loss, abs=1e-12)
            assert 0 <= errors.interval_low[e] <= errors.mean[e] <= errors.interval_high[e] <= 1


@given(tables())
@settings(max_examples=50, deadline=None)
def test_a_pair_that_changes_nothing_is_never_kept(table):
    """A copied attribute gives slices of equal extent: their means are equal, not a rounding apart."""
    codes = np.column_stack((table.codes, table.codes))
    tag_counts = np.concatenate((table.tag_counts, table.tag_counts))
    slices = enumerate_slices(codes, tag_counts, table.scores, min_count=2, max_depth=2)
    errors = find(slices, table.scores, 0.0)
    half = item_offsets(tag_counts)[len(table.tag_counts)]
    first, second = slices.items[errors.index].T
    assert not (second - first == half).any()


def test_ties_go_to_the_larger_then_the_shorter_then_the_earlier():
    items = np.array([[0, -1], [1, -1], [2, -1], [3, -1], [0, 2], [1, 3]], dtype=np.int32)
    count = np.array([10, 20, 20, 40, 20, 10])
    mean = np.array([0.5, 0.25, 0.5, 0.375, 0.25, 0.125])
    slices = Slices(items, count, count[:, None], (mean * count)[:, None])
    errors = find_error_slices(slices, 0, 0.9, 10.0, margin=0.2)
    assert errors.index.tolist() == [5, 1, 4, 3, 2, 0]


def test_slices_without_a_score_have_no_mean():
    codes = np.array([[0], [0], [1], [1]], dtype=np.uint8)
    scores = np.array([[np.nan], [np.nan], [0.0], [1.0]])
    slices = enumerate_slices(codes, [2], scores, min_count=1, max_depth=1)
    assert find(slices, scores, 0.0).index.tolist() == []
    nothing = np.full((4, 1), np.nan)
    slices = enumerate_slices(codes, [2], nothing, min_count=1, max_depth=1)
    assert len(find(slices, nothing, 0.0)) == 0


def test_no_slices_no_error_slices():
    slices = enumerate_slices(np.zeros((0, 2), dtype=np.uint8), [2, 2], np.zeros((0, 1)), min_count=1, max_depth=2)
    errors = find_error_slices(slices, 0, 0.0, 0.0, margin=0.2)
    assert all(len(getattr(errors, f.name)) == 0 for f in fields(errors))


def test_deep_slices_of_the_widest_schema():
    """72 attributes of 1000 tags and 6 pairs: the items of a parent would not fit one 64-bit key."""
    rng = np.random.default_rng(0)
    tag_counts = np.full(72, 1000)
    codes = rng.integers(0, 1000, (60, 72)).astype(np.uint16)
    codes[:20, -7:] = 999
    scores = np.ones((60, 1))
    scores[:20] = rng.integers(0, 2, (20, 1))
    codes[:10, -8] = 998
    scores[:10] = 0.0
    slices = enumerate_slices(codes, tag_counts, scores, min_count=8, max_depth=6)
    assert (slices.items[:, 5] > 71_000).any()
    found = references.algorithm_3(codes[:, -8:], tag_counts[-8:], 8, 6)
    expected = references.error_slices(found, scores[:, 0], 0.2)
    errors = find(slices, scores, 0.2)
    got = [[int(i) - 64_000 for i in slices.items[s] if i >= 0] for s in errors.index]
    assert got == [[1000 * a + t for a, t in pairs] for pairs in expected]
    assert len(got) > 1


def test_a_missing_parent_is_said():
    codes = np.array([[0, 0]] * 3 + [[0, 1]] * 3 + [[1, 0]] * 3, dtype=np.uint8)
    scores = np.array([[0.0]] * 3 + [[1.0]] * 6)
    slices = enumerate_slices(codes, [2, 2], scores, min_count=1, max_depth=2)
    keep = np.arange(len(slices)) != 2
    partial = replace(slices, **{f.name: getattr(slices, f.name)[keep] for f in fields(slices)})
    with pytest.raises(ValueError, match="parent slice is missing"):
        find(partial, scores, 0.2)


@given(st.integers(1, 2000), st.data())
def test_wilson_interval_holds_the_scores_that_pass_the_score_test(count, data):
    """Its ends are the means at which the observed mean lies 1.96 standard errors away."""
    hits = data.draw(st.integers(0, count))
    mean = hits / count
    low, high = (float(x[0]) for x in wilson_interval(np.array([mean]), np.array([count])))
    assert 0 <= low <= mean <= high <= 1
    for end in (low, high):
        if 1e-9 < end < 1 - 1e-9:
            assert abs(mean - end) == pytest.approx(1.959964 * np.sqrt(end * (1 - end) / count), rel=1e-5, abs=1e-9)
