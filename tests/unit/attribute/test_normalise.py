from __future__ import annotations

import re
from collections.abc import Sequence

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.attribute import normalise
from services.attribute.normalise import attributes, candidates, clean_name, clean_tags, overlap_key
from shared.images.measures import MEASURES
from shared.prompting import load_prompt, prompts_root
from shared.schema import (
    MAX_ATTRIBUTES,
    NOT_VISIBLE,
    Attribute,
    Category,
    Measure,
    Schema,
    Tagger,
    Task,
    check_schema,
)

BRIGHTNESS = Attribute(
    "brightness", Category.GLOBAL, ("dark", "bright"), Tagger.MEASURED, measure=Measure("brightness", (0.5,))
)
MAIN_OBJECT = Attribute("main object", Category.MAIN_OBJECT, ("teddy bear",), Tagger.GIVEN)

# Names and tags as models write them, with all that is wrong with them, and any text at all.
_words = (
    "is are has the object Object's teddy bear bears color colour Colours shape of image yes No type "
    "present presence trees "
)
_tags = "yes no Yes true false red Red grey gray multicolor big large unknown Not-visible absent other others any a=b "
wild = st.text(st.characters(), max_size=12)  # surrogates and control characters too
names = st.lists(st.sampled_from(_words.split()) | wild, max_size=6).map(" ".join) | wild
tags = st.lists(st.sampled_from(_tags.split()) | wild, max_size=25)
classes = st.lists(
    st.sampled_from(["teddy bear", "Bear", "T-shirt/top", "trees", "red"]) | wild, min_size=1, max_size=3
)
proposals = st.dictionaries(st.sampled_from(Category), st.lists(st.tuples(names, wild), max_size=12))
taken_lists = st.sampled_from([(), (BRIGHTNESS,), (MAIN_OBJECT, BRIGHTNESS)])


calm = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # busy machines


@calm
@given(proposals, classes, taken_lists, st.integers(1, 20), st.integers(4, 15), st.data())
def test_whatever_is_proposed_the_schema_obeys_the_rules(
    proposed: dict[Category, list[tuple[str, str]]],
    main_objects: list[str],
    taken: Sequence[Attribute],
    limit: int,
    max_tags: int,
    data: st.DataObject,
) -> None:
    chosen, dropped = candidates(proposed, main_objects, taken, limit)
    assert len(chosen) <= limit
    assert len(chosen) + len(dropped) == sum(map(len, proposed.values()))
    assert all(out.reason for out in dropped)
    lists = {candidate.name: data.draw(tags) for candidate in chosen if data.draw(st.integers(0, 5))}
    kept, untagged = attributes(chosen, lists, max_tags)
    assert len(kept) + len(untagged) == len(chosen)
    if kept or taken:
        schema = check_schema(Schema(Task.POSE, tuple(main_objects[:0]), (*taken, *kept)))
        assert re.fullmatch("[0-9a-f]{16}", schema.schema_id)  # so all of it can be stored
    for attribute in kept:
        assert 2 <= len(attribute.tags) <= max_tags
        assert attribute.name == " ".join(attribute.name.split())
        assert attribute.name.startswith("is ") == (set(attribute.tags) - {NOT_VISIBLE} == {"yes", "no"})
        assert NOT_VISIBLE not in attribute.tags[:-1]
        if attribute.category is Category.BACKGROUND and not attribute.name.startswith("is "):
            assert attribute.tags[-1] == NOT_VISIBLE
        assert attribute.tagger is Tagger.VLM
        assert attribute.category in proposed


@calm
@given(names, classes)
def test_a_clean_name_stays_as_it_is(name: str, main_objects: list[str]) -> None:
    once = clean_name(name, [])
    assert clean_name(once, []) == once
    # what takes the place of a class may make another class's name, so only the words are compared here
    assert "  " not in clean_name(name, main_objects)


@calm
@given(st.sampled_from(list(Category)), names.map(lambda name: clean_name(name, [])), tags, st.integers(4, 15))
def test_clean_tags_stay_as_they_are(category: Category, name: str, raw: list[str], max_tags: int) -> None:
    once = clean_tags(name, category, raw, max_tags)
    assert clean_tags(name, category, once, max_tags) == once
    assert len({tag.casefold() for tag in once}) == len(once)


@calm
@given(st.lists(st.sampled_from(["color", "pose", "is", "collar", "of"]), min_size=1, max_size=4))
def test_no_name_of_the_class_is_left(words: list[str]) -> None:
    for plural in ("teddy bear", "Teddy Bears", "the teddy bear's"):
        said = f"{plural} {' '.join(words)}"
        assert "teddy" not in clean_name(said, ["bear", "teddy bear"])
        assert "object" in clean_name(said, ["bear", "teddy bear"])


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("Teddy Bear Color", "object color"),
        ("color of the teddy bear", "color of object"),
        ("Main object's pose", "main object's pose".replace("main object's", "object")),
        ("is_tree_present", "is tree present"),
        ("Are there trees?", "is there trees"),
        ("has collar", "is collar present"),
        ("  sleeve\tlength : ", "sleeve length"),
        ("bearing", "bearing"),
        ("polar-bear fur", "polar-bear fur"),
        ("a|b;c=d", "b c d"),
        ("\ud800lamp\x00", "lamp"),
    ],
)
def test_names(raw: str, clean: str) -> None:
    assert clean_name(raw, ["bear", "teddy bear"]) == clean


def test_the_longest_class_is_replaced() -> None:
    assert clean_name("t-shirt sleeve", ["shirt", "T-shirt/top"]) == "object sleeve"
    assert clean_name("shirt sleeve", ["shirt", "T-shirt/top"]) == "object sleeve"
    assert clean_name("digit 2 width", ["2", "3"]) == "digit 2 width"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("object color", "colour of the object"),
        ("is tree present", "trees presence"),
        ("background kind", "type of background"),
        ("image blur", "blurriness"),
    ],
)
def test_the_same_in_other_words(one: str, other: str) -> None:
    assert overlap_key(one) == overlap_key(other)


@pytest.mark.parametrize(("one", "other"), [("object color", "object shape"), ("tree color", "is tree present")])
def test_not_the_same(one: str, other: str) -> None:
    assert overlap_key(one) != overlap_key(other)


@pytest.mark.parametrize(
    "name",
    ["brightness", "Image Brightness", "exposure", "overall appearance", "object class", "Main Object", "bear", ""],
)
def test_left_out(name: str) -> None:
    chosen, dropped = candidates({Category.GLOBAL: [(name, "")]}, ["bear"], [BRIGHTNESS], 72)
    assert not chosen
    assert len(dropped) == 1


def test_over_the_limit_the_last_of_each_category_go() -> None:
    proposed = {c: [(f"{c.value[0]}{i} thing", "") for i in range(40)] for c in Category}
    chosen, dropped = candidates(proposed, ["bear"], (), MAX_ATTRIBUTES)
    assert [c.name for c in chosen] == [f"{c.value[0]}{i} thing" for c in Category for i in range(24)]
    assert len(dropped) == 120 - MAX_ATTRIBUTES


@pytest.mark.parametrize(
    ("name", "raw", "clean"),
    [
        ("is lid present", ["open", "closed"], ("yes", "no")),
        ("is lid present", ["No", "Yes", "n/a"], ("yes", "no", NOT_VISIBLE)),
        ("lid", ["true", "false"], ("yes", "no")),
        ("lid", ["yes"], ("yes", "no")),
        ("object size", ["big", "large", "Little", "small"], ("large", "small")),
        ("object color", ["grey", "gray", "red", "multi-colored"], ("grey", "red")),
        ("object color", ["red", "multicolored"], ("red", "multicolored")),
        ("sleeve", ["short-sleeved", "Short sleeved", "long sleeved"], ("short-sleeved", "long sleeved")),
        ("handle", [NOT_VISIBLE, "left", "Unknown", "right", "unclear"], ("left", "right", NOT_VISIBLE)),
        ("number", [str(i) for i in range(1, 9)], ("1", "2", "3", "4", "other")),
        ("number", [NOT_VISIBLE, *"12345678"], ("1", "2", "3", "other", NOT_VISIBLE)),
        ("shape", ["", "  ", "a" * 100, "round"], ("round",)),
    ],
)
def test_tags(name: str, raw: list[str], clean: tuple[str, ...]) -> None:
    assert clean_tags(name, Category.MAIN_OBJECT, raw, 5) == clean


def test_the_background_may_be_out_of_view() -> None:
    assert clean_tags("place", Category.BACKGROUND, ["indoors", "outdoors"], 5)[-1] == NOT_VISIBLE
    assert clean_tags("place", Category.BACKGROUND, ["indoors"], 5) == ("indoors",)


def test_other_words_for_measures_are_of_measures() -> None:
    assert set(normalise._MEASURED_AS) <= set(MEASURES)


def test_the_examples_of_the_prompts_obey_the_conventions() -> None:
    """What the model is shown must be what the code keeps."""
    for example in load_prompt("attribute", "attributes", root=prompts_root()).examples:
        proposed = {c: [(a["name"], a["description"]) for a in example.answer[c.value]] for c in Category}
        chosen, dropped = candidates(proposed, example.inputs["main_objects"], (), 72)
        assert not dropped
        assert [c.name for c in chosen] == [name for listed in proposed.values() for name, _ in listed]
    for example in load_prompt("attribute", "tags", root=prompts_root()).examples:
        for asked, given_ in zip(example.inputs["attributes"], example.answer["attributes"], strict=True):
            assert asked["name"] == given_["name"]
            kept = clean_tags(asked["name"], Category(asked["category"]), given_["tags"], 15)
            assert list(kept) == given_["tags"]
