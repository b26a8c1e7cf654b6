from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shared.llm.answer import Usage, extract_json, problems_of, shortened

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
values = st.recursive(scalars, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=15)
documents = st.dictionaries(st.text(), values) | st.lists(values)
prose = st.text(st.characters(exclude_characters="{}[]<", exclude_categories=["Cs"]), max_size=40)


calm = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # busy machines


@calm
@given(values)
def test_plain_json_is_read_as_it_is(value: object) -> None:
    assert extract_json(f"\n {json.dumps(value)}\n") == value


@calm
@given(documents, prose, prose)
def test_json_is_found_in_prose_and_fences(value: object, before: str, after: str) -> None:
    text = json.dumps(value)
    assert extract_json(f"Here: {before}\n```json\n{text}\n```\n{after}") == value
    assert extract_json(f"<think>{{}} or {before}</think>\n{text} {after}.") == value


@calm
@given(st.text())
def test_any_text_is_read_or_holds_nothing(text: str) -> None:
    extract_json(text)


@pytest.mark.parametrize("text", ["", "no", '{"a": 1', '{"a": NaN}', "[" * 20_000, '{"a":' * 5_000, "{" * 20_000])
def test_what_is_not_json_is_nothing(text: str) -> None:
    assert extract_json(text) is None


def test_the_whole_is_taken_before_its_parts() -> None:
    assert extract_json('First {"a": 1}, in all {"a": 1, "b": {"c": [2]}}, so {}.') == {"a": 1, "b": {"c": [2]}}


def test_problems_are_few_and_short() -> None:
    schema = {"type": "array", "items": {"enum": ["x"]}}
    problems = problems_of(["y" * 10_000] * 100, schema)
    assert len(problems) == 20
    assert all(len(problem) < 250 for problem in problems)
    assert problems[3].startswith("$[3]: ")
    assert problems_of(["x"], schema) == []


@calm
@given(st.text(max_size=600))
def test_what_is_shortened_keeps_its_ends(text: str) -> None:
    short = shortened(text)
    assert len(short) <= 203
    assert (text[:100], text[-100:]) == (short[:100], short[-100:])


@calm
@given(st.lists(st.builds(Usage, *[st.integers(0, 10**9)] * 3)))
def test_usage_adds_up(parts: list[Usage]) -> None:
    total = sum(parts, Usage())
    assert total.calls == sum(part.calls for part in parts)
    assert total.input_tokens == sum(part.input_tokens for part in parts)
    assert total.output_tokens == sum(part.output_tokens for part in parts)
