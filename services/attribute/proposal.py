"""A schema from a language model: the direct query, then the tag lists (paper 3.2.1, 3.2.2, A.8)."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from services.attribute import normalise
from services.attribute.normalise import Candidate, Dropped
from shared import logs
from shared.errors import invalid
from shared.llm import LLM, Check, Usage, WrongAnswer
from shared.prompting import Message, Prompt, load_prompt
from shared.schema import MAX_ATTRIBUTES, Attribute, Category, Schema, Task, check_schema

MAX_TAGS = 15
MAX_MAIN_OBJECTS = 1000

log = logs.get("attribute.proposal")


class Proposal(NamedTuple):
    """A checked schema, what it cost, and the digest of each prompt by its name."""

    schema: Schema
    usage: Usage
    digests: Mapping[str, str]


async def propose_schema(
    llm: LLM,
    prompts: Path,
    task: Task,
    main_objects: Sequence[str],
    *,
    catalogue: Sequence[Attribute] = (),
    max_attributes: int = MAX_ATTRIBUTES,
    max_tags: int = MAX_TAGS,
) -> Proposal:
    """The schema for images of `main_objects`: `catalogue` first, as it is, then what the model proposes.

    `prompts` is the folder of prompts; `catalogue` are the attributes that are known without a model, measured or
    given. Raises InvalidInput before any call when the input is wrong, WrongAnswer when nothing of the model's
    answers is of use, and what `LLM.ask` raises.
    """
    room = _check_input(main_objects, catalogue, max_attributes, max_tags)
    first = load_prompt("attribute", "attributes", task.value, root=prompts)
    second = load_prompt("attribute", "tags", task.value, root=prompts)

    found, dropped, spent = await _query_attributes(llm, first, main_objects, catalogue, room)
    try:
        tag_lists, usage = await _query_tags(llm, second, main_objects, found, max_tags)
    except WrongAnswer as wrong:
        wrong.usage = spent + wrong.usage
        raise
    spent += usage
    tagged, untagged = normalise.attributes(found, tag_lists, max_tags)
    for out in (*dropped, *untagged):
        log.info("proposed attribute left out", attribute=out.name, reason=out.reason)
    if not tagged:
        raise WrongAnswer(
            f"the model '{llm.settings.model}' gave no attribute with two usable tags; try a stronger model",
            usage=spent,
        )
    schema = check_schema(Schema(task, tuple(main_objects), (*catalogue, *tagged)))
    return Proposal(schema, spent, {f"attribute/{prompt.name}": prompt.digest for prompt in (first, second)})


def _check_input(
    main_objects: Sequence[str], catalogue: Sequence[Attribute], max_attributes: int, max_tags: int
) -> int:
    """How many attributes the model may add."""
    if not 1 <= len(main_objects) <= MAX_MAIN_OBJECTS:
        raise invalid("main_objects", f"holds {len(main_objects)} classes; give 1 to {MAX_MAIN_OBJECTS}")
    for i, name in enumerate(main_objects):
        if not name.strip():
            raise invalid(f"main_objects[{i}]", "is empty; name the class")
    if not 1 <= max_attributes <= MAX_ATTRIBUTES:
        raise invalid("max_attributes", f"is {max_attributes}; give 1 to {MAX_ATTRIBUTES}")
    if not 4 <= max_tags <= 100:
        raise invalid("max_tags", f"is {max_tags}; give 4 to 100")
    if len(catalogue) >= max_attributes:
        raise invalid("max_attributes", f"is {max_attributes}, and {len(catalogue)} are known already; nothing to ask")
    return max_attributes - len(catalogue)


async def _query_attributes(
    llm: LLM, prompt: Prompt, main_objects: Sequence[str], catalogue: Sequence[Attribute], room: int
) -> tuple[list[Candidate], list[Dropped], Usage]:
    def usable(answer: Any) -> tuple[list[Candidate], list[Dropped]]:
        proposed = {c: [(item["name"], item["description"]) for item in answer[c.value]] for c in Category}
        return normalise.candidates(proposed, main_objects, catalogue, room)

    def check(answer: Any) -> list[str]:
        found, dropped = usable(answer)
        if any(c.category is Category.MAIN_OBJECT for c in found):
            return []
        reasons = [f"'{out.name}' {out.reason}" for out in dropped]
        return [f"'{Category.MAIN_OBJECT.value}' holds no attribute that can be used", *reasons]

    messages = prompt.render(main_objects=list(main_objects), known=[attribute.name for attribute in catalogue])
    answer, usage = await _ask(llm, prompt, messages, _schema_of(prompt), check)
    found, dropped = usable(answer)
    if not found:
        raise WrongAnswer(f"the model '{llm.settings.model}' named no attribute that can be used", usage=usage)
    return found, dropped, usage


async def _query_tags(
    llm: LLM, prompt: Prompt, main_objects: Sequence[str], found: Sequence[Candidate], max_tags: int
) -> tuple[dict[str, list[str]], Usage]:
    names = [candidate.name for candidate in found]
    schema = _schema_of(prompt)
    schema["properties"]["attributes"]["items"]["properties"]["name"]["enum"] = names

    def lists(answer: Any) -> dict[str, list[str]]:
        return {item["name"]: item["tags"] for item in reversed(answer["attributes"])}  # of a name twice, the first

    def check(answer: Any) -> list[str]:
        given = lists(answer)
        problems = [f"'{name}' is missing" for name in names if name not in given]
        for candidate in found:
            tags = given.get(candidate.name)
            if tags is None or candidate.name.startswith("is "):
                continue
            if len(tags) > max_tags:
                problems.append(f"'{candidate.name}' has {len(tags)} tags; group them into at most {max_tags}")
            elif len(normalise.clean_tags(candidate.name, candidate.category, tags, max_tags)) < 2:
                problems.append(f"'{candidate.name}' has fewer than two tags that can be used")
        return problems

    messages = prompt.render(
        main_objects=list(main_objects),
        max_tags=max_tags,
        attributes=[{"name": c.name, "category": c.category.value, "description": c.description} for c in found],
    )
    answer, usage = await _ask(llm, prompt, messages, schema, check)
    return lists(answer), usage


async def _ask(
    llm: LLM, prompt: Prompt, messages: list[Message], schema: Mapping[str, Any], check: Check
) -> tuple[Any, Usage]:
    """The model's answer. One that is still wrong in parts is taken: the normaliser leaves those parts out."""
    settings = prompt.settings
    try:
        reply = await llm.ask(
            messages,
            schema,
            check,
            name=prompt.name,
            temperature=settings.temperature,
            max_tokens=settings.max_tokens,
        )
    except WrongAnswer as wrong:
        if wrong.value is None:
            raise
        log.warning("answer used in part", prompt=prompt.name, problems=list(wrong.problems[:10]))
        return wrong.value, wrong.usage
    return reply.value, reply.usage


def _schema_of(prompt: Prompt) -> dict[str, Any]:
    if prompt.schema is None:
        raise invalid(f"prompts/{prompt.service}/{prompt.name}.schema.json", "is missing: it is the form of the answer")
    return copy.deepcopy(dict(prompt.schema))
