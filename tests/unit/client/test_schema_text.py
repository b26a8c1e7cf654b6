"""Schemas as files: what is exported comes back as the very same schema, whatever a person writes between."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hibug2 import UserError, messages, schema_text
from shared.rpc.schemas import schema_of, schema_proto
from shared.schema import Schema
from tests.unit.shared.schemas import schemas

# Everything that proto3 takes as text, and what YAML would read as something else.
_TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=30) | st.sampled_from(
    [
        "yes",
        "no",
        "null",
        "~",
        "1",
        "1.50",
        "0x1F",
        "2026-01-01",
        "12:30",
        "=",
        "<<",
        "- a",
        "# a",
        "a: b",
        "#! a",
        "é\u2028",
    ]
)


def document(schema: Schema):
    return messages.schema_to_json(schema_proto(schema, "bears"))


def stored(exported) -> Schema:
    """The schema that the platform makes of what was read."""
    return schema_of(messages.schema_from_json(exported))


@given(schemas())
def test_yaml_and_json_come_back_as_the_same_schema(schema):
    text = schema_text.to_yaml(document(schema))
    assert stored(schema_text.from_yaml(text, "file")).schema_id == schema.schema_id
    assert stored(schema_text.from_yaml(text, "file")) == schema
    assert stored(json.loads(json.dumps(document(schema)))) == schema


@given(st.lists(_TEXTS, min_size=1, max_size=6), _TEXTS, st.lists(st.floats(allow_nan=False, allow_infinity=False)))
def test_every_text_and_number_survives(tags, text, edges):
    attribute = {"name": text, "category": "global", "tags": tags, "tagger": "measured", "sources": tags[:1]}
    attribute |= {"measure": {"name": text, "edges": edges}} | ({"description": text} if text else {})
    schema = {"task": "pose", "main_objects": tags, "attributes": [attribute, attribute]}
    read = schema_text.from_yaml(schema_text.to_yaml(schema), "file")
    assert messages.schema_to_json(messages.schema_from_json(read)) == schema


@given(schemas(), st.data())
def test_comments_and_blank_lines_change_nothing(schema, data):
    lines = schema_text.to_yaml(document(schema)).splitlines(keepends=True)
    # Between the keys of an attribute and of the schema; not within a text that goes over several lines.
    places = [i for i, line in enumerate(lines) if line.startswith(("task:", "attributes:", "  - name:"))]
    for i in sorted(data.draw(st.lists(st.sampled_from(places), unique=True)), reverse=True):
        lines.insert(i, data.draw(st.sampled_from(["# mine\n", "\n", "    # - name: old\n", "#! a\n"])))
    assert stored(schema_text.from_yaml("".join(lines), "file")) == schema


def test_the_form_is_one_that_people_edit():
    text = schema_text.to_yaml(
        {
            "task": "classification",
            "main_objects": ["cat"],
            "attributes": [
                {
                    "name": "is wet",
                    "category": "main_object",
                    "tags": ["yes", "no"],
                    "tagger": "vlm",
                    "description": "Yes: wet fur.",
                    "sources": ["user"],
                    "locked": True,
                }
            ],
        }
    )
    assert text == (
        "task: classification\n"
        "main_objects: [cat]\n"
        "attributes:\n"
        "  - name: is wet\n"
        "    category: main_object\n"
        "    tags: ['yes', 'no']\n"
        "    tagger: vlm\n"
        "    description: 'Yes: wet fur.'\n"
        "    sources: [user]\n"
        "    locked: true\n"
    )


def test_tags_need_no_quotes():
    read = schema_text.from_yaml("task: pose\nattributes:\n  is wet: [yes, no]\n  count: [0, 1, 2.50]\n", "file")
    assert [list(a.tags) for a in messages.schema_from_json(read).attributes] == [["yes", "no"], ["0", "1", "2.50"]]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("attributes: [", "is not YAML"),
        ("[" * 5000, "is not YAML"),
        ("task: pose\ntask: pose\n", "'task' is there twice"),
        ("attributes:\n  a: [b, c]\n  a: [d, e]\n", "'a' is there twice"),
        ("? [a, b]\n: c\n", "is not YAML"),
        ("a: &x [*x]\n", "is not YAML"),
        ("a: *x\n", "is not YAML"),
    ],
)
def test_what_is_no_yaml_is_refused_by_the_name_of_the_file(text, says):
    with pytest.raises(UserError, match=says) as refused:
        schema_text.from_yaml(text, "mine.yaml")
    assert refused.value.violations[0].field == "mine.yaml"


def test_no_object_is_made_from_a_file():
    read = schema_text.from_yaml("a: !!python/object/apply:os.getcwd []\nb: !!int x\n", "file")
    assert read == {"a": [], "b": "x"}


def test_files_are_told_apart_by_their_name(tmp_path):
    for name, text in (("a.json", '{"task": "pose"}'), ("a.yml", "task: pose"), ("a.txt", "task: pose # mine")):
        (tmp_path / name).write_text(text)
        assert schema_text.read_file(tmp_path / name) == {"task": "pose"}
    (tmp_path / "b.json").write_text("task: pose")
    with pytest.raises(UserError, match="is not JSON"):
        schema_text.read_file(tmp_path / "b.json")
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\xfa")
    for name in ("b.yaml", "none.yaml", "."):
        with pytest.raises(UserError, match="cannot be read"):
            schema_text.read_file(tmp_path / name)
