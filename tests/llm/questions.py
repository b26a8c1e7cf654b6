"""What the services ask that needs no image, with the forms and checks of the services."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from services.attribute.difficulty import proposed
from services.attribute.normalise import DIRECT, Gathering, clean_tags
from services.attribute.questions import form_of
from services.tagging.vlm import answer_schema, read_answer
from shared.llm import Check
from shared.prompting import Message, Prompt, load_prompt, prompts_root
from shared.schema import UNKNOWN, Attribute, Category, Tagger, Task

# Each class with images of it in words, for want of a model that sees.
IMAGES: Mapping[str, tuple[str, ...]] = {
    "hare": ("A brown hare sits in tall grass at dawn.", "A white hare runs over snow in bright sun."),
    "bicycle": (
        "A red bicycle leans on a brick wall in the rain.",
        "Someone rides a black bicycle on a road at night.",
    ),
    "cup": ("A blue cup stands on a wooden table by a window.", "A broken white cup lies on tiles."),
}
MAX_ITEMS, MAX_LENGTH = 8, 80  # where a form is bounded
_MAX_TAGS = 15


def _attribute(name: str, category: Category, description: str, *tags: str) -> Attribute:
    return Attribute(name, category, tags, Tagger.VLM, description)


ATTRIBUTES = (
    _attribute(
        "object color", Category.MAIN_OBJECT, "The color of most of it.", "red", "blue", "white", "brown", "black"
    ),
    _attribute("is object moving", Category.MAIN_OBJECT, "Yes when it is in motion.", "yes", "no"),
    _attribute(
        "ground type", Category.BACKGROUND, "What it stands on.", "grass", "snow", "road", "table", "not visible"
    ),
    _attribute(
        "time of day", Category.GLOBAL, "What the light suggests.", "day", "dawn or dusk", "night", "not visible"
    ),
    _attribute("weather", Category.GLOBAL, "What sky and ground show.", "clear", "rain", "snow", "not visible"),
)
_BESIDE = (
    _attribute("motion of object", Category.MAIN_OBJECT, "Whether it moves.", "yes", "no"),
    _attribute("mood", Category.GLOBAL, "What the picture feels like.", "calm", "tense"),
)


@dataclass(frozen=True)
class Question:
    """One call: what is asked, the form of the answer, and what the service that asks finds wrong in it."""

    kind: str
    about: str
    prompt: Prompt
    messages: list[Message]
    form: Mapping[str, Any]
    check: Check


def questions() -> Iterator[Question]:
    """All of them, those of one prompt one after the other, so that the model reads their beginning once."""
    for task, name in zip(Task, IMAGES, strict=True):
        yield _direct(task, name)
    for name in IMAGES:
        yield _tag_lists(name)
    for name in IMAGES:
        yield _self_check(name)
    for name, images in IMAGES.items():
        for image in images:
            yield _tagging(name, image)


def bounded(form: Any) -> Any:
    """`form` with an end to its lists and texts."""
    if isinstance(form, list):
        return [bounded(part) for part in form]
    if not isinstance(form, Mapping):
        return form
    limits: dict[str, Any] = {}
    if form.get("type") == "array":
        limits["maxItems"] = MAX_ITEMS
    if form.get("type") == "string" and "enum" not in form:
        limits["maxLength"] = MAX_LENGTH
    return {**{key: bounded(part) for key, part in form.items()}, **limits}


def _load(service: str, name: str, task: Task = Task.CLASSIFICATION) -> Prompt:
    return load_prompt(service, name, task.value, root=prompts_root())


def _listed(attributes: tuple[Attribute, ...]) -> list[dict[str, str]]:
    return [{"name": a.name, "category": a.category.value, "description": a.description} for a in attributes]


def _direct(task: Task, main_object: str) -> Question:
    prompt = _load("attribute", "attributes", task)
    messages = prompt.render(main_objects=[main_object], known=["brightness", "sharpness"])

    def check(answer: Any) -> list[str]:
        gathering = Gathering([main_object], measurable=["brightness", "sharpness"])
        gathering.add(proposed(answer), DIRECT)
        if any(c.category is Category.MAIN_OBJECT for c in gathering.candidates):
            return []
        reasons = [f"'{out.name}' {out.reason}" for out in gathering.dropped]
        return ["'main_object' holds no attribute that can be used", *reasons]

    return Question("direct query", f"{task}, {main_object}", prompt, messages, form_of(prompt), check)


def _tag_lists(main_object: str) -> Question:
    prompt, form = _load("attribute", "tags"), form_of(_load("attribute", "tags"))
    names = [a.name for a in ATTRIBUTES]
    form["properties"]["attributes"]["items"]["properties"]["name"]["enum"] = names

    def check(answer: Any) -> list[str]:
        given = {item["name"]: item["tags"] for item in answer["attributes"]}
        problems = [f"'{name}' is missing" for name in names if name not in given]
        for a in ATTRIBUTES:
            tags = given.get(a.name, ["yes", "no"])
            if len(tags) > _MAX_TAGS or len(clean_tags(a.name, a.category, tags, _MAX_TAGS)) < 2:
                problems.append(f"'{a.name}' must have 2 to {_MAX_TAGS} tags that can be used")
        return problems

    messages = prompt.render(main_objects=[main_object], max_tags=_MAX_TAGS, attributes=_listed(ATTRIBUTES))
    return Question("tag lists", main_object, prompt, messages, form, check)


def _self_check(main_object: str) -> Question:
    prompt, form = _load("attribute", "selfcheck"), form_of(_load("attribute", "selfcheck"))
    attributes = (*ATTRIBUTES, *_BESIDE)
    names, known = [a.name for a in attributes], ["brightness", "sharpness"]
    form["properties"]["merge"]["items"]["properties"]["name"]["enum"] = names
    form["properties"]["merge"]["items"]["properties"]["into"]["enum"] = [*names, *known]
    form["properties"]["drop"]["items"]["properties"]["name"]["enum"] = names

    def check(answer: Any) -> list[str]:
        gone = {item["name"] for item in (*answer["merge"], *answer["drop"])}
        left = [a for a in attributes if a.category is Category.MAIN_OBJECT and a.name not in gone]
        return [] if left else ["it leaves no attribute of the main object"]

    messages = prompt.render(main_objects=[main_object], known=known, attributes=_listed(attributes))
    return Question("self-check", main_object, prompt, messages, form, check)


def _tagging(main_object: str, image: str) -> Question:
    prompt = _load("tagging", "tag")
    messages = prompt.render(main_object=main_object, attributes=ATTRIBUTES)
    messages[-1] = {**messages[-1], "content": f"{messages[-1]['content']}\nThe image, told in words: {image}"}

    def check(answer: Any) -> list[str]:
        codes, problems = read_answer(answer, ATTRIBUTES)
        return problems if np.any(codes == UNKNOWN) else []

    return Question("tagging", image, prompt, messages, answer_schema(ATTRIBUTES), check)
