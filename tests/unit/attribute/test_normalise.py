from __future__ import annotations

import re
from collections.abc import Sequence

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.attribute import normalise
from services.attribute.catalogue import catalogue
from services.attribute.normalise import (
    COMPARISON,
    DIFFICULTY,
    DIRECT,
    USER,
    Candidate,
    Gathering,
    attributes,
    checked,
    clean_name,
    clean_tags,
    limited,
    overlap_key,
)
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


def merges(found: Sequence[Candidate]) -> st.SearchStrategy[list[tuple[str, str, str]]]:
    """In circles too, of names that are there and that are not."""
    anything = st.sampled_from([*(c.name for c in found), "brightness", "not there"])
    return st.lists(st.tuples(anything, anything, wild), max_size=8)


def drops(found: Sequence[Candidate]) -> st.SearchStrategy[list[tuple[str, str]]]:
    return st.lists(st.tuples(st.sampled_from([*(c.name for c in found), "not there"]), wild), max_size=4)


calm = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # busy machines


@calm
@given(
    proposals,
    classes,
    taken_lists,
    st.lists(st.sampled_from(sorted(MEASURES)), unique=True),
    proposals,
    st.integers(1, 20),
    st.integers(4, 15),
    st.data(),
)
def test_whatever_is_proposed_the_schema_obeys_the_rules(
    proposed: dict[Category, list[tuple[str, str]]],
    main_objects: list[str],
    taken: Sequence[Attribute],
    measurable: list[str],
    more: dict[Category, list[tuple[str, str]]],
    limit: int,
    max_tags: int,
    data: st.DataObject,
) -> None:
    gathering = Gathering(main_objects, taken, measurable)
    assert gathering.add(proposed, DIRECT) == len(gathering.candidates)
    assert len(gathering.candidates) + len(gathering.dropped) == sum(map(len, proposed.values()))
    again = gathering.add(more, COMPARISON)
    found = gathering.candidates
    assert len(found) == len({overlap_key(c.name) for c in found})
    assert sum(c.sources == (COMPARISON,) for c in found) == again
    left, merged, unfit = checked(found, [a.name for a in taken], data.draw(merges(found)), data.draw(drops(found)))
    assert len(left) + len(merged) + len(unfit) == len(found)
    assert {m.into for m in merged} <= {c.name for c in (*left, *merged, *unfit)}
    chosen, over = limited(left, limit)
    assert len(chosen) <= limit
    assert len(chosen) + len(over) == len(left)
    assert all(out.reason for out in (*gathering.dropped, *merged, *unfit, *over))
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
        assert attribute.category in proposed | more
        assert set(attribute.sources) <= {DIRECT, COMPARISON}


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
    gathering = Gathering(["bear"], [BRIGHTNESS])
    assert not gathering.add({Category.GLOBAL: [(name, "")]}, DIRECT)
    assert len(gathering.dropped) == 1


def test_over_the_limit_the_last_of_each_category_go() -> None:
    found = [Candidate(f"{c.value[0]}{i} thing", c, "") for c in Category for i in range(40)]
    chosen, dropped = limited(found, MAX_ATTRIBUTES)
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


def test_all_that_the_catalogue_measures_is_known_by_its_name() -> None:
    """So that a measure that tells nothing about a dataset is not asked of a model under the catalogue's name."""
    for entry in catalogue():
        assert overlap_key(entry.name) in normalise._keys_of(entry.measure), entry.name
        gathering = Gathering(["bear"], (), [entry.measure])
        assert not gathering.add({Category.GLOBAL: [(entry.name, "")]}, DIRECT)
        assert "measured" in gathering.dropped[0].reason


def test_every_source_that_named_an_attribute_is_kept() -> None:
    gathering = Gathering(["bear"])
    assert gathering.add({Category.MAIN_OBJECT: [("bear color", "its"), ("Color of bear", "")]}, DIRECT) == 1
    assert gathering.add({Category.GLOBAL: [("colour of the object", "")]}, DIFFICULTY) == 0
    assert gathering.add({Category.MAIN_OBJECT: [("object color", ""), ("pose", "")]}, COMPARISON) == 1
    color, pose = gathering.candidates
    assert (color.name, color.category, color.description) == ("object color", Category.MAIN_OBJECT, "its")
    assert color.sources == (DIRECT, DIFFICULTY, COMPARISON)
    assert pose.sources == (COMPARISON,)
    assert len(gathering.dropped) == 1


def test_what_an_answer_would_bring_can_be_tried() -> None:
    gathering = Gathering(["bear"])
    assert gathering.copy().add({Category.GLOBAL: [("weather", ""), ("bear", "")]}, DIRECT) == 1
    assert not gathering.candidates
    assert not gathering.dropped


def candidate(name: str, *sources: str) -> Candidate:
    return Candidate(name, Category.MAIN_OBJECT, "", sources or (DIRECT,))


def test_a_merge_hands_the_sources_on() -> None:
    found = [candidate("pose"), candidate("placement", DIFFICULTY), candidate("stance", COMPARISON), candidate("light")]
    left, merged, dropped = checked(
        found,
        ["brightness"],
        [
            ("stance", "placement", "same"),
            ("placement", "pose", ""),
            ("pose", "stance", "a circle"),
            ("light", "brightness", "x"),
        ],
        [],
    )
    assert [(c.name, c.sources) for c in left] == [("pose", (DIRECT, DIFFICULTY, COMPARISON))]
    assert [(m.name, m.into) for m in merged] == [("stance", "placement"), ("placement", "pose")]
    assert [(out.name, out.reason) for out in dropped] == [("light", "says the same as 'brightness': x")]


def test_what_the_user_named_stays() -> None:
    found = [candidate("Fur", USER), candidate("coat"), candidate("charm", USER), candidate("size", USER)]
    left, merged, dropped = checked(
        found, [], [("Fur", "coat", "same"), ("size", "charm", "same")], [("charm", "vague"), ("size", "vague")]
    )
    assert [c.name for c in left] == ["Fur", "charm", "size"]
    assert left[0].sources == (USER, DIRECT)
    assert [(m.name, m.into) for m in merged] == [("coat", "Fur")]
    assert not dropped
    kept, over = limited([candidate(f"thing {i}") for i in range(5)] + found, 4)
    assert {"Fur", "charm", "size"} < {c.name for c in kept}
    assert len(over) == 5
    gathering = Gathering(["bear"], [BRIGHTNESS])
    gathering.add_own([candidate("Bear Colour", USER), candidate("Exposure", USER)])
    assert gathering.names == ["Bear Colour"]  # the user's name, not ours
    assert gathering.dropped[0].name == "Exposure"
    (kept_own,), _ = attributes(gathering.candidates, {"Bear Colour": ["yes", "no"]}, 15)
    assert kept_own.name == "Bear Colour"


def test_with_too_many_those_that_most_sources_named_stay() -> None:
    found = [candidate("a b"), candidate("c d"), candidate("e f", DIRECT, DIFFICULTY)]
    chosen, dropped = limited(found, 2)
    assert [c.name for c in chosen] == ["a b", "e f"]
    assert [out.name for out in dropped] == ["c d"]


@pytest.mark.parametrize("task", [None, *Task])
def test_the_examples_of_the_prompts_obey_the_conventions(task: Task | None) -> None:
    """What the model is shown must be what the code keeps."""
    root = prompts_root()
    for name in ("attributes", "comparison", "difficulty", "confusion"):
        for example in load_prompt("attribute", name, task and task.value, root=root).examples:
            proposed = {c: [(a["name"], a["description"]) for a in example.answer[c.value]] for c in Category}
            classes = example.inputs.get("main_objects") or [example.inputs["main_object"]]
            known = [Candidate(n, Category.GLOBAL, "", (USER,)) for n in example.inputs["known"]]
            gathering = Gathering(classes)
            gathering.add_own(known)
            gathering.add(proposed, DIRECT)
            assert not gathering.dropped
            assert gathering.names[len(known) :] == [name for listed in proposed.values() for name, _ in listed]
    for example in load_prompt("attribute", "tags", root=root).examples:
        for asked, given_ in zip(example.inputs["attributes"], example.answer["attributes"], strict=True):
            assert asked["name"] == given_["name"]
            kept = clean_tags(asked["name"], Category(asked["category"]), given_["tags"], 15)
            assert list(kept) == given_["tags"]
    for example in load_prompt("attribute", "settle", root=root).examples:
        for asked, given_ in zip(example.inputs["attributes"], example.answer["attributes"], strict=True):
            tags = [group["tag"] for group in given_["tags"]]
            assert list(clean_tags(asked["name"], Category(asked["category"]), tags, 15)) == tags
            covered = [tag for group in given_["tags"] for tag in group["covers"]]
            assert sorted(covered) == sorted(asked["tags"])
            assert all(set(pair) <= set(asked["tags"]) for pair in asked["near"])
    for example in load_prompt("attribute", "look", root=root).examples:
        lists = {a["name"]: a["tags"] for a in example.inputs["attributes"]}
        assert all(item["tag"] not in lists[item["attribute"]] for item in example.answer["missing"])
