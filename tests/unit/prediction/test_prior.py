"""The missing-slice prior against the formula of its module, one combination at a time."""

from __future__ import annotations

import dataclasses
from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.prediction import prior
from services.prediction.prior import MissingSlices, missing_slices
from shared.errors import InvalidInput, Precondition, TooLarge
from shared.schema import MAIN_OBJECT, UNKNOWN, Attribute, Category, Schema, Tagger, Task


def schema_of(counts, names=None):
    names = names or [MAIN_OBJECT, *(f"attribute {a}" for a in range(1, len(counts)))]
    attributes = tuple(
        Attribute(name, Category.GLOBAL, tuple(f"tag {t}" for t in range(n)), Tagger.GIVEN)
        for name, n in zip(names, counts, strict=True)
    )
    return Schema(Task.CLASSIFICATION, (), attributes)


@st.composite
def cases(draw):
    counts = draw(st.lists(st.integers(1, 4), min_size=2, max_size=4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n = draw(st.integers(1, 60))
    # Low codes are the frequent ones, so that some combinations are known and some are not.
    codes = np.column_stack([np.minimum(rng.geometric(0.5, n) - 1, c - 1) for c in counts]).astype(np.uint16)
    codes[rng.random(codes.shape) < draw(st.sampled_from([0, 0.1]))] = UNKNOWN
    scores = draw(st.sampled_from([rng.random(n), (rng.random(n) < 0.7).astype(float), np.full(n, 0.5)]))
    if draw(st.booleans()):
        scores[rng.random(n) < 0.3] = np.nan
        scores[0] = 1.0
    return schema_of(counts), codes, scores, draw(st.integers(1, 6)), draw(st.integers(2, len(counts)))


def spread(cells, noise, prior=0.0, weight=0):
    """t of cells (n, squared off)."""
    if not cells or noise == 0:
        return prior
    t = 0.0
    for round_ in range(4):
        g = [(t + noise / n) ** -2 if round_ else 1.0 for n, _ in cells]
        t = max(sum(w * (off - noise / n) for w, (n, off) in zip(g, cells, strict=True)) / sum(g), 0.0)
    return (len(cells) * t + weight * prior) / (len(cells) + weight)


def reference(schema, codes, scores, min_count, depth):
    """{pairs of a candidate: (mean, variance)}; everything else is in dicts too."""
    known_scores = scores[~np.isnan(scores)]
    overall, noise = known_scores.mean(), known_scores.var()
    counts = [len(a.tags) for a in schema.attributes]
    frequent = [[t for t in range(c) if (codes[:, a] == t).sum() >= min_count] for a, c in enumerate(counts)]
    below = {(): (True, overall, noise / len(known_scores))}
    found = {}
    for d in range(1, depth + 1):
        level = {}
        for attributes in combinations(range(len(counts)), d):
            for tags in product(*(frequent[a] for a in attributes)):
                inside = np.all([codes[:, a] == t for a, t in zip(attributes, tags, strict=True)], axis=0)
                own = scores[inside & ~np.isnan(scores)]
                pairs = tuple(zip(attributes, tags, strict=True))
                parents = [below[pairs[:i] + pairs[i + 1 :]] for i in range(d)]
                b, v = np.mean([p[1] for p in parents]), np.mean([p[2] for p in parents])
                level[pairs] = inside.sum(), own, b, v, all(p[0] for p in parents)
        cells = {pairs: (len(own), (own.mean() - b) ** 2) for pairs, (_, own, b, _, _) in level.items() if len(own)}
        pooled = spread(list(cells.values()), noise)
        here = {}
        for pairs, (count, own, b, v, reached) in level.items():
            neighbours = [cell for other, cell in cells.items() if [a for a, _ in other] == [a for a, _ in pairs]]
            t, n = spread(neighbours, noise, pooled, 5), len(own)
            w = n * t / (n * t + noise) if noise else 0.0
            mean = (1 - w) * b + w * (own.mean() if n else 0.0)
            variance = (w**2 * noise / n if n else 0.0) + (1 - w) ** 2 * (t + v)
            here[pairs] = (count >= min_count, mean, variance)
            if d > 1 and count < min_count and reached:
                found[pairs] = mean, variance
        below = here
    return overall, found


def pairs_of(schema, row):
    words = [(a, t) for a, attribute in enumerate(schema.attributes) for t in range(len(attribute.tags))]
    return tuple(words[i] for i in row if i >= 0)


@given(cases())
@settings(max_examples=120, deadline=None)
def test_equals_the_formula(case):
    schema, codes, scores, min_count, depth = case
    found = missing_slices(
        schema, codes, scores, min_count=min_count, max_depth=depth, max_per_class=10_000, max_predictions=10_000
    )
    overall, expected = reference(*case)
    rows = [pairs_of(schema, row) for row in found.items.tolist()]
    assert len(set(rows)) == len(rows)
    assert set(rows) == set(expected)
    for i, row in enumerate(rows):
        mean, variance = expected[row]
        assert found.mean[i] == pytest.approx(mean)
        assert found.score[i] == pytest.approx(overall - mean + np.sqrt(variance), abs=1e-9)
    assert (np.diff(found.score) <= 1e-12).all()


@given(cases())
@settings(max_examples=60, deadline=None)
def test_what_is_predicted_is_unseen_while_every_sub_slice_is_known(case):
    schema, codes, scores, min_count, depth = case
    found = missing_slices(schema, codes, scores, min_count=min_count, max_depth=depth)

    def count(pairs):
        return np.all([codes[:, a] == t for a, t in pairs], axis=0).sum()

    for row in found.items.tolist():
        pairs = pairs_of(schema, row)
        assert 2 <= len(pairs) <= depth
        assert count(pairs) < min_count
        for size in range(1, len(pairs)):
            assert all(count(some) >= min_count for some in combinations(pairs, size))


@given(cases(), st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_no_order_matters_to_the_last_bit(case, random):
    schema, codes, scores, min_count, depth = case
    rows = random.sample(range(len(codes)), len(codes))
    attributes = random.sample(range(len(schema.attributes)), len(schema.attributes))
    tags = [random.sample(range(len(a.tags)), len(a.tags)) for a in schema.attributes]
    turned = Schema(
        schema.task,
        (),
        tuple(
            dataclasses.replace(schema.attributes[a], tags=tuple(schema.attributes[a].tags[t] for t in tags[a]))
            for a in attributes
        ),
    )
    columns = []
    for a in attributes:
        place = np.full(UNKNOWN + 1, UNKNOWN, np.uint16)
        place[tags[a]] = np.arange(len(tags[a]))
        columns.append(place[codes[rows, a]])
    limits = {"min_count": min_count, "max_depth": depth, "max_per_class": 2, "max_predictions": 5}
    one = missing_slices(schema, codes, scores, **limits)
    two = missing_slices(turned, np.column_stack(columns), scores[rows], **limits)

    def words(schema, found: MissingSlices):
        named = [(a.name, t) for a in schema.attributes for t in a.tags]
        return [frozenset(named[i] for i in row if i >= 0) for row in found.items.tolist()]

    assert words(schema, one) == words(turned, two)
    for column in ("score", "mean"):
        np.testing.assert_array_equal(getattr(one, column), getattr(two, column))


def planted(seed=0, n=4000):
    """Nine in ten fail where attribute 1 has tag 1 in class 1; attribute 2 is as good as absent there."""
    rng = np.random.default_rng(seed)
    codes = np.column_stack([rng.integers(0, c, n) for c in (3, 3, 4)]).astype(np.uint16)
    bad = (codes[:, 0] == 1) & (codes[:, 1] == 1)
    codes[bad & (codes[:, 2] == 3), 2] = 0
    good = (codes[:, 0] == 2) & (codes[:, 1] == 2)
    codes[good & (codes[:, 2] == 3), 2] = 0
    return schema_of([3, 3, 4]), codes, np.where(bad, rng.random(n) < 0.1, rng.random(n) < 0.9).astype(float)


def test_the_combination_whose_sub_slices_fail_comes_first():
    schema, codes, scores = planted()
    found = missing_slices(schema, codes, scores, min_count=10, max_depth=3)
    assert [pairs_of(schema, row) for row in found.items.tolist()] == [
        ((0, 1), (1, 1), (2, 3)),
        ((0, 2), (1, 2), (2, 3)),
    ]
    assert found.mean[0] < 0.7 < found.mean[1]


def test_what_was_covered_less_is_told_with_less_certainty():
    schema, codes, scores = planted()
    rare = (codes[:, 0] != 2) | (np.arange(len(codes)) % 10 == 0)
    found = missing_slices(schema, codes[rare], scores[rare], min_count=2, max_depth=3)
    deviation = found.score + found.mean  # and the overall mean, the same for all
    of = {pairs_of(schema, row): sd for row, sd in zip(found.items.tolist(), deviation, strict=True)}
    assert of[(0, 2), (1, 2), (2, 3)] > of[(0, 1), (1, 1), (2, 3)]


def test_the_number_of_pairs_may_be_given_and_the_caps_hold():
    rng = np.random.default_rng(3)
    schema = schema_of([3, 4, 4, 4])
    codes = np.column_stack([np.minimum(rng.geometric(0.5, 300) - 1, c - 1) for c in (3, 4, 4, 4)]).astype(np.uint16)
    scores = rng.random(300)
    every = missing_slices(schema, codes, scores, min_count=8, max_depth=3, max_per_class=1000)
    depth = (every.items >= 0).sum(axis=1)
    assert set(depth.tolist()) == {2, 3}
    for pairs in (2, 3):
        only = missing_slices(schema, codes, scores, min_count=8, max_depth=3, pair_count=pairs, max_per_class=1000)
        np.testing.assert_array_equal(only.items, every.items[depth == pairs][:, : only.items.shape[1]])
    capped = missing_slices(schema, codes, scores, min_count=8, max_depth=3, max_per_class=4)
    classes = [row[0] if row[0] < 3 else -1 for row in capped.items.tolist()]
    assert max(classes.count(c) for c in set(classes)) == 4
    first = missing_slices(schema, codes, scores, min_count=8, max_depth=3, max_per_class=1000, max_predictions=7)
    np.testing.assert_array_equal(first.items, every.items[:7])


def test_holding_few_candidates_at_a_time_changes_nothing(monkeypatch):
    rng = np.random.default_rng(3)
    schema = schema_of([3, 4, 4, 4])
    codes = np.column_stack([np.minimum(rng.geometric(0.5, 300) - 1, c - 1) for c in (3, 4, 4, 4)]).astype(np.uint16)
    scores = rng.random(300)
    one = missing_slices(schema, codes, scores, min_count=8, max_depth=3, max_per_class=3)
    monkeypatch.setattr(prior, "_AT_ONCE", 2)
    two = missing_slices(schema, codes, scores, min_count=8, max_depth=3, max_per_class=3)
    np.testing.assert_array_equal(one.items, two.items)
    np.testing.assert_array_equal(one.score, two.score)


def test_progress_is_told_and_a_cancel_is_heard():
    schema, codes, scores = planted(n=500)
    told = []
    missing_slices(
        schema, codes, scores, min_count=10, max_depth=3, on_progress=lambda done, total: told.append((done, total))
    )
    assert told == [(i, 4) for i in range(1, 5)]
    assert len(missing_slices(schema, codes, scores, min_count=10, max_depth=3, cancelled=lambda: True)) == 0


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"min_count": 0}, InvalidInput, "min_count"),
        ({"max_per_class": 0}, InvalidInput, "max_per_class"),
        ({"max_depth": 1}, InvalidInput, "max_depth"),
        ({"max_depth": 4}, InvalidInput, "max_depth"),
        ({"pair_count": 1}, InvalidInput, "pair_count"),
        ({"pair_count": 4}, InvalidInput, "pair_count"),
        ({"codes": np.zeros((50, 2), np.uint16)}, InvalidInput, "codes"),
        ({"scores": np.zeros(7)}, InvalidInput, "scores"),
        ({"scores": np.full(50, np.nan)}, Precondition, "no instance is scored"),
    ],
)
def test_bad_input_is_named(change, error, text):
    schema, codes, scores = planted(n=50)
    given = {"codes": codes, "scores": scores, "min_count": 5, "max_depth": 3} | change
    with pytest.raises(error, match=text):
        missing_slices(schema, **given)


def test_what_would_take_too_long_is_refused(monkeypatch):
    schema, codes, scores = planted(n=50)
    monkeypatch.setattr(prior, "_MAX_STEPS", 300)
    with pytest.raises(TooLarge, match="lower pair count than 3"):
        missing_slices(schema, codes, scores, min_count=5, max_depth=3)
