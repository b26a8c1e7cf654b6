"""The whole process with a model that answers anything at all that fits the form."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.attribute.normalise import USER, Candidate
from services.attribute.proposal import Limits, propose_schema
from services.attribute.questions import load_questions
from services.attribute.sample import Sample
from services.attribute.tagsets import MAX_NEAR, near_pairs
from shared.images.reader import ImageReader
from shared.llm import Reply, Usage, WrongAnswer
from shared.llm.answer import problems_of
from shared.prompting import prompts_root
from shared.schema import NOT_VISIBLE, Attribute, Category, Measure, Tagger, Task, check_schema
from shared.text import StaticEncoder

QUESTIONS = {task: load_questions(prompts_root(), task.value) for task in Task}
ENCODER = StaticEncoder()
LOCKED = Attribute("Ripeness", Category.MAIN_OBJECT, ("raw", "ripe"), Tagger.VLM, sources=(USER,), locked=True)
BRIGHTNESS = Attribute(
    "brightness", Category.GLOBAL, ("dark", "bright"), Tagger.MEASURED, measure=Measure("brightness", (0.5,))
)
TEXTS = (
    "object color|colour of the pear|is pear cut|pose|brightness|ripeness|yes|no|red|crimson|dark red|blue|small|tiny|"
    "not visible|unknown|other|a=b|table|tables|background|is leaf present|leaf|pear|very long " + "x" * 200
).split("|")
text = st.sampled_from(TEXTS) | st.text(st.characters(), max_size=6)


def answers(form: dict[str, Any], root: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Whatever fits a JSON schema of ours."""
    if "$ref" in form:
        return answers(root["$defs"][form["$ref"].rpartition("/")[2]], root)
    if "enum" in form:
        return st.sampled_from(form["enum"])
    if form["type"] == "array":
        return st.lists(answers(form["items"], root), max_size=6)
    if form["type"] == "object":
        return st.fixed_dictionaries({name: answers(part, root) for name, part in form["properties"].items()})
    assert form["type"] == "string"
    return text


def _cleaned(tag: str) -> str:
    """As a tag is by the time that it is compared: half a surrogate pair, which JSON may hold, is no text."""
    return tag.encode(errors="ignore").decode().strip()


class AnyModel:
    """Answers what is drawn; now and then nothing of use, now and then wrongly twice."""

    settings = SimpleNamespace(model="any", max_concurrency=4)

    def __init__(self, data: st.DataObject) -> None:
        self.data = data
        self.calls = 0

    async def ask(self, messages: Any, schema: Any, check: Any, **_: Any) -> Reply:
        self.calls += 1
        if not self.data.draw(st.integers(0, 9)):
            raise WrongAnswer("nothing of use", usage=Usage(1))
        value = self.data.draw(answers(schema, schema))
        assert not problems_of(value, schema)
        problems = check(value)
        if problems:
            raise WrongAnswer("wrong in parts", usage=Usage(1), value=value, problems=tuple(problems))
        return Reply("", value, Usage(1), "any")


class Pictures(Sample):
    async def shown(self, *indices: int) -> list[bytes] | None:
        return [b"jpeg"] * len(indices)


def sample(n: int) -> Sample:
    nothing = np.full((n, 1), np.nan)
    return Pictures(("pear", "plum") * (n // 2), ("",) * n, (None,) * n, nothing, nothing[:, 0], ImageReader(()))


async def together_with_errors(asked: Any) -> list[Any]:
    return await asyncio.gather(asked, return_exceptions=True)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data(), st.sampled_from(Task), st.integers(3, 12), st.integers(4, 8), st.booleans())
def test_whatever_comes_back_the_schema_obeys_the_rules_or_the_error_is_clear(data, task, limit, max_tags, has_images):
    model = AnyModel(data)
    own = [Candidate("Leaf Kind", Category.BACKGROUND, "", (USER,))]
    asked = propose_schema(
        model,
        QUESTIONS[task],
        task,
        ["pear", "plum"],
        encoder=ENCODER,
        catalogue=[LOCKED, BRIGHTNESS],
        own=own,
        measurable=["brightness", "noise"],
        sample=sample(4) if has_images else None,
        limits=Limits(limit, max_tags, pair_count=2, patience=2, confusion_count=2, image_count=3),
    )
    (proposal,) = asyncio.run(together_with_errors(asked))
    if isinstance(proposal, WrongAnswer):
        assert proposal.usage.calls == model.calls
        assert str(proposal)
        return
    assert not isinstance(proposal, BaseException), proposal
    schema = check_schema(proposal.schema)
    assert proposal.usage.calls == model.calls
    assert schema.attributes[:2] == (LOCKED, BRIGHTNESS)
    assert 3 <= len(schema.attributes) <= limit
    for attribute in schema.attributes[2:]:
        assert 2 <= len(attribute.tags) <= max_tags
        assert set(attribute.sources) <= {"direct", "comparison", "difficulty", "user"}
        assert attribute.sources
        assert NOT_VISIBLE not in attribute.tags[:-1]
        assert "pear" not in attribute.name.split()
    left_out = {out.name for out in proposal.dropped}
    assert "Leaf Kind" in {*schema.names(), *left_out}
    assert all(out.reason for out in (*proposal.dropped, *proposal.merged))


@given(st.lists(text.map(_cleaned).filter(bool), unique=True, max_size=12))
@settings(deadline=None)
def test_near_pairs_are_of_the_list_and_few(tags):
    pairs = near_pairs(tags, ENCODER)
    assert len(pairs) <= MAX_NEAR
    assert all(a in tags and b in tags and a != b for a, b in pairs)
    assert all(NOT_VISIBLE not in pair for pair in pairs)


@pytest.mark.parametrize(
    ("one", "other", "near"),
    [("forest", "dense forest", True), ("lying", "lying down", True), ("red", "blue", False), ("left", "right", False)],
)
def test_what_is_put_to_the_model_is_near(one, other, near):
    assert bool(near_pairs([one, other], ENCODER)) is near
