"""What `make test-llm` asks a local model, asked of the scripted one: every end of a question is counted."""

from __future__ import annotations

import asyncio

from jsonschema import Draft202012Validator

from tests.llm.ask_local import Outcome, ask_all, rows
from tests.llm.local_model import without_formats
from tests.llm.questions import bounded, questions
from tests.scripted_llm import Fault, ScriptedLLM

ASKED = list(questions())


def test_the_forms_are_schemas_and_no_image_is_sent() -> None:
    assert {question.kind for question in ASKED} == {"direct query", "tag lists", "self-check", "tagging"}
    for question in ASKED:
        Draft202012Validator.check_schema(question.form)
        Draft202012Validator.check_schema(bounded(question.form))
        assert all(isinstance(message["content"], str) for message in question.messages)


def test_a_bounded_form_ends_every_list_and_text() -> None:
    form = {"type": "array", "items": {"anyOf": [{"type": "string"}, {"type": "string", "enum": ["a"]}]}}
    assert bounded(form) == {
        "type": "array",
        "maxItems": 8,
        "items": {"anyOf": [{"type": "string", "maxLength": 80}, {"type": "string", "enum": ["a"]}]},
    }


def test_a_decent_model_is_valid_at_first() -> None:
    with ScriptedLLM() as server, without_formats(server.base_url) as plain:
        for base_url in (server.base_url, plain):
            outcomes = asyncio.run(ask_all(base_url, "scripted", ASKED))
            assert [(o.kind, o.calls, o.failure) for o in outcomes] == [(q.kind, 1, "") for q in ASKED]


def test_faults_are_counted_as_what_they_are() -> None:
    asked = [question for question in ASKED if question.kind == "tagging"][:4]
    with ScriptedLLM() as server:
        server.fail(Fault.EMPTY, Fault.EMPTY, Fault.EMPTY)
        server.skip(1)
        server.fail(Fault.TRUNCATED, Fault.REFUSAL)
        outcomes = asyncio.run(ask_all(server.base_url, "scripted", asked))
    assert [(o.calls, o.failure) for o in outcomes] == [(2, "wrong twice"), (2, ""), (1, "cut off"), (1, "refused")]


def test_the_table_counts_each_outcome_once() -> None:
    ends = [("tagging", 1, ""), ("tagging", 2, ""), ("tagging", 2, "wrong twice"), ("tag lists", 1, "cut off")]
    table = rows("strict", [Outcome(*end, seconds=2.0, output_tokens=5) for end in ends])
    assert table == [
        ["tagging, strict", 3, 1, 1, 1, 1, 0, 0, "2.00", "6.00"],
        ["tag lists, strict", 1, 0, 0, 1, 0, 1, 0, "2.00", "2.00"],
        ["all, strict", 4, 1, 1, 2, 1, 1, 0, "2.00", "8.00"],
    ]
