import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.enumeration.error_slices import find_error_slices
from services.enumeration.gate import Severity, gate
from services.enumeration.lattice import enumerate_slices, item_offsets
from services.enumeration.models import paired_scores
from shared.errors import InvalidInput, Precondition
from tests.load.shapes import paper_table
from tests.unit.enumeration.tables import tables

CODES, TAG_COUNTS, _ = paper_table(3_000, 8)
OFFSETS = item_offsets(TAG_COUNTS)
PAIR = (int(OFFSETS[3]), int(OFFSETS[6]))
HIT = (CODES[:, 3] == 0) & (CODES[:, 6] == 0)  # 141 of the 3,000
OPTIONS = {"max_drop": 0.05, "margin": 0.2, "min_scored": 10}


def judge(baseline, candidate, **changed):
    paired = paired_scores(baseline, candidate)
    slices = enumerate_slices(CODES, TAG_COUNTS, paired, min_count=10, max_depth=2)
    return gate(slices, paired, **{**OPTIONS, **changed})


def model(seed, chance=0.85, hit_chance=None):
    """0/1 scores that are right with `chance`, and with `hit_chance` on the rows of PAIR."""
    level = np.where(HIT, chance if hit_chance is None else hit_chance, chance)
    return (np.random.default_rng(seed).random(len(CODES)) < level).astype(float)


def test_the_same_model_passes():
    verdict = judge(model(0), model(0))
    assert verdict.passed
    assert verdict.regressions == ()
    assert "passed" in verdict.reason


def test_a_slice_that_broke_fails_and_is_told_first():
    baseline = model(0)
    candidate = np.where(HIT, model(1, hit_chance=0.4), baseline)
    verdict = judge(baseline, candidate, describe=lambda items: f"slice {items}")
    assert not verdict.passed
    first = verdict.regressions[0]
    assert first.items == PAIR
    assert first.scored == HIT.sum()
    assert first.baseline_mean == pytest.approx(baseline[HIT].mean())
    assert first.candidate_mean == pytest.approx(candidate[HIT].mean())
    assert first.drop > first.limit == 0.05
    assert first.reason in verdict.reason
    assert f"slice {PAIR}" in first.reason
    assert f"{first.baseline_mean:.3f}" in first.reason
    assert f"{first.candidate_mean:.3f}" in first.reason
    assert judge(candidate, baseline).passed  # mended, not broken


@pytest.mark.parametrize("in_between", [False, True])
def test_chance_seldom_stops_a_candidate_that_is_no_worse(in_between):
    """Two equally good models, many runs; without the test most would be stopped."""
    runs, stopped, dropped = 60, 0, 0
    for seed in range(runs):
        baseline, candidate = (model(2 * seed + k, hit_chance=0.5) for k in (0, 1))
        if in_between:
            noise = np.rint(16 * np.random.default_rng(seed).beta(6, 2, (2, len(CODES)))) / 16
            baseline, candidate = baseline * noise[0], candidate * noise[1]
        verdict = judge(baseline, candidate)
        stopped += not verdict.passed
        assert verdict.judged > 0
        paired = paired_scores(baseline, candidate)
        slices = enumerate_slices(CODES, TAG_COUNTS, paired, min_count=10, max_depth=2)
        errors = find_error_slices(slices, 1, candidate.mean(), 1.0, margin=0.2).index
        dropped += bool(((slices.total[errors, 0] - slices.total[errors, 1]) / slices.count[errors] > 0.05).any())
    assert dropped > 0.7 * runs
    assert stopped <= runs * 0.05 + 3 * np.sqrt(runs * 0.05 * 0.95)


def test_a_drop_within_its_limit_passes():
    baseline = model(0)
    candidate = np.where(HIT, model(1, hit_chance=0.4), baseline)
    drop = baseline[HIT].mean() - candidate[HIT].mean()
    failed = {r.items for r in judge(baseline, candidate).regressions}
    assert PAIR in failed
    limits = {"slice_limits": {PAIR: drop + 1e-6}}
    assert PAIR not in {r.items for r in judge(baseline, candidate, **limits).regressions}
    limits = {"slice_limits": {PAIR: drop - 1e-6}, "max_drop": 1.0}
    assert [r.items for r in judge(baseline, candidate, **limits).regressions] == [PAIR]


def test_a_slice_with_a_limit_is_judged_though_it_is_no_error_slice():
    baseline = np.ones(len(CODES))
    candidate = np.where(HIT, model(1, chance=0.9), 1.0)  # far from an error slice
    assert PAIR not in {r.items for r in judge(baseline, candidate).regressions}
    verdict = judge(baseline, candidate, slice_limits={PAIR[::-1]: 0.02})
    assert [r.items for r in verdict.regressions] == [PAIR]


def test_severe_slices_have_their_own_limit():
    baseline = model(0)
    candidate = np.where(HIT, model(1, hit_chance=0.4), baseline)
    shortfall = candidate.mean() - candidate[HIT].mean()
    loose = [Severity("bad", 0.1, 1.0), Severity("any", -1.0, 0.0)]
    assert PAIR not in {r.items for r in judge(baseline, candidate, severities=loose).regressions}
    strict = [*loose, Severity("worse", shortfall - 1e-6, 0.01)]
    found = {r.items: r.limit for r in judge(baseline, candidate, severities=strict).regressions}
    assert found[PAIR] == 0.01
    short_of = [*loose, Severity("worse", shortfall + 1e-6, 0.01)]
    assert PAIR not in {r.items for r in judge(baseline, candidate, severities=short_of).regressions}


def test_an_overall_drop_is_judged_too():
    baseline, candidate = model(0, 0.95), model(1, 0.85)
    verdict = judge(baseline, candidate, max_overall_drop=0.05)
    assert verdict.regressions[0].items == ()
    assert "the whole dataset" in verdict.reason
    assert all(r.items for r in judge(baseline, candidate, max_overall_drop=0.2).regressions)


def test_every_slice_can_be_judged():
    baseline = np.ones(len(CODES))
    candidate = np.where(HIT, model(1, chance=0.88), 1.0)
    few, all_ = judge(baseline, candidate), judge(baseline, candidate, every_slice=True)
    assert few.judged < all_.judged == all_.compared == few.compared
    assert PAIR in {r.items for r in all_.regressions}


class TestNothingToCompare:
    def test_no_slice_with_enough_scores_fails(self):
        baseline = np.full(len(CODES), np.nan)
        baseline[:5] = 1.0
        verdict = judge(baseline, baseline)
        assert not verdict.passed
        assert verdict.compared == 0
        assert "nothing could be compared" in verdict.reason

    def test_no_instance_with_both_scores_is_refused(self):
        scores = model(0)
        first, second = scores.copy(), scores.copy()
        first[::2], second[1::2] = np.nan, np.nan
        with pytest.raises(Precondition, match="nothing can be compared"):
            judge(first, second)

    @pytest.mark.parametrize("items", [(10_000,), (), (0, 1, 2, 3), (0, 1)])
    def test_a_slice_with_a_limit_that_is_not_there_fails(self, items):
        verdict = judge(model(0), model(0), slice_limits={items: 0.1}, describe=lambda i: f"<{i}>")
        assert not verdict.passed
        assert f"<{items}>" in verdict.reason


@given(table=tables(values=(0.0, 1.0)), seed=st.integers(0, 2**32 - 1), every_slice=st.booleans())
@settings(max_examples=60, deadline=None)
def test_every_regression_is_a_drop_beyond_its_limit_that_is_significant(table, seed, every_slice):
    baseline = table.scores[:, 0]
    candidate = np.where(np.random.default_rng(seed).random(len(baseline)) < 0.6, 0.0, baseline)
    if np.isnan(baseline + candidate).all():
        return
    paired = paired_scores(baseline, candidate)
    slices = enumerate_slices(table.codes, table.tag_counts, paired, min_count=table.min_count, max_depth=2)
    verdict = gate(slices, paired, max_drop=0.1, margin=0.1, min_scored=2, every_slice=every_slice)
    assert verdict.passed == (verdict.compared > 0 and not verdict.regressions)
    for r in verdict.regressions:
        assert r.drop == pytest.approx(r.baseline_mean - r.candidate_mean)
        assert r.drop > r.limit == 0.1
        assert r.q <= 0.05
        assert r.scored >= 2
    excess = [r.drop - r.limit for r in verdict.regressions if r.items]
    assert excess == sorted(excess, reverse=True)


@pytest.mark.parametrize(
    ("changed", "fields"),
    [
        ({"max_drop": -0.1}, ["max_drop"]),
        ({"max_drop": float("nan")}, ["max_drop"]),
        ({"max_overall_drop": 1.5}, ["max_overall_drop"]),
        ({"slice_limits": {PAIR: 2.0}}, ["slice_limits"]),
        ({"severities": [Severity("x", float("nan"), 3.0)]}, ["severities", "severities"]),
        ({"max_false_alarm": 0.0}, ["max_false_alarm"]),
        ({"max_drop": 2.0, "max_false_alarm": 1.0}, ["max_drop", "max_false_alarm"]),
    ],
)
def test_limits_out_of_range_are_named(changed, fields):
    with pytest.raises(InvalidInput) as caught:
        judge(model(0), model(1), **changed)
    assert [v.field for v in caught.value.violations] == fields
