from __future__ import annotations

import json

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from services.tagging.vlm import MAX_ENUM_VALUES, answer_schema, batches, read_answer
from shared.schema import UNKNOWN, Attribute, Category, Tagger

names = st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), min_size=1, max_size=8)
tag_sets = st.lists(names, min_size=2, max_size=6, unique_by=str.casefold).map(tuple)
attribute_lists = st.lists(
    st.builds(Attribute, names, st.sampled_from(Category), tag_sets, st.just(Tagger.VLM)),
    max_size=5,
    unique_by=lambda attribute: attribute.name.casefold(),
)
junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=6,
)


calm = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # busy machines


@calm
@given(attribute_lists, st.data())
def test_a_right_answer_is_read_whole(attributes: list[Attribute], data: st.DataObject) -> None:
    codes = [data.draw(st.integers(0, len(a.tags) - 1)) for a in attributes]
    answer = {a.name: a.tags[code] for a, code in zip(attributes, codes, strict=True)}
    assert Draft202012Validator(answer_schema(attributes)).is_valid(answer)
    read, problems = read_answer(json.loads(json.dumps(answer)), attributes)
    assert read.tolist() == codes
    assert problems == []


@calm
@given(attribute_lists, st.data())
def test_each_attribute_stands_for_itself(attributes: list[Attribute], data: st.DataObject) -> None:
    """Whatever the answer holds elsewhere, an attribute has a code if and only if its own tag is in its set."""
    answer = {
        a.name: data.draw(st.sampled_from(a.tags) | junk, label=a.name) for a in attributes if data.draw(st.booleans())
    } | data.draw(st.dictionaries(st.integers().map(lambda i: f"more {i}"), junk, max_size=2))
    read, problems = read_answer(answer, attributes)
    assert read.dtype == np.uint16
    for code, attribute in zip(read, attributes, strict=True):
        tag = answer.get(attribute.name)
        fits = isinstance(tag, str) and tag.strip().casefold() in [t.casefold() for t in attribute.tags]
        assert (code != UNKNOWN) == fits
        if fits:
            assert attribute.tags[code].casefold() == tag.strip().casefold()
    assert len(problems) == (read == UNKNOWN).sum()


@calm
@given(attribute_lists, junk.filter(lambda value: not isinstance(value, dict)))
def test_what_is_no_object_answers_nothing(attributes: list[Attribute], value: object) -> None:
    read, problems = read_answer(value, attributes)
    assert (read == UNKNOWN).all()
    assert problems


def test_letter_case_and_blanks_do_not_count_but_two_answers_do() -> None:
    attribute = Attribute("is lid present", Category.MAIN_OBJECT, ("yes", "no"), Tagger.VLM)
    assert read_answer({"Is lid present ": " NO"}, [attribute])[0].tolist() == [1]
    assert read_answer({"is lid present": "no", "Is Lid Present": "yes"}, [attribute])[0].tolist() == [UNKNOWN]


@given(st.lists(st.integers(1, MAX_ENUM_VALUES), max_size=12))
def test_attributes_are_cut_only_where_their_tags_would_be_too_many(sizes: list[int]) -> None:
    given_ = [Attribute(str(i), Category.GLOBAL, ("t",) * size, Tagger.VLM) for i, size in enumerate(sizes)]
    cut = batches(given_)
    assert [attribute for batch in cut for attribute in batch] == given_
    totals = [sum(len(attribute.tags) for attribute in batch) for batch in cut]
    assert all(total <= MAX_ENUM_VALUES for total in totals)
    for total, after in zip(totals, cut[1:], strict=False):
        assert total + len(after[0].tags) > MAX_ENUM_VALUES
