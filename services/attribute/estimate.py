"""What a generation would ask of a language model, before anything is paid."""

from __future__ import annotations

import json
import math
from typing import Any

from services.attribute.proposal import Limits
from services.attribute.questions import Questions, form_of
from services.attribute.sample import SHOWN_SIDE_PX
from services.attribute.tagsets import LISTED, SETTLED
from shared.llm.prices import Estimate, Price, estimate
from shared.llm.tokens import Detail, likely_tokens
from shared.prompting import Prompt

USUAL_ATTRIBUTES, _USUAL_TAGS = 40, 6  # that schemas have; what is really found shows only later


def estimate_generation(
    price: Price, questions: Questions, main_objects: tuple[str, ...], limits: Limits, detail: Detail
) -> Estimate:
    """Every question once, comparisons and looks to their limits, each answered as long as its longest example."""
    count = min(USUAL_ATTRIBUTES, limits.max_attributes)
    attributes = [
        {
            "name": f"usual attribute {a}",
            "category": "main_object",
            "description": "what it says of the object",
            "tags": [f"usual tag {t}" for t in range(_USUAL_TAGS)],
            "near": [],
        }
        for a in range(count)
    ]
    inputs: dict[str, Any] = {
        "main_objects": list(main_objects),
        "main_object": main_objects[0],
        "other": main_objects[-1],
        "known": [attribute["name"] for attribute in attributes],
        "attributes": attributes,
        "max_tags": limits.max_tags,
        "count": limits.confusion_count,
        "pictured": "",
    }
    in_parts = {"tags": LISTED, "settle": SETTLED}  # attributes of one question
    asked: list[tuple[Prompt | None, int, int]] = [  # how often, and with how many images
        (questions.attributes, 1, 0),
        (questions.comparison, limits.pair_count, 2),
        (questions.difficulty, 1, 0),
        (questions.similar, 1, 0),
        (questions.confusion, limits.confusion_count, 0),
        (questions.selfcheck, 1, 0),
        (questions.tags, math.ceil(count / LISTED), 0),
        (questions.look, limits.image_count, 1),
        (questions.settle, math.ceil(count / SETTLED), 0),
    ]
    total = Estimate(0, 0, 0, 0.0, price.currency)
    for prompt, calls, images in asked:
        if prompt is None:
            continue
        some = attributes[: in_parts.get(prompt.name, count)]
        total += estimate(
            price,
            calls,
            prompt.render(**{**inputs, "attributes": some}),
            output_tokens=_answer_tokens(prompt, len(some) if prompt.name in in_parts else 0),
            schema=form_of(prompt),
            image_px=[(SHOWN_SIDE_PX, SHOWN_SIDE_PX)] * images,
            detail=detail,
        )
    return total


def _answer_tokens(prompt: Prompt, attributes: int) -> int:
    """Tokens of the longest example's answer; of one a line for each attribute, of as many as are asked about."""
    most = 0
    for example in prompt.examples:
        tokens = likely_tokens(json.dumps(example.answer, ensure_ascii=False))
        lines = len(example.answer["attributes"]) if attributes else 1
        most = max(most, math.ceil(tokens * max(attributes, 1) / max(lines, 1)))
    return most
