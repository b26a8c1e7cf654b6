"""Images are picked with all their objects; the uncertain before the certain; what is far before what is near."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.repair.diversity import k_center, tag_vectors
from services.repair.methods import BY_SLICES, ErrorSlices, Method, Question, Rules, Units, pick
from services.repair.selection import Pool
from services.repair.uncertainty import confidence, margin, negative_entropy, probability_rows, second_label
from shared.errors import InvalidInput, Precondition

COUNTS = np.array([3, 2, 4])
OVERALL = 0.8
NO_RULES = Rules()


@st.composite
def questions(draw, images=True):
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n = draw(st.integers(1, 60))
    codes = np.stack([rng.integers(0, c, n) for c in COUNTS], axis=1).astype(np.uint16)
    names = [f"image {i}" for i in rng.integers(0, max(1, n // 3), n)] if images else [f"image {i}" for i in range(n)]
    first = {name: i for i, name in enumerate(dict.fromkeys(names))}
    units = Units(list(first), np.array([first[name] for name in names]))
    slices = rng.choice([[0, -1], [0, 3], [1, 4], [2, 5], [4, 8], [1, -1], [3, 6]], draw(st.integers(0, 6)), axis=0)
    mean = np.sort(rng.uniform(0, 0.6, len(slices)))
    errors = ErrorSlices(
        items=slices.astype(np.int32),
        mean=mean,
        drop=OVERALL - mean,
        count=rng.integers(10, 100, len(slices)),
        p_value=rng.random(len(slices)),
        family=np.where(rng.random(len(slices)) < 0.3, 1, np.arange(len(slices)) + 1),
    )
    raw = rng.dirichlet(np.ones(3), n)
    return Question(
        pool=Pool([f"o{i}" for i in rng.permutation(n)], codes, COUNTS),
        units=units,
        errors=errors,
        class_column=0,
        second_class=lambda: rng.integers(0, 3, n).astype(np.uint16),
        confidences=pa.nulls(n, pa.float64()),
        probabilities=pa.array(raw.tolist(), pa.list_(pa.float32())),
        vectors=lambda: (tag_vectors(codes, COUNTS), tag_vectors(codes[:2], COUNTS)),
    )


def holders(question, slice_):
    offsets = np.cumsum(COUNTS) - COUNTS
    wanted = {i for i in question.errors.items[slice_].tolist() if i >= 0}
    return [row for row, codes in enumerate((question.pool.codes + offsets).tolist()) if wanted <= set(codes)]


@given(questions(), st.integers(1, 30))
@settings(max_examples=60, deadline=None)
def test_an_images_priority_is_the_mean_over_all_its_objects(question, budget):
    found = pick(question, Method.LOWEST_MEAN, budget, NO_RULES)
    said = np.full(len(question.pool.ids), OVERALL)
    for slice_ in reversed(range(len(question.errors))):
        said[holders(question, slice_)] = question.errors.mean[slice_]
    value = [said[question.units.of == unit].mean() for unit in range(len(question.units.ids))]
    asked = {unit for s in range(len(question.errors)) for unit in question.units.of[holders(question, s)].tolist()}
    best = sorted(asked, key=lambda unit: (value[unit], question.units.ids[unit].encode()))
    got = found.value.tolist()
    assert got == pytest.approx([value[unit] for unit in best[:budget]])
    assert len(set(found.unit.tolist())) == len(found) == min(budget, len(asked))
    for unit, slice_ in zip(found.unit.tolist(), found.slice.tolist(), strict=True):
        assert unit in question.units.of[holders(question, slice_)]
        assert not any(unit in question.units.of[holders(question, s)] for s in range(slice_))


@given(questions(), st.sampled_from(sorted(set(Method) - {Method.SLICES_AND_MARGIN})), st.integers(1, 30))
@settings(max_examples=100, deadline=None)
def test_every_method_keeps_to_budget_and_exclusions_and_repeats_none(question, method, budget):
    rows = np.arange(len(question.pool.ids)) % 3 == 0
    found = pick(question, method, budget, Rules(excluded=rows), seed=1)
    assert len(set(found.unit.tolist())) == len(found) <= budget
    assert not set(found.unit.tolist()) & set(question.units.of[rows].tolist())
    assert (found.slice >= 0).all() == (method in BY_SLICES) or not len(found)
    whole = pick(question, method, len(question.units.ids), Rules(excluded=rows), seed=1)
    assert found.unit.tolist() == whole.unit.tolist()[:budget]


@given(questions(images=False), st.integers(1, 30))
@settings(max_examples=60, deadline=None)
def test_slices_and_margin_asks_one_of_each_family_in_turn_for_the_least_sure(question, budget):
    second = question.second_class()
    question = replace(question, second_class=lambda: second)
    found = pick(question, Method.SLICES_AND_MARGIN, budget, NO_RULES)
    margins = margin(probability_rows(question.probabilities))
    offsets = np.cumsum(COUNTS) - COUNTS
    held = [set(row) | {int(s)} for row, s in zip((question.pool.codes + offsets).tolist(), second, strict=True)]
    leads = [s for s in range(len(question.errors)) if question.errors.family[s] in (0, s + 1)]
    assert set(found.slice.tolist()) <= set(leads)
    taken = set()
    for unit, slice_ in zip(found.unit.tolist(), found.slice.tolist(), strict=True):
        wanted = {i for i in question.errors.items[slice_].tolist() if i >= 0}
        left = [row for row in range(len(held)) if wanted <= held[row] and row not in taken]
        assert margins[unit] == min(margins[row] for row in left)
        taken.add(unit)
    turns = [found.slice.tolist()[: i + 1] for i in range(len(found))]
    for said in turns:  # nobody is asked again before all who have something left were
        assert max((said.count(s) for s in set(said)), default=0) <= 1 + min(
            (said.count(s) for s in leads if any(held_by(question, held, s, taken))), default=len(said)
        )


def held_by(question, held, slice_, taken):
    wanted = {i for i in question.errors.items[slice_].tolist() if i >= 0}
    return [wanted <= tags and row not in taken for row, tags in enumerate(held)]


@pytest.mark.parametrize(
    ("method", "rules", "field"),
    [
        (Method.LOWEST_MEAN, Rules(quota=3), "options.class_quota"),
        (Method.RANDOM, Rules(spread=True), "options.spread"),
        (Method.SLICES_AND_MARGIN, NO_RULES, "method"),
    ],
)
def test_what_is_for_single_instances_is_refused_for_images(method, rules, field):
    question = Question(
        pool=Pool(["a", "b"], np.zeros((2, 3), np.uint16), COUNTS),
        units=Units(["image"], np.array([0, 0])),
        errors=ErrorSlices(np.zeros((1, 1), np.int32), *(np.ones(1) for _ in range(5))),
        class_column=0,
        second_class=lambda: None,
        confidences=pa.nulls(2),
        probabilities=pa.nulls(2),
        vectors=lambda: (np.zeros((2, 1)), np.zeros((0, 1))),
    )
    with pytest.raises(InvalidInput) as caught:
        pick(question, method, 1, rules)
    assert caught.value.violations[0].field == field
    with pytest.raises(Precondition, match="no main object"):
        pick(replace(question, class_column=None), Method.RANDOM, 1, Rules(quota=1))


def lists(rows):
    return pa.array(rows, pa.list_(pa.float32()))


@given(st.lists(st.lists(st.floats(0.01, 1), min_size=4, max_size=4), min_size=1, max_size=20))
def test_the_measures_of_uncertainty_are_those_of_the_textbook(rows):
    p = np.array([np.array(row) / sum(row) for row in rows])
    got = probability_rows(lists([*p.tolist(), None]))
    for i, row in enumerate(p):
        top = sorted(row, reverse=True)
        assert margin(got)[i] == pytest.approx(top[0] - top[1], abs=1e-5)
        assert negative_entropy(got)[i] == pytest.approx(sum(x * np.log(x) for x in row), abs=1e-5)
        assert confidence(pa.nulls(len(got), pa.float64()), lists([*p.tolist(), None]))[i] == pytest.approx(top[0])
    assert np.isnan([margin(got)[-1], negative_entropy(got)[-1]]).all()


def test_a_certain_answer_has_no_entropy():
    assert negative_entropy(np.array([[1.0, 0.0]])).tolist() == [0.0]


def test_the_given_confidence_goes_before_the_largest_probability():
    got = confidence(pa.array([0.9, None, None]), lists([[0.5, 0.5], [0.25, 0.75], None]))
    assert got[:2].tolist() == [0.9, 0.75]
    assert np.isnan(got[2])


@pytest.mark.parametrize("rows", [[[0.5, 0.5], [1.0, 0.0, 0.0]], [[1.0]]])
def test_probabilities_of_other_shapes_are_refused(rows):
    with pytest.raises(InvalidInput, match="of two classes or more"):
        probability_rows(lists(rows))


def test_the_second_class_is_named_by_what_is_predicted_where_its_column_is_largest():
    p = np.array([[0.7, 0.2, 0.1], [0.3, 0.6, 0.1], [0.2, 0.1, 0.7], [0.4, 0.5, 0.1], [np.nan] * 3])
    assert second_label(["a", "b", "c", "b", None], p) == ["b", "a", "a", "a", None]
    assert second_label(["a", "b", "c", "x", None], p) == [None, "a", "a", "a", None]


@given(st.integers(0, 2**32 - 1), st.integers(1, 30), st.integers(0, 6))
@settings(max_examples=50, deadline=None)
def test_each_center_is_the_farthest_row(seed, budget, n_known):
    rng = np.random.default_rng(seed)
    vectors, known = rng.normal(size=(25, 3)).astype(np.float32), rng.normal(size=(n_known, 3)).astype(np.float32)
    order = rng.permutation(25)
    picks = k_center(vectors, known, budget, order, lambda row: row % 4 > 0).tolist()
    may = [row for row in range(25) if row % 4 > 0]
    assert len(picks) == len(set(picks)) == min(budget, len(may))
    centers = list(known)
    for row in picks:
        assert row in may
        if centers:
            distance = {r: min(float(((vectors[r] - c) ** 2).sum()) for c in centers) for r in may}
            assert distance[row] >= max(distance.values()) - 1e-4
        centers.append(vectors[row])


def test_instances_lie_apart_by_the_attributes_in_which_they_differ():
    codes = np.array([[0, 1, 3], [0, 0, 2], [0, 65535, 3]], np.uint16)
    a, b, c = tag_vectors(codes, COUNTS)
    assert ((a - b) ** 2).sum() == 4
    assert ((a - c) ** 2).sum() == 1
