"""Verification against plain counting, and what its intervals and its base rate promise."""

from __future__ import annotations

from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.prediction.extents import Extents
from services.prediction.verification import Baseline, Scored, random_unseen, verify
from shared.errors import InvalidInput, Precondition
from shared.intervals import mean_intervals
from shared.schema import UNKNOWN
from tests.unit.prediction.test_prior import pairs_of, schema_of


def table(rng, counts, n, unknown=0.0):
    codes = np.column_stack([np.minimum(rng.geometric(0.4, n) - 1, c - 1) for c in counts]).astype(np.uint16)
    codes[rng.random(codes.shape) < unknown] = UNKNOWN
    return codes


def all_slices(schema, depth):
    """Every combination of up to `depth` pairs as rows of items."""
    offsets = np.cumsum([0, *(len(a.tags) for a in schema.attributes)])
    rows = []
    for d in range(1, depth + 1):
        for attributes in combinations(range(len(schema.attributes)), d):
            for tags in product(*(range(len(schema.attributes[a].tags)) for a in attributes)):
                row = [int(offsets[a]) + t for a, t in zip(attributes, tags, strict=True)]
                rows.append([*row, *[-1] * (depth - d)])
    return np.array(rows, np.int32)


@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.sampled_from([0.0, 0.1, 0.3]), st.booleans())
@settings(max_examples=60, deadline=None)
def test_equals_counting(seed, min_count, margin, binary):
    rng = np.random.default_rng(seed)
    schema = schema_of([2, 3, 3])
    codes, n = table(rng, [2, 3, 3], 40, unknown=0.1), 40
    scores = (rng.random(n) < 0.6).astype(float) if binary else rng.random(n)
    scores[rng.random(n) < 0.2] = np.nan
    scores[0] = 0.5
    every = all_slices(schema, 3)
    items = every[rng.permutation(len(every))[:12]]
    data = Scored(schema, codes, scores)
    base = Baseline(data, lambda items: True, margin=margin, min_count=min_count, seed=0, count=1)
    found = verify(data, items, base)

    scored = ~np.isnan(scores)
    overall = scores[scored].mean()

    def mean(pairs):
        inside = scored & np.all([codes[:, a] == t for a, t in pairs] or [scored], axis=0)
        return scores[inside].mean() if inside.any() else np.nan

    rows = [np.all([data.codes[:, a] == t for a, t in pairs_of(schema, row)], axis=0) for row in items.tolist()]
    low, high = mean_intervals(data.scores, [np.flatnonzero(row) for row in rows])
    drops, errors = [], []
    for i, row in enumerate(items.tolist()):
        pairs = pairs_of(schema, row)
        inside = np.flatnonzero(scored & np.all([codes[:, a] == t for a, t in pairs], axis=0))
        assert found.slices.scored[i] == len(inside)
        parents = [mean(pairs[:j] + pairs[j + 1 :]) for j in range(len(pairs))]
        is_error = mean(pairs) < overall - margin and all(mean(pairs) < parent for parent in parents)
        assert found.slices.is_error[i] == is_error
        np.testing.assert_allclose(
            [found.slices.mean[i], found.slices.drop[i], found.slices.low[i], found.slices.high[i]],
            [mean(pairs), overall - mean(pairs), low[i], high[i]],
        )
        if len(inside) >= min_count:
            drops.append(overall - mean(pairs))
            errors.append(is_error)
    assert found.pair_counts == tuple(sorted({int((row >= 0).sum()) for row in items}))
    assert found.found.slices == len(drops)
    if drops:
        assert found.found.mean_drop == pytest.approx(np.mean(drops))
        assert found.found.error_share == pytest.approx(np.mean(errors))
        assert overall - 1 <= found.found.low <= found.found.mean_drop <= found.found.high <= overall
    else:
        assert np.isnan([found.found.mean_drop, found.base.mean_drop]).all()


def test_the_base_rate_is_that_of_all_unseen_combinations_of_as_many_pairs():
    rng = np.random.default_rng(1)
    schema = schema_of([3, 3, 3])
    codes = table(rng, [3, 3, 3], 3000)
    scores = np.where(codes[:, 0] == 2, rng.random(3000) < 0.3, rng.random(3000) < 0.9).astype(float)
    seen = Extents(schema, codes[:300])
    data = Scored(schema, codes[300:], scores[300:])
    base = Baseline(data, lambda items: seen.count(items) < 20, margin=0.2, min_count=10, seed=3)
    every = all_slices(schema, 3)
    enough = [r for r in every if seen.count(r[r >= 0]) < 20 and data.extents.count(r[r >= 0]) >= 10]
    of_two, of_three = ([r for r in enough if (r >= 0).sum() == d] for d in (2, 3))
    assert len(of_two) > 2 < len(of_three)
    # One verifiable prediction of two pairs and three of three pairs.
    found = verify(data, np.array([of_two[0], *of_three[:3]]), base)
    drops = [np.mean(data.overall - data.means(np.array(rows))) for rows in (of_two, of_three)]
    assert found.base.slices == len(enough) - sum((r >= 0).sum() == 1 for r in enough)
    assert found.base.mean_drop == pytest.approx(drops[0] / 4 + drops[1] * 3 / 4)


def test_random_combinations_are_unseen_and_equally_likely():
    rng = np.random.default_rng(2)
    schema = schema_of([3, 4, 4])
    codes = table(rng, [3, 4, 4], 2000, unknown=0.05)
    data = Scored(schema, codes, rng.random(2000))
    items = all_slices(schema, 2)
    possible = {
        tuple(r): data.extents.count(r) for r in items[items[:, 1] >= 0].tolist() if data.extents.count(r) >= 10
    }
    unseen = {r for r in possible if r != max(possible, key=possible.__getitem__)}
    drawn = dict.fromkeys(unseen, 0)
    for seed in range(300):
        for row in random_unseen(data, 2, lambda r: tuple(r) in unseen, min_count=10, count=3, seed=seed).tolist():
            drawn[tuple(row)] += 1
    counts = np.array(list(drawn.values()))
    # Some have many times the instances of others, and are drawn as often.
    assert max(possible.values()) > 7 * min(possible.values())
    expected = counts.sum() / len(counts)
    assert ((counts - expected) ** 2 / expected).sum() < len(counts) + 4 * np.sqrt(2 * len(counts))
    again = [random_unseen(data, 2, lambda r: True, min_count=10, count=5, seed=7).tolist() for _ in range(2)]
    assert again[0] == again[1]


def test_more_pairs_than_attributes_and_nothing_unseen_give_no_combination():
    data = Scored(schema_of([2, 2]), np.zeros((30, 2), np.uint16), np.ones(30))
    assert random_unseen(data, 3, lambda r: True, min_count=1, count=5, seed=0).shape == (0, 3)
    assert random_unseen(data, 2, lambda r: False, min_count=1, count=5, seed=0).shape == (0, 2)


def test_the_interval_of_the_mean_drop_holds_the_truth():
    """Overlapping slices of small size, drawn anew 200 times; the truth is known."""
    schema = schema_of([3, 3, 4])
    every = all_slices(schema, 2)
    items = every[(every[:, 1] >= 0) & (every[:, 0] < 3)]

    def draw(rng, n):
        codes = table(rng, [3, 3, 4], n)
        chance = 0.95 - 0.25 * (codes[:, 0] == 1) - 0.2 * (codes[:, 1] == 2)
        return codes, (rng.random(n) < chance).astype(float)

    big = Scored(schema, *draw(np.random.default_rng(0), 400_000))
    truth = dict(zip(map(tuple, items.tolist()), big.means(items), strict=True))
    hits = []
    for seed in range(1, 201):
        data = Scored(schema, *draw(np.random.default_rng(seed), 300))
        base = Baseline(data, lambda r: True, margin=0.2, min_count=10, seed=0, count=1)
        found = verify(data, items, base)
        used = [tuple(r) for r, n in zip(items.tolist(), found.slices.scored, strict=True) if n >= 10]
        true_drop = big.overall - np.mean([truth[r] for r in used])
        hits.append(found.found.low <= true_drop <= found.found.high)
    assert np.mean(hits) >= 0.95 - 3 * np.sqrt(0.05 * 0.95 / 200)


def test_slices_that_all_failed_are_no_certainty():
    codes = np.array([[0, 0]] * 10 + [[1, 1]] * 90, np.uint16)
    data = Scored(schema_of([2, 2]), codes, np.array([0.0] * 10 + [1.0] * 90))
    found = verify(
        data, np.array([[0, 2]], np.int32), Baseline(data, lambda r: False, margin=0.2, min_count=10, seed=0)
    )
    assert found.found.mean_drop == pytest.approx(0.9)
    assert found.found.low < 0.8
    assert found.found.high == pytest.approx(0.9)  # a mean cannot lie below 0


@pytest.mark.parametrize("items", [[], [[0, -1], [2, 4]]])
def test_nothing_to_verify_is_told_as_nothing(items):
    data = Scored(schema_of([2, 2]), np.zeros((5, 2), np.uint16), np.ones(5))
    wanted = np.array([r for r in items if 4 not in r], np.int32).reshape(-1, 2)
    found = verify(data, wanted, Baseline(data, lambda r: True, margin=0.2, min_count=6, seed=0))
    assert found.found.slices == found.base.slices == 0
    assert np.isnan(found.found.mean_drop)


def test_bad_input_is_named():
    schema = schema_of([2, 2])
    with pytest.raises(InvalidInput, match="do not fit"):
        Scored(schema, np.zeros((5, 3), np.uint16), np.ones(5))
    with pytest.raises(Precondition, match="no instance is scored"):
        Scored(schema, np.zeros((5, 2), np.uint16), np.full(5, np.nan))
    data = Scored(schema, np.zeros((5, 2), np.uint16), np.ones(5))
    with pytest.raises(InvalidInput, match="margin"):
        Baseline(data, lambda r: True, margin=1.5, min_count=1, seed=0)
    with pytest.raises(InvalidInput, match="min_count"):
        Baseline(data, lambda r: True, margin=0.5, min_count=0, seed=0)
    base = Baseline(data, lambda r: True, margin=0.5, min_count=1, seed=0)
    with pytest.raises(InvalidInput, match=r"items\[0\]"):
        verify(data, np.array([[0, 7]], np.int32), base)
