from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.tagging.quality import agreement, asked_attributes, judge, references, sample_rows
from shared.schema import NOT_VISIBLE, UNKNOWN, Attribute, Category, Measure, Schema, Tagger, Task

codes = st.lists(st.sampled_from([0, 1, 2, UNKNOWN]), min_size=1, max_size=30)
pairs = codes.flatmap(
    lambda first: st.tuples(
        st.just(first), st.lists(st.sampled_from([0, 1, 2, UNKNOWN]), min_size=len(first), max_size=len(first))
    )
)


def array(values) -> np.ndarray:
    return np.array(values, dtype=np.uint16)


def cohen(first, second):
    """Kappa by its definition, one pair at a time."""
    both = [(a, b) for a, b in zip(first, second, strict=True) if UNKNOWN not in (a, b)]
    if not both:
        return 0, None, None
    n = len(both)
    observed = sum(a == b for a, b in both) / n
    chance = sum(
        sum(a == tag for a, _ in both) / n * sum(b == tag for _, b in both) / n for tag in {t for p in both for t in p}
    )
    return n, observed, None if math.isclose(chance, 1) else (observed - chance) / (1 - chance)


@given(pairs)
def test_agreement_is_cohens_where_both_know(pair):
    first, second = map(array, pair)
    found = agreement(first, second)
    compared, share, kappa = cohen(*pair)
    assert found.compared == compared
    assert found.share == (share if share is None else pytest.approx(share))
    assert found.kappa == (kappa if kappa is None else pytest.approx(kappa))
    assert agreement(second, first) == found
    assert agreement(first, first).share in (None, 1.0)


def test_what_agrees_by_chance_alone_has_no_kappa_to_speak_of():
    rng = np.random.default_rng(0)
    first, second = (array(rng.random(5000) < 0.05) for _ in range(2))
    found = agreement(first, second)
    assert found.share > 0.88
    assert abs(found.kappa) < 0.06


@given(st.lists(st.booleans(), max_size=40), st.integers(1, 50), st.integers(0, 2**32))
def test_a_sample_is_of_the_eligible_once_each_and_the_same_for_a_seed(eligible, count, seed):
    mask = np.array(eligible, dtype=np.bool_)
    rows = sample_rows(mask, count, seed)
    assert len(rows) == min(count, mask.sum())
    assert rows.tolist() == sorted(set(rows.tolist()))
    assert mask[rows].all()
    assert rows.tolist() == sample_rows(mask, count, seed).tolist()


def schema(*attributes: Attribute) -> Schema:
    return Schema(Task.CLASSIFICATION, (), attributes)


def attribute(name: str, tagger: Tagger, tags=("dark", "bright"), measure: str = "") -> Attribute:
    return Attribute(name, Category.GLOBAL, tags, tagger, measure=Measure(measure, (0.5,)) if measure else None)


def test_only_what_a_model_said_is_asked_again():
    one = schema(*(attribute(t.value, t, measure="m" if t is Tagger.MEASURED else "") for t in Tagger))
    asked = asked_attributes(one, llm=True)
    assert [one.attributes[j].tagger for j in asked] == [Tagger.VLM, Tagger.CLIP]
    assert asked_attributes(one, llm=False) == ()


def test_the_same_thing_is_known_by_its_name_its_measure_or_its_column_and_told_in_the_attributes_words():
    one = schema(
        attribute("image brightness", Tagger.VLM, ("bright", "Dark", "medium")),
        attribute("light", Tagger.MEASURED, ("dark", "bright"), measure="brightness"),
        attribute("brightness of the photo", Tagger.GIVEN, ("bright", "dark", "glaring")),
        attribute("pose", Tagger.CLIP, ("sits", "runs")),
        attribute("sharpness", Tagger.MEASURED, measure="sharpness"),
    )
    table = np.array([[0, 1, 0, 0, 0], [1, 0, 1, 1, 0], [2, 0, 2, 0, 1], [0, UNKNOWN, UNKNOWN, 1, 1]], np.uint16)
    columns = {
        "Brightness": ["bright", "dark ", None, "medium"],
        "POSE": ["sits", "runs", "flies", None],
        "x": ["a"] * 4,
    }
    found = references(one, table, columns)
    told = {j: {r.name: (r.tagger, r.known.tolist()) for r in refs} for j, refs in found.items()}
    assert told == {
        0: {
            "light": (Tagger.MEASURED, [0, 1, 1, UNKNOWN]),
            "brightness of the photo": (Tagger.GIVEN, [0, 1, UNKNOWN, UNKNOWN]),
            "Brightness": (Tagger.GIVEN, [0, 1, UNKNOWN, 2]),
        },
        3: {"POSE": (Tagger.GIVEN, [0, 1, UNKNOWN, UNKNOWN])},
    }


def test_what_shares_no_two_tags_is_no_reference():
    one = schema(attribute("pose", Tagger.VLM, ("sits", "runs")))
    assert references(one, array([[0], [1]]), {"pose": ["sits", "swims"]}) == {}


def test_doubt_falls_on_what_does_not_come_again_on_what_is_known_better_and_on_what_is_not_told():
    rng = np.random.default_rng(1)
    names = ("steady", "shaky", "wrong", "mute", "one", "plain")
    one = schema(*(attribute(name, Tagger.VLM, ("a", "b", NOT_VISIBLE)) for name in names))
    table = array(rng.integers(0, 2, (400, len(names))))
    table[:, 4] = 0
    table[:100, 0] = 2
    table[:300, 3] = UNKNOWN
    sample = np.arange(0, 400, 4)
    again = {j: table[sample, j].copy() for j in range(5)}
    again[1] = array(rng.integers(0, 2, len(sample)))
    again[0][:3] = 1 - np.minimum(again[0][:3], 1)
    columns = {"wrong": [("b", "a")[code] for code in table[:, 2]]}
    found = judge(one, table, sample, again, references(one, table, columns), 0.6)
    by_name = {q.attribute: q for q in found}
    assert [q.attribute for q in found] == list(names)
    assert {q.attribute for q in found if q.doubt} == {"shaky", "wrong", "mute"}
    assert by_name["steady"].not_visible_share == 0.25
    assert by_name["mute"].unknown_share == 0.75
    assert "25 were told" in by_name["mute"].doubt
    assert "'wrong', which is given" in by_name["wrong"].doubt
    assert by_name["one"].retagged.kappa is None
    assert by_name["one"].retagged.share == 1.0
    assert by_name["plain"].retagged is None


def test_few_instances_that_are_known_better_are_no_evidence():
    one = schema(attribute("pose", Tagger.VLM, ("a", "b")))
    table = array([[0], [1]] * 20)
    columns = {"pose": ["b", "a"] * 4 + [None] * 32}
    (found,) = judge(one, table, np.arange(0), {}, references(one, table, columns), 0.6)
    assert found.doubt == ""
    assert found.references[0][2].compared == 8
    assert found.references[0][2].kappa == pytest.approx(-1)
