from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.repair.interval import paired_change

PAIRS = st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=50)


@given(PAIRS)
def test_the_change_is_the_mean_of_differences_inside_its_interval(pairs):
    before, after = np.array(pairs).T
    found = paired_change(before, after)
    assert found.mean == pytest.approx(float((after - before).mean()))
    assert -1 <= found.low <= found.mean <= found.high <= 1
    assert found.low < found.high


@given(PAIRS)
def test_the_other_way_round_is_the_mirror(pairs):
    before, after = np.array(pairs).T
    one, two = paired_change(before, after), paired_change(after, before)
    assert (one.low, one.high) == (pytest.approx(-two.high), pytest.approx(-two.low))


def test_few_instances_that_did_not_change_are_not_certain():
    few, many = (paired_change(np.ones(n), np.ones(n)) for n in (3, 3000))
    assert few.high > 0.3
    assert many.high < 0.002


@pytest.mark.parametrize("n", [8, 30, 300])
@pytest.mark.parametrize(("better", "worse"), [(0.1, 0.1), (0.3, 0.05), (0.02, 0.0)])
def test_it_holds_the_true_change_about_as_often_as_it_says(n, better, worse):
    rng = np.random.default_rng([n, int(better * 100)])
    hits = 0
    for _ in range(2000):
        change = rng.choice([1.0, -1.0, 0.0], n, p=[better, worse, 1 - better - worse])
        found = paired_change(np.maximum(-change, 0), np.maximum(change, 0))
        hits += found.low <= better - worse <= found.high
    assert hits / 2000 > 0.925
