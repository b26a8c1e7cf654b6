"""Images are picked with all their objects; the uncertain before the certain; what is far before what is near."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.repair.diversity import k_center, tag_vectors
from services.repair.methods import BY_SLICES, ErrorSlices, Method, Question, Rules, Stopped, Units, pick
from services.repair.selection import Pool, select
from services.repair.uncertainty import confidence, margin, negative_entropy, probability_rows
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


@given(st.data(), st.sampled_from(sorted(Method)), st.integers(1, 30), st.booleans(), st.randoms(use_true_random=False))
@settings(max_examples=150, deadline=None)
def test_the_order_of_the_pool_does_not_matter_to_any_method(data, method, budget, turns, random):
    single = turns or method is Method.SLICES_AND_MARGIN
    question = data.draw(questions(images=not single))
    rules = Rules(spread=turns and method in BY_SLICES and method is not Method.SLICES_AND_MARGIN)
    new = list(range(len(question.pool.ids)))
    random.shuffle(new)
    names = [question.units.ids[question.units.of[row]] for row in new]
    units = {name: i for i, name in enumerate(dict.fromkeys(names))}
    vectors, known = question.vectors()
    shuffled = replace(
        question,
        pool=Pool([question.pool.ids[row] for row in new], question.pool.codes[new], COUNTS),
        units=Units(list(units), np.array([units[name] for name in names])),
        probabilities=question.probabilities.take(pa.array(new)),
        vectors=lambda: (vectors[new], known),
    )
    first, second = (pick(asked, method, budget, rules, seed=3) for asked in (question, shuffled))
    ids, others = ([asked.units.ids[u] for u in found.unit] for asked, found in ((question, first), (shuffled, second)))
    assert ids == others
    assert len(set(ids)) == len(ids) <= budget
    assert first.slice.tolist() == second.slice.tolist()


@given(questions(images=False), st.integers(1, 30), st.booleans())
@settings(max_examples=80, deadline=None)
def test_slices_and_margin_is_the_margin_outside_the_slices_and_their_turn_inside(question, budget, some_left_out):
    left_out = np.arange(len(question.pool.ids)) % 4 == 0 if some_left_out else np.zeros(len(question.pool.ids), bool)
    rules = Rules(excluded=left_out)
    found = pick(question, Method.SLICES_AND_MARGIN, budget, rules)
    if not len(question.errors):
        assert not len(found)
        return
    inside = {row for s in range(len(question.errors)) for row in holders(question, s)}
    every = pick(question, Method.MARGIN, len(question.pool.ids), NO_RULES).unit.tolist()
    leads = np.flatnonzero(question.errors.leads)
    turns = select(
        question.pool,
        question.errors.items[leads],
        len(question.pool.ids),
        first=question.margins,
        spread=True,
        accept=lambda row: not left_out[row],
    )
    shared = list(zip(turns.index.tolist(), leads[turns.slice].tolist(), strict=True))
    expected, taken = [], set()
    for row in every:
        if row in inside and shared:
            expected.append(shared.pop(0))
        elif row not in taken and not left_out[row]:
            expected.append((row, -1))
        taken.add(expected[-1][0] if expected else -1)
    assert list(zip(found.unit.tolist(), found.slice.tolist(), strict=True)) == expected[:budget]
    assert found.value.tolist() == question.margins[found.unit].tolist()


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


@pytest.mark.parametrize("rules", [NO_RULES, Rules(quota=1)])
def test_a_long_method_stops_when_it_is_told_to(rules):
    question = Question(
        pool=Pool([str(i) for i in range(5)], np.zeros((5, 3), np.uint16), COUNTS),
        units=Units([str(i) for i in range(5)], np.arange(5)),
        errors=ErrorSlices(np.zeros((1, 1), np.int32), *(np.ones(1) for _ in range(5))),
        class_column=0,
        confidences=pa.nulls(5),
        probabilities=pa.nulls(5),
        vectors=lambda: (np.zeros((5, 1), np.float32), np.zeros((0, 1), np.float32)),
    )
    answers = iter([False, False, True])
    with pytest.raises(Stopped):
        pick(question, Method.K_CENTER, 5, replace(rules, cancelled=lambda: next(answers)))
    assert next(answers, None) is None
