"""The quick ways to write a request as JSON say what the plain one says."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from shared.llm import Form
from shared.llm.encoding import encoded, ordered, size_of
from shared.prompting import DataURL

TEXT = st.text(st.characters(codec="utf-8"))
URLS = st.binary(max_size=20).map(lambda data: DataURL("data:image/jpeg;base64," + data.hex()))
PARTS = st.one_of(
    st.fixed_dictionaries({"type": st.just("text"), "text": TEXT}),
    st.fixed_dictionaries(
        {
            "type": st.just("image_url"),
            "image_url": st.fixed_dictionaries({"url": st.one_of(URLS, TEXT), "detail": st.just("auto")}),
        }
    ),
)
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "system"]), "content": TEXT | st.lists(PARTS, max_size=3)}),
    max_size=3,
)
SCHEMAS = st.dictionaries(TEXT, st.one_of(TEXT, st.lists(TEXT, max_size=2)), max_size=3)


@given(MESSAGES, SCHEMAS, st.booleans())
def test_a_request_is_what_plain_json_makes_of_it(messages, schema, fixed):
    wanted = {"name": "tags", "schema": Form(schema) if fixed else schema, "strict": True}
    body = {
        "model": "m",
        "messages": messages,
        "response_format": {"type": "json_schema", "json_schema": wanted},
        "temperature": 0.5,
    }
    assert json.loads(encoded(body)) == body
    assert size_of(body["response_format"]) == len(json.dumps(body["response_format"], ensure_ascii=False).encode())


@given(MESSAGES, SCHEMAS, st.booleans())
def test_the_text_of_a_key_is_that_of_plain_json_with_its_keys_in_order(messages, schema, fixed):
    request = {"messages": messages, "schema": schema, "name": "tags", "temperature": None, "max_tokens": 7}
    plain = json.dumps(["team", "url", request], sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    quick = ordered(["team", "url"], {**request, "schema": Form(schema) if fixed else schema})
    assert quick == plain.encode()


def test_what_cannot_be_written_in_utf8_does_not_stop_a_request():
    body = {"model": "m", "messages": [{"role": "user", "content": "cut \ud800 in two"}]}
    assert json.loads(encoded(body))["messages"][0]["content"] == "cut ? in two"
