"""The tags of one image from a vision language model: one call answers all attributes (paper 3.2.2, A.1.1, A.1.5)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from services.tagging.tagger import SURROUNDINGS, Answer, all_ended
from shared.images.box import Box
from shared.images.reader import RGB, crop, resized_jpeg
from shared.llm import LLM, Form, Usage, WrongAnswer, correction
from shared.prompting import Message, Prompt
from shared.schema import UNKNOWN, Attribute

MAX_ENUM_VALUES = 1000  # that providers take in the schema of one answer
VLM_SIDE_PX = 768


class VlmTags(NamedTuple):
    """Codes (A,) uint16, the spend, and how many attributes were left unknown for want of a valid answer."""

    codes: npt.NDArray[np.uint16]
    usage: Usage
    invalid_count: int


@dataclass(frozen=True)
class VlmTagger:
    """Shows each image to a language model."""

    llm: LLM
    prompt: Prompt

    def look(self, image: RGB, box: Box | None, attributes: Sequence[Attribute]) -> bytes:
        """A JPEG of the object with its surroundings. InvalidInput when the box is none of this image."""
        return resized_jpeg(image if box is None else crop(image, box, SURROUNDINGS), VLM_SIDE_PX)

    async def tag(self, looks: Sequence[bytes], labels: Sequence[str], attributes: Sequence[Attribute]) -> Answer:
        answers = await all_ended(
            vlm_codes(self.llm, self.prompt, look, label, attributes) for look, label in zip(looks, labels, strict=True)
        )
        return Answer(
            np.stack([answer.codes for answer in answers]),
            sum((answer.usage for answer in answers), Usage()),
            len(looks) * len(attributes),
            sum(answer.invalid_count for answer in answers),
        )


async def vlm_codes(
    llm: LLM, prompt: Prompt, image_jpeg: bytes, main_object: str, attributes: Sequence[Attribute]
) -> VlmTags:
    """The tags of the image in `image_jpeg`, as positions in the tag sets of `attributes`.

    One call answers all attributes, or where their tags are more than providers take in one schema, each batch of
    them. Names and tags are validated; what is wrong or missing is asked once more, without the rest; then it is
    UNKNOWN and counted. A refused or cut-off answer leaves its attributes UNKNOWN. Raises Unavailable when the endpoint
    stays away, Precondition when it will not serve this client, and BudgetSpent.
    """
    spent, invalid = Usage(), 0
    codes = [np.empty(0, dtype=np.uint16)]
    for batch in batches(attributes):
        answer = await _ask(llm, prompt, image_jpeg, main_object, batch)
        codes.append(answer.codes)
        spent, invalid = spent + answer.usage, invalid + answer.invalid_count
    return VlmTags(np.concatenate(codes), spent, invalid)


def batches(attributes: Sequence[Attribute]) -> list[list[Attribute]]:
    """`attributes` in their order, cut so that the tags of each batch are no more than MAX_ENUM_VALUES."""
    cut: list[list[Attribute]] = []
    room = 0
    for attribute in attributes:
        if not cut or len(attribute.tags) > room:
            cut.append([])
            room = MAX_ENUM_VALUES
        cut[-1].append(attribute)
        room -= len(attribute.tags)
    return cut


@dataclass(frozen=True)
class _Question:
    """What is asked of every image of a class; `digest` stands for the prompt."""

    prompt: Prompt = field(compare=False)
    digest: str
    main_object: str
    attributes: tuple[Attribute, ...]


@lru_cache(maxsize=512)
def _worded(question: _Question) -> tuple[list[Message], Form]:
    """The messages without the image, and the schema of the answer: the same for every image of the class."""
    messages = question.prompt.render(main_object=question.main_object, attributes=question.attributes)
    return messages, answer_schema(question.attributes)


async def _ask(
    llm: LLM, prompt: Prompt, image_jpeg: bytes, main_object: str, attributes: Sequence[Attribute]
) -> VlmTags:
    codes = np.full(len(attributes), UNKNOWN, dtype=np.uint16)
    spent = Usage()
    open_ = list(range(len(attributes)))
    worded, schema = _worded(_Question(prompt, prompt.digest, main_object, tuple(attributes)))
    messages = prompt.showing(worded, [image_jpeg])
    for last in (False, True):
        if not open_:
            break
        asked = [attributes[j] for j in open_]
        if last:
            schema = answer_schema(asked)
        try:
            with prompt.in_logs():
                reply = await llm.complete(
                    messages,
                    schema,
                    name=prompt.name,
                    temperature=prompt.settings.temperature,
                    max_tokens=prompt.settings.max_tokens,
                )
        except WrongAnswer as wrong:
            spent += wrong.usage
            break
        spent += reply.usage
        answered, problems = read_answer(reply.value, asked)
        for j, code in zip(open_, answered, strict=True):
            codes[j] = code
        open_ = [j for j in open_ if codes[j] == UNKNOWN]
        if not last and open_:
            left = [attributes[j] for j in open_]
            names = ", ".join(f"'{attribute.name}'" for attribute in left)
            wish = f"give these attributes, and no others, a tag of their lists: {names}"
            no_json = reply.value is None
            messages = [*messages, *correction(reply, [*problems, wish], answer_schema(left) if no_json else None)]
    return VlmTags(codes, spent, len(open_))


def answer_schema(attributes: Sequence[Attribute]) -> Form:
    """The JSON schema of an answer: one tag for each attribute, by name."""
    return Form(
        {
            "type": "object",
            "properties": {a.name: {"type": "string", "enum": list(a.tags)} for a in attributes},
            "required": [a.name for a in attributes],
            "additionalProperties": False,
        }
    )


def read_answer(value: Any, attributes: Sequence[Attribute]) -> tuple[npt.NDArray[np.uint16], list[str]]:
    """Codes (A,) uint16 out of an answer, UNKNOWN where it has no valid tag, and what is wrong with it.

    Letter case and outer blanks do not count. An attribute that the answer has twice in this sense is wrong.
    """
    codes = np.full(len(attributes), UNKNOWN, dtype=np.uint16)
    if not isinstance(value, Mapping):
        return codes, ["it is no JSON object with a tag for each attribute"]
    given: dict[str, list[Any]] = {}
    for name, tag in value.items():
        given.setdefault(_folded(name), []).append(tag)
    problems: list[str] = []
    for i, attribute in enumerate(attributes):
        tags = given.get(_folded(attribute.name), [])
        code = _by_word(attribute.tags).get(_folded(tags[0])) if len(tags) == 1 and isinstance(tags[0], str) else None
        if code is not None:
            codes[i] = code
        elif not tags:
            problems.append(f"'{attribute.name}' is missing")
        else:
            problems.append(f"'{attribute.name}' must be one of: {' | '.join(attribute.tags)}")
    return codes, problems


@lru_cache(maxsize=4096)
def _by_word(tags: tuple[str, ...]) -> dict[str, int]:
    return {_folded(tag): code for code, tag in reversed(list(enumerate(tags)))}


def _folded(text: str) -> str:
    return text.strip().casefold()
