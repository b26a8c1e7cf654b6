"""Edits of a schema: each does what it says, and leaves all else as it was."""

import bisect
import json

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from hibug2 import UserError, messages
from hibug2.schema_edit import EDITS, check_locks, edited
from shared.rpc.schemas import schema_of, schema_proto
from tests.unit.shared.schemas import schemas, words

FREE = {"name": "color", "category": "background", "tags": ["red", "blue", "not visible"], "tagger": "vlm"}
FREE |= {"description": "What covers most.", "sources": ["direct"]}
POSE = {"name": "object pose", "category": "main_object", "tags": ["sitting", "Red"], "tagger": "vlm"}
POSE |= {"description": "How it lies.", "sources": ["comparison"]}
LIGHT = {"name": "light: level", "category": "global", "tags": ["dark", "mid", "bright", "glaring"]}
LIGHT |= {"tagger": "measured", "measure": {"name": "brightness", "edges": [0.25, 0.5, 0.75]}, "sources": ["catalogue"]}
HUE = {**LIGHT, "name": "hue", "measure": {"name": "dominant_color", "edges": []}}
SHOP = {"name": "shop, a", "category": "global", "tags": ["Rome", "Oslo"], "tagger": "given", "sources": ["user"]}
SCHEMA = {"task": "pose", "main_objects": ["cat"], "attributes": [FREE, POSE, LIGHT, HUE, SHOP]}


def attributes(*edits, of=SCHEMA):
    before = json.dumps(of)
    after = edited(of, edits)
    assert json.dumps(of) == before, "an edit changed what it was given"
    assert {key: after[key] for key in ("task", "main_objects")} == {k: of[k] for k in ("task", "main_objects")}
    return {attribute["name"]: attribute for attribute in after["attributes"]}


@pytest.mark.parametrize(
    ("edit", "changed"),
    [
        (("rename", "color=object color"), {"color": {"name": "object color"}}),
        (("rename", "color=Color"), {"color": {"name": "Color"}}),
        (("rename", "light: level=light"), {"light: level": {"name": "light"}}),
        (("drop", "object pose"), {"object pose": None}),
        (("drop", "shop, a"), {"shop, a": None}),
        (("lock", "color"), {"color": {"locked": True}}),
        (("unlock", "color"), {}),
        (("add-tag", "color: green, pink"), {"color": {"tags": ["red", "blue", "not visible", "green", "pink"]}}),
        (("rename-tag", "color:red=crimson"), {"color": {"tags": ["crimson", "blue", "not visible"]}}),
        (("rename-tag", "light: level:dark=dim"), {"light: level": {"tags": ["dim", "mid", "bright", "glaring"]}}),
        (("merge-tags", "color:blue, red=a color"), {"color": {"tags": ["a color", "not visible"]}}),
        (("merge-tags", "color:red,blue=blue"), {"color": {"tags": ["blue", "not visible"]}}),
        (("drop-tag", "color:blue"), {"color": {"tags": ["red", "not visible"]}}),
        (("drop-tag", "shop, a:Oslo"), {"shop, a": {"tags": ["Rome"]}}),
        (("drop-tag", "hue:mid,dark"), {"hue": {"tags": ["bright", "glaring"]}}),
        (
            ("merge-tags", "light: level:bright,mid=fair"),
            {
                "light: level": {
                    "tags": ["dark", "fair", "glaring"],
                    "measure": {"name": "brightness", "edges": [0.25, 0.75]},
                }
            },
        ),
    ],
)
def test_an_edit_changes_what_it_names_and_nothing_else(edit, changed):
    wanted = [
        {**a, **(changed.get(a["name"]) or {})} for a in SCHEMA["attributes"] if changed.get(a["name"], {}) is not None
    ]
    assert list(attributes(edit).values()) == wanted


def test_new_attributes_are_the_users():
    added = attributes(("add", "object size=big,small"), ("add", 'global : weather="sun, hot",rain'))
    new = {"category": "main_object", "tags": ["big", "small"], "tagger": "vlm", "sources": ["user"]}
    assert added["object size"] == {"name": "object size", **new}
    assert added["weather"] == {"name": "weather", **new, "category": "global", "tags": ["sun, hot", "rain"]}
    assert list(added) == [*attributes(), "object size", "weather"]


def test_merged_attributes_become_one_in_the_place_of_the_first():
    found = attributes(("merge", "object pose, color=look"))
    assert list(found) == ["look", "light: level", "hue", "shop, a"]
    assert found["look"] == {
        "name": "look",
        "category": "main_object",
        "tags": ["sitting", "Red", "blue", "not visible"],
        "tagger": "vlm",
        "description": "How it lies. What covers most.",
        "sources": ["comparison", "direct", "user"],
    }
    assert "color" in attributes(("merge", "color,object pose=color"))


def test_edits_are_done_in_their_order():
    found = attributes(("rename", "color=x"), ("add", "color=a,b"), ("rename", "x=y"), ("lock", "y"), ("drop", "color"))
    assert found["y"] == {**FREE, "name": "y", "locked": True}
    assert "color" not in found


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (("paint", "color"), "'paint' is not one of add, rename"),
        (("drop", "colour"), "did you mean 'color'"),
        (("drop", "x"), "there is color, object pose"),
        (("rename", "color"), "both sides of a ="),
        (("rename", "color="), "both sides of a ="),
        (("rename", "color=Object Pose"), "an attribute 'object pose' already"),
        (("rename", "shop, a=shop"), "is a column of the manifest"),
        (("add", "Color=a,b"), "an attribute 'color' already"),
        (("add", "size"), "both sides of a ="),
        (("add", "size=a,,b"), "a comma with nothing beside it"),
        (("add", "size=a,a"), "'a' is there twice"),
        (("merge", "color=x"), "one thing cannot be merged"),
        (("merge", "color,color=x"), "'color' is there twice"),
        (("merge", "color,hue=x"), "'hue' is measured"),
        (("merge", "color,object pose=hue"), "an attribute 'hue' already"),
        (("add-tag", "color"), "names no attribute"),
        (("add-tag", "colour:green"), "no attribute 'colour'"),
        (("add-tag", "color:red"), "'red' is there twice"),
        (("add-tag", "hue:red"), "are those of the measure"),
        (("rename-tag", "color:reed=green"), "no tag 'reed'; did you mean 'red'"),
        (("rename-tag", "color:red=blue"), "merge-tags makes one of two"),
        (("rename-tag", "hue:dark=dim"), "the measure's own"),
        (("rename-tag", "shop, a:Rome=Roma"), "values of the manifest"),
        (("merge-tags", "color:red,blue=not visible"), "name it among those to merge"),
        (("merge-tags", "light: level:dark,bright=x"), "only neighbours"),
        (("merge-tags", "shop, a:Rome,Oslo=x"), "values of the manifest"),
        (("drop-tag", "light: level:dark"), "merge them with their neighbours"),
        (("drop-tag", "color:green"), "no tag 'green'"),
    ],
)
def test_what_cannot_be_done_says_why(edit, says):
    with pytest.raises(UserError) as refused:
        attributes(edit)
    assert says in str(refused.value)


@pytest.mark.parametrize(
    ("verb", "text"),
    [
        ("rename", "color=x"),
        ("merge", "object pose,color=x"),
        ("drop", "color"),
        ("add-tag", "color:green"),
        ("rename-tag", "color:red=green"),
        ("merge-tags", "color:red,blue=green"),
        ("drop-tag", "color:blue"),
    ],
)
def test_what_is_locked_refuses_edits_until_unlocked(verb, text):
    locked = edited(SCHEMA, [("lock", "color")])
    with pytest.raises(UserError, match="'color' is locked; unlock it first"):
        attributes((verb, text), of=locked)
    assert attributes(("unlock", "color"), (verb, text), of=locked) == attributes((verb, text))


def test_every_edit_is_tried_against_a_lock():
    tried = {
        mark.args[1][i][0] for mark in test_what_is_locked_refuses_edits_until_unlocked.pytestmark for i in range(7)
    }
    assert tried == set(EDITS) - {"add", "lock", "unlock"}


@given(schemas(), words, st.data())
def test_there_and_back_is_the_same_schema(schema, name, data):
    document = messages.schema_to_json(schema_proto(schema, "bears"))
    chosen = data.draw(st.sampled_from(document["attributes"]))
    old = chosen["name"]
    assume(not chosen.get("locked") and name.casefold() not in {n.casefold() for n in schema.names()})
    assert edited(document, [("lock", old), ("unlock", old)]) == document
    if chosen["tagger"] != "given":
        renamed = edited(document, [("rename", f"{old}={name}")])
        assert schema_of(messages.schema_from_json(renamed)).names() == tuple(
            name if n == old else n for n in schema.names()
        )
        assert edited(renamed, [("rename", f"{name}={old}")]) == document


@given(st.lists(st.floats(-10, 10), min_size=2, max_size=6, unique=True).map(sorted), st.data())
def test_merged_ranges_hold_what_their_parts_held(edges, data):
    tags = [f"t{i}" for i in range(len(edges) + 1)]
    first = data.draw(st.integers(0, len(tags) - 2))
    last = data.draw(st.integers(first + 1, len(tags) - 1))
    level = {**LIGHT, "name": "level", "tags": tags, "measure": {"name": "brightness", "edges": edges}}
    merged = edited(
        {**SCHEMA, "attributes": [level]}, [("merge-tags", f"level:{','.join(tags[first : last + 1])}=new")]
    )
    after = merged["attributes"][0]
    for value in (*edges, -11.0, 11.0, data.draw(st.floats(-12, 12))):
        before = bisect.bisect_right(edges, value)
        wanted = "new" if first <= before <= last else tags[before]
        assert after["tags"][bisect.bisect_right(after["measure"]["edges"], value)] == wanted


def test_a_whole_text_may_not_touch_what_is_locked():
    locked = edited(SCHEMA, [("lock", "color")])
    check_locks(locked, locked)
    check_locks(locked, edited(locked, [("drop", "hue"), ("add", "size=a,b")]))
    check_locks(locked, edited(locked, [("unlock", "color")]))
    check_locks(locked, edited(locked, [("unlock", "color"), ("drop-tag", "color:red")]))
    check_locks(SCHEMA, edited(SCHEMA, [("drop", "color")]))
    gone = {**locked, "attributes": [a for a in locked["attributes"] if a["name"] != "color"]}
    other = {**locked, "attributes": [{**FREE, "locked": True, "tags": ["a", "b"]}]}
    for after, says in ((gone, "may not go"), (other, "may not change")):
        with pytest.raises(UserError, match=says):
            check_locks(locked, after)
