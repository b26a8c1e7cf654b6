"""Messages as JSON, and the exported form of a schema, which is the platform's own."""

import json

import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from hibug2 import UserError, messages
from hibug2.v1 import run_pb2, types_pb2
from shared import schema as platform

SCHEMA = {
    "task": "classification",
    "main_objects": ["cat", "dog"],
    "attributes": [
        {
            "name": "brightness",
            "category": "global",
            "tags": ["dark", "bright"],
            "tagger": "measured",
            "description": "How light the image is.",
            "measure": {"name": "brightness", "edges": [0.125]},
            "sources": ["catalogue"],
            "locked": True,
        },
        {
            "name": "is sitting",
            "category": "main_object",
            "tags": ["yes", "no", "not visible"],
            "tagger": "vlm",
            "sources": ["user"],
        },
    ],
}


def test_a_schema_survives_export_and_import_and_is_the_platforms_form():
    exported = messages.schema_to_json(messages.schema_from_json(SCHEMA))
    assert exported == SCHEMA
    assert platform.schema_to_json(platform.schema_from_json(exported)) == SCHEMA


def changed(**fields):
    return {**SCHEMA, "attributes": [{**SCHEMA["attributes"][0], **fields}]}


@pytest.mark.parametrize(
    ("data", "field"),
    [
        ([], "schema"),
        ({**SCHEMA, "task": "sorting"}, "schema.task"),
        ({**SCHEMA, "attributes": "x"}, "schema.attributes"),
        ({**SCHEMA, "attributes": {"x": "red"}}, "schema.attributes[0].tags"),
        ({**SCHEMA, "tags": []}, "schema.tags"),
        ({**SCHEMA, "main_objects": "cat"}, "schema.main_objects"),
        ({**SCHEMA, "attributes": ["x"]}, "schema.attributes[0]"),
        ({**SCHEMA, "attributes": [{"name": "x"}]}, "schema.attributes[0].tags"),
        ({**SCHEMA, "attributes": [{"tags": ["a", "b"]}]}, "schema.attributes[0].name"),
        (changed(lock=True), "schema.attributes[0].lock"),
        (changed(locked="yes"), "schema.attributes[0].locked"),
        (changed(measure={"name": "x", "edge": [1]}), "schema.attributes[0].measure.edge"),
        (changed(category="unspecified"), "schema.attributes[0].category"),
        (changed(tags=[True, "no"]), "schema.attributes[0].tags[0]"),
        (changed(measure={"edges": [1]}), "schema.attributes[0].measure"),
        (changed(measure={"name": "x", "edges": ["a"]}), "schema.attributes[0].measure.edges"),
    ],
)
def test_a_schema_that_cannot_be_read_names_the_field(data, field):
    with pytest.raises(UserError) as caught:
        messages.schema_from_json(data)
    assert caught.value.violations[0].field == field


def test_json_has_numbers_words_and_no_nan():
    run = run_pb2.Run(
        name="runs/abc",
        job=types_pb2.Job(
            state=types_pb2.JOB_STATE_RUNNING,
            done_count=2**40,
            eta=Duration(seconds=1, nanos=500_000_000),
            create_time=Timestamp(seconds=0),
            rate_per_second=float("nan"),
        ),
    )
    run.provenance.parameters.update({"depth": 3})
    run.provenance.prompt_digests["tagging/tag"] = "d1"
    data = messages.as_json(run)
    json.dumps(data, allow_nan=False)
    job = data["job"]
    assert (job["state"], job["done_count"], job["eta"]) == ("running", 2**40, 1.5)
    assert (job["create_time"], job["rate_per_second"], job["problem"]) == ("1970-01-01T00:00:00Z", None, None)
    assert data["provenance"]["parameters"] == {"depth": 3}
    assert data["provenance"]["prompt_digests"] == {"tagging/tag": "d1"}
    assert data["steps"] == []
