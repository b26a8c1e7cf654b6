"""What makes the task hard: asked once, or for each pair of classes taken for one another (paper 3.2.1)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from services.attribute.interview import Interview
from services.attribute.normalise import Proposed
from services.attribute.questions import Questions, form_of
from shared.llm import together
from shared.schema import Category


def confusable_pairs(
    labels: Sequence[str | None], predicted: Sequence[str | None], count: int
) -> list[tuple[str, str]]:
    """The `count` pairs (class, what it was taken for) that are the most frequent off the confusion matrix's diagonal.

    `labels` and `predicted` are those of the same instances, None where not known. Equally frequent ones come in the
    order of their names.
    """
    taken_for = Counter((a, b) for a, b in zip(labels, predicted, strict=True) if a and b and a != b)
    return sorted(taken_for, key=lambda pair: (-taken_for[pair], pair))[:count]


def proposed(answer: Any) -> Proposed:
    """The names and descriptions of an answer in the form of `attributes.schema.json`."""
    return {c: [(item["name"], item["description"]) for item in answer[c.value]] for c in Category}


async def ask_difficulty(
    interview: Interview,
    questions: Questions,
    main_objects: Sequence[str],
    known: Sequence[str],
    pairs: Sequence[tuple[str, str]],
    count: int,
) -> list[Proposed]:
    """What the task's own questions bring, an entry an answer, in the order of the questions.

    `pairs` are the confusable pairs as predictions show them; where there are none and the task asks by pairs, the
    model names at most `count` first. Questions without a usable answer bring nothing.
    """
    asked = [
        _ask_once(interview, questions, main_objects, known),
        _ask_pairs(interview, questions, main_objects, known, pairs, count),
    ]
    return [found for answers in await together(asked) for found in answers]


async def _ask_once(
    interview: Interview, questions: Questions, main_objects: Sequence[str], known: Sequence[str]
) -> list[Proposed]:
    if questions.difficulty is None:
        return []
    interview.expect(1)
    answer = await interview.try_ask(questions.difficulty, {"main_objects": list(main_objects), "known": list(known)})
    return [] if answer is None else [proposed(answer)]


async def _ask_pairs(
    interview: Interview,
    questions: Questions,
    main_objects: Sequence[str],
    known: Sequence[str],
    pairs: Sequence[tuple[str, str]],
    count: int,
) -> list[Proposed]:
    prompt = questions.confusion
    if prompt is None:
        return []
    chosen = list(pairs[:count]) or await _similar(interview, questions, main_objects, count)
    interview.expect(len(chosen))
    answers = await together(
        [interview.try_ask(prompt, {"main_object": one, "other": other, "known": list(known)}) for one, other in chosen]
    )
    return [proposed(answer) for answer in answers if answer is not None]


async def _similar(
    interview: Interview, questions: Questions, main_objects: Sequence[str], count: int
) -> list[tuple[str, str]]:
    """At most `count` pairs (class, something that looks like it), as the model names them."""
    if questions.similar is None:
        return []
    form = form_of(questions.similar)
    form["properties"]["pairs"]["items"]["properties"]["main_object"]["enum"] = list(main_objects)

    def usable(answer: Any) -> list[tuple[str, str]]:
        named = ((item["main_object"], " ".join(item["other"].split())[:60]) for item in answer["pairs"])
        return list(dict.fromkeys((a, b) for a, b in named if b and a.casefold() != b.casefold()))

    interview.expect(1)
    answer = await interview.try_ask(
        questions.similar,
        {"main_objects": list(main_objects), "count": count},
        form=form,
        check=lambda answer: [] if usable(answer) else ["it names no pair of two different things"],
    )
    return [] if answer is None else usable(answer)[:count]
