"""The bench's row for the instruction-based predictor: who is asked, in what form, and what is told of it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from services.prediction.extents import Extents
from services.prediction.instruction import load_questions
from shared.llm.answer import problems_of
from shared.prompting import prompts_root
from shared.schema import MAIN_OBJECT, Attribute, Category, Schema, Tagger, Task
from tests.load import instructed
from tests.load.instructed import NO_MODEL, PAIRS, Shown, speak
from tests.scripted_llm import MODEL, Fault, ScriptedLLM

CLASSES = ("bear", "cat")
SCHEMA = Schema(
    Task.CLASSIFICATION,
    CLASSES,
    (
        Attribute(MAIN_OBJECT, Category.MAIN_OBJECT, CLASSES, Tagger.GIVEN),
        Attribute("fur color", Category.MAIN_OBJECT, ("brown", "white", "black"), Tagger.VLM),
        Attribute("place", Category.BACKGROUND, ("forest", "zoo", "house"), Tagger.VLM),
        Attribute("is it raining", Category.GLOBAL, ("yes", "no"), Tagger.VLM),
    ),
)
LEAST = 15


@pytest.fixture
def shown() -> list[Shown]:
    rng = np.random.default_rng(0)
    codes = np.column_stack([rng.integers(0, len(a.tags), 1_500) for a in SCHEMA.attributes]).astype(np.uint16)
    codes[:500, 3] = 0  # so that rainless combinations are rarer among what is known
    right = (rng.random(1_500) < 0.8).astype(np.float64)
    known, held = slice(0, 500), slice(500, None)
    confusions = [("bear", "cat"), ("cat", "bear")]
    return [Shown(SCHEMA, codes[known], right[known], confusions, codes[held], right[held])] * 3


@pytest.fixture
def server() -> Iterator[ScriptedLLM]:
    with ScriptedLLM() as started:
        yield started


def test_a_model_that_the_settings_name_is_asked_as_the_service_asks(
    shown: list[Shown], server: ScriptedLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HIBUG2_LLM_BASE_URL", server.base_url)
    monkeypatch.setenv("HIBUG2_LLM_MODEL", MODEL)
    server.fail(Fault.REFUSAL)
    spoken = speak(shown, LEAST)
    assert spoken.model == MODEL
    assert "5 of 6 answers were valid" in spoken.text
    assert len(server.calls) == 6
    seen = Extents(SCHEMA, shown[0].codes)
    assert len(spoken.items) == len(shown)
    for items in spoken.items:
        assert items.shape[1] == PAIRS
        assert all(seen.count(row) < LEAST for row in items.tolist())
    found, base = shown[0].verified({"it": spoken.items[0]}, margin=0.2, min_count=1, seed=0)["it"]
    assert found.slices > 0
    assert base.slices > 0


def test_an_endpoint_that_does_not_serve_is_told_in_place_of_a_row(
    shown: list[Shown], server: ScriptedLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HIBUG2_LLM_BASE_URL", server.base_url)
    monkeypatch.setenv("HIBUG2_LLM_MODEL", MODEL)
    server.fail(*[Fault.BAD_KEY] * 20)
    spoken = speak(shown, LEAST)
    assert (spoken.model, spoken.items) == ("", [])
    assert "could not be asked" in spoken.text


def test_without_a_model_that_is_said(shown: list[Shown], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HIBUG2_LLM_BASE_URL", raising=False)
    monkeypatch.setattr(instructed, "find_spec", lambda name: None)
    assert speak(shown, LEAST).text == NO_MODEL


@pytest.mark.parametrize("seed", range(4))
def test_the_narrow_form_lets_through_what_the_schema_allows_and_nothing_else(seed: int) -> None:
    form = instructed._held(load_questions(prompts_root(), "classification").combinations.schema or {}, SCHEMA, seed)
    prefix = form["properties"]["combinations"]["items"]["properties"]["pairs"]["prefixItems"]
    parts = [[option["properties"]["attribute"]["const"] for option in part["anyOf"]] for part in prefix]
    named = sorted(name for part in parts for name in part)
    assert named == sorted(a.name for a in SCHEMA.attributes if a.name != MAIN_OBJECT)
    pairs = [{"attribute": part[0], "tag": SCHEMA.attribute(part[0]).tags[-1]} for part in parts]

    def wrong(changed: list[dict[str, str]]) -> bool:
        return bool(problems_of({"combinations": [{"pairs": changed}] * (2 * instructed.KEPT)}, form))

    assert not wrong(pairs)
    for changed in (
        pairs[:1],
        [pairs[0]] * 2,
        [*pairs, pairs[0]],
        [pairs[0] | {"tag": "pink"}, pairs[1]],
        [{"attribute": "cage", "tag": "iron"}, pairs[1]],
    ):
        assert wrong(changed)
    assert problems_of({"combinations": [{"pairs": pairs}]}, form)
