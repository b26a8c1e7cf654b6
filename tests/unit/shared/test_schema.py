from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given

from shared.errors import InvalidInput
from shared.rpc.schemas import schema_of, schema_proto
from shared.schema import (
    MAX_ATTRIBUTES,
    Attribute,
    Category,
    Measure,
    Schema,
    Tagger,
    Task,
    check_schema,
    schema_from_json,
    schema_to_json,
)
from tests.unit.shared.schemas import schemas


def attribute(name="color", tags=("red", "blue"), tagger=Tagger.VLM, **more) -> Attribute:
    return Attribute(name, Category.MAIN_OBJECT, tags, tagger, **more)


def schema(*attributes: Attribute) -> Schema:
    return Schema(Task.CLASSIFICATION, ("bear",), attributes)


@given(schemas())
def test_json_says_all_of_a_schema(value):
    text = json.dumps(schema_to_json(value), allow_nan=False)
    assert schema_from_json(json.loads(text)) == value
    assert schema_from_json(json.loads(text)).schema_id == value.schema_id


@given(schemas())
def test_the_message_says_all_of_a_schema(value):
    message = schema_proto(value, "bears")
    assert message.name == f"datasets/bears/schemas/{value.schema_id}"
    assert schema_of(type(message).FromString(message.SerializeToString())) == value


@given(schemas(), schemas())
def test_two_schemas_have_one_id_only_when_they_are_equal(one, other):
    assert (one.schema_id == other.schema_id) == (one == other)


def measured(*edges: float, tags=("low", "high")) -> Attribute:
    return attribute(tags=tags, tagger=Tagger.MEASURED, measure=Measure("brightness", edges))


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        (schema(), "schema.attributes"),
        (schema(*(attribute(f"a{i}") for i in range(MAX_ATTRIBUTES + 1))), "schema.attributes"),
        (schema(attribute(), attribute("Color")), "schema.attributes[1].name"),
        (schema(attribute("")), "schema.attributes[0].name"),
        (schema(attribute("a=b")), "schema.attributes[0].name"),
        (schema(attribute("color\n")), "schema.attributes[0].name"),
        (schema(attribute("instance_id")), "schema.attributes[0].name"),
        (schema(attribute(tags=("red",))), "schema.attributes[0].tags"),
        (schema(attribute(tags=("red", "Red"))), "schema.attributes[0].tags"),
        (schema(attribute(tags=("red", "unknown"))), "schema.attributes[0].tags"),
        (schema(attribute(tags=("red", "blue\n"))), "schema.attributes[0].tags"),
        (schema(attribute(tags=("red", "red"), tagger=Tagger.GIVEN)), "schema.attributes[0].tags"),
        (schema(attribute("is wet", ("yes", "maybe"))), "schema.attributes[0].tags"),
        (schema(attribute(tagger=Tagger.MEASURED)), "schema.attributes[0].measure"),
        (schema(attribute(measure=Measure("brightness", (0.5,)))), "schema.attributes[0].measure"),
        (schema(measured(2.0, 1.0, tags=("a", "b", "c"))), "schema.attributes[0].measure.edges"),
        (schema(measured(1.0, 1.0, tags=("a", "b", "c"))), "schema.attributes[0].measure.edges"),
        (schema(measured(0.1, 0.2)), "schema.attributes[0].measure.edges"),
        (schema(measured(float("nan"))), "schema.attributes[0].measure.edges"),
        (schema(measured(float("inf"))), "schema.attributes[0].measure.edges"),
    ],
)
def test_what_breaks_a_rule_is_refused_by_field(wrong, field):
    for check in (
        check_schema,
        lambda s: schema_from_json(schema_to_json(s)),
        lambda s: schema_of(schema_proto(s, "d")),
    ):
        with pytest.raises(InvalidInput) as refused:
            check(wrong)
        assert field in {violation.field for violation in refused.value.violations}


def test_tags_that_differ_in_case_stay_apart_where_the_user_gave_them():
    kept = schema(attribute(tags=("US", "us"), tagger=Tagger.GIVEN), attribute("is wet", ("no", "yes", "not visible")))
    assert check_schema(kept) is kept


BODY = schema_to_json(schema(attribute(), measured(0.5)))


@pytest.mark.parametrize(
    ("path", "value", "field"),
    [
        (("attributes",), None, "schema.attributes"),
        (("attributes",), "color", "schema.attributes"),
        (("task",), "poetry", "schema.task"),
        (("main_objects",), "bear", "schema.main_objects"),
        (("main_objects",), 3, "schema.main_objects"),
        (("attributes", 0), "color", "schema.attributes[0]"),
        (("attributes", 0, "tags"), "red", "schema.attributes[0]"),
        (("attributes", 0, "tags"), None, "schema.attributes[0]"),
        (("attributes", 0, "category"), "taste", "schema.attributes[0]"),
        (("attributes", 0, "tagger"), "dice", "schema.attributes[0]"),
        (("attributes", 1, "measure", "edges"), ["x"], "schema.attributes[1]"),
        (("attributes", 1, "measure"), 3, "schema.attributes[1]"),
    ],
)
def test_json_of_another_form_is_refused_by_field(path, value, field):
    body = json.loads(json.dumps(BODY))
    inner = body
    for step in path[:-1]:
        inner = inner[step]
    inner[path[-1]] = value
    with pytest.raises(InvalidInput) as refused:
        schema_from_json(body)
    assert [violation.field for violation in refused.value.violations] == [field]


def test_every_fault_is_told_at_once():
    wrong = schema(attribute(""), attribute(tags=("a",)), replace(attribute("wet"), tags=("a", "a")))
    with pytest.raises(InvalidInput) as refused:
        check_schema(wrong)
    assert {v.field.partition("]")[0] for v in refused.value.violations} == {
        "schema.attributes[0",
        "schema.attributes[1",
        "schema.attributes[2",
    }


def test_unspecified_kinds_in_a_message_are_refused():
    message = schema_proto(schema(attribute()), "bears")
    message.attributes[0].ClearField("category")
    message.attributes[0].ClearField("tagger")
    with pytest.raises(InvalidInput) as refused:
        schema_of(message)
    assert [v.field for v in refused.value.violations] == [
        "schema.attributes[0].category",
        "schema.attributes[0].tagger",
    ]
    message = schema_proto(schema(attribute()), "bears")
    message.ClearField("task")
    with pytest.raises(InvalidInput, match=r"schema\.task"):
        schema_of(message)


def test_a_tag_is_found_by_its_position():
    color = attribute()
    assert [color.code(tag) for tag in ("red", "blue", "green")] == [0, 1, 65535]
    assert schema(color).attribute("color") is color
    with pytest.raises(KeyError):
        schema(color).attribute("pose")
