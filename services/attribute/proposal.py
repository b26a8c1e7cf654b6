"""A schema from a language model: the paper's whole process, from naming attributes to settled tags (3.2.1, 3.2.2).

Attributes come from three sources, the direct query, comparisons and the task's difficulties, into one list that a
self-check then clears. Tags come from meaning alone, then from looking at images, and are then made of one piece.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from services.attribute import normalise, tagsets
from services.attribute.comparison import choose_pairs, compare
from services.attribute.difficulty import ask_difficulty, proposed
from services.attribute.interview import Interview, Tally
from services.attribute.normalise import DIFFICULTY, DIRECT, USER, Candidate, Dropped, Gathering, Merged, Proposed
from services.attribute.questions import Questions, form_of
from services.attribute.sample import Sample
from shared import logs
from shared.errors import invalid
from shared.llm import LLM, Usage, WrongAnswer, together
from shared.schema import MAX_ATTRIBUTES, Attribute, Category, Schema, Task, check_schema, is_name
from shared.text import TextEncoder

MAX_MAIN_OBJECTS = 1000
MAX_PAIRS = 1000
MAX_IMAGES = 10_000

log = logs.get("attribute.proposal")


@dataclass(frozen=True)
class Limits:
    """How much is asked, and how much may come of it."""

    max_attributes: int = MAX_ATTRIBUTES
    max_tags: int = 15
    pair_count: int = 30  # of images that are compared
    patience: int = 5  # pairs in a row that may bring nothing new
    confusion_count: int = 10  # pairs of classes that are taken for one another
    image_count: int = 100  # images that are looked at for missing tags


class Proposal(NamedTuple):
    """A checked schema, what it cost, the digest of each prompt by its name, and what became of the rest."""

    schema: Schema
    usage: Usage
    digests: Mapping[str, str]
    dropped: Sequence[Dropped] = ()
    merged: Sequence[Merged] = ()
    compared_count: int = 0  # pairs of images
    looked_count: int = 0  # images


async def propose_schema(
    llm: LLM,
    questions: Questions,
    task: Task,
    main_objects: Sequence[str],
    *,
    encoder: TextEncoder,
    catalogue: Sequence[Attribute] = (),
    own: Sequence[Candidate] = (),
    measurable: Sequence[str] = (),
    sample: Sample | None = None,
    confusions: Sequence[tuple[str, str]] = (),
    limits: Limits = Limits(),
    seed: int = 0,
    tell: Callable[[Tally], None] = lambda tally: None,
) -> Proposal:
    """The schema for images of `main_objects`: `catalogue` first, as it is, then what the model proposes.

    `questions` are those of `task`. `catalogue` are the attributes that need no model: locked, given or measured;
    `own` those that the user named, whose tags are asked for; `measurable` measures that are not asked about though no
    attribute has them. `sample` are the images to compare and look at; without one, neither is done. `confusions` are
    pairs (class, what it was taken for), the most frequent first. Raises InvalidInput before any call when the input
    is wrong, WrongAnswer when nothing of the model's answers is of use, and what `LLM.ask` raises.
    """
    check_main_objects(main_objects)
    check_limits(limits)
    check_own(own)
    if len(catalogue) + len(own) > limits.max_attributes or len(catalogue) == limits.max_attributes:
        raise invalid(
            "max_attributes",
            f"is {limits.max_attributes}, and {len(catalogue) + len(own)} are known already; nothing to ask",
        )
    interview = Interview(llm, tell)
    known = list(dict.fromkeys((*(a.name for a in catalogue), *(m.replace("_", " ") for m in measurable))))
    gathering = Gathering(main_objects, catalogue, measurable)
    gathering.add_own(own)
    try:
        compared = await _gather(interview, questions, gathering, main_objects, known, sample, confusions, limits, seed)
        chosen, merged, dropped = await _self_check(interview, questions, gathering.candidates, main_objects, known)
        chosen, over = normalise.limited(chosen, limits.max_attributes - len(catalogue))
        lists, looked = await _tags(interview, questions, chosen, main_objects, sample, encoder, limits, seed)
    except WrongAnswer as wrong:
        wrong.usage = interview.tally.usage
        raise
    tagged, untagged = normalise.attributes(chosen, lists, limits.max_tags)
    left_out = (*gathering.dropped, *dropped, *over, *untagged)
    for out in left_out:
        log.info("proposed attribute left out", attribute=out.name, reason=out.reason)
    if not tagged:
        raise WrongAnswer(
            f"the model '{llm.settings.model}' gave no attribute with two usable tags; try a stronger model",
            usage=interview.tally.usage,
        )
    schema = check_schema(Schema(task, tuple(main_objects), (*catalogue, *tagged)))
    return Proposal(schema, interview.tally.usage, questions.digests, left_out, merged, compared, looked)


def check_main_objects(main_objects: Sequence[str]) -> None:
    """InvalidInput when these are no classes that a model can be asked about."""
    if not 1 <= len(main_objects) <= MAX_MAIN_OBJECTS:
        raise invalid("main_objects", f"holds {len(main_objects):,} classes; give 1 to {MAX_MAIN_OBJECTS:,}")
    for i, name in enumerate(main_objects):
        if not name.strip():
            raise invalid(f"main_objects[{i}]", "is empty; name the class")


def check_limits(limits: Limits) -> None:
    """InvalidInput naming the limit that is none."""
    ranges = {
        "max_attributes": (1, MAX_ATTRIBUTES),
        "max_tags": (4, 100),
        "pair_count": (1, MAX_PAIRS),
        "patience": (1, MAX_PAIRS),
        "confusion_count": (1, MAX_PAIRS),
        "image_count": (1, MAX_IMAGES),
    }
    for name, (least, most) in ranges.items():
        value = getattr(limits, name)
        if not least <= value <= most:
            raise invalid(name, f"is {value}; give {least} to {most:,}")


def check_own(own: Sequence[Candidate]) -> None:
    """InvalidInput naming what cannot be an attribute's name, or is there twice."""
    seen: set[str] = set()
    for i, candidate in enumerate(own):
        if not is_name(candidate.name) or candidate.name == "instance_id":
            raise invalid(f"attributes[{i}]", f"'{candidate.name[:80]}' cannot be the name of an attribute")
        if candidate.name.casefold() in seen:
            raise invalid(f"attributes[{i}]", f"'{candidate.name}' is there twice")
        if USER not in candidate.sources:
            raise invalid(f"attributes[{i}]", f"'{candidate.name}' does not come from the user")
        seen.add(candidate.name.casefold())


async def _gather(
    interview: Interview,
    questions: Questions,
    gathering: Gathering,
    main_objects: Sequence[str],
    known: Sequence[str],
    sample: Sample | None,
    confusions: Sequence[tuple[str, str]],
    limits: Limits,
    seed: int,
) -> int:
    """Fill `gathering` from all three sources; how many pairs of images were compared."""
    pairs = (
        choose_pairs(sample.labels, sample.values, sample.scores, limits.pair_count, seed)
        if sample is not None
        else None
    )
    images = min(limits.image_count, len(sample.labels)) if sample is not None else 0
    interview.begin("asking for attributes")
    # the direct query, the self-check, the tags; what else there is to ask shows later
    interview.expect(3 + (len(pairs) if pairs is not None else 0) + images)
    asked: list[Any] = [
        _ask_directly(interview, questions, gathering, main_objects, known),
        ask_difficulty(interview, questions, main_objects, known, confusions, limits.confusion_count),
    ]
    direct, difficult = await together(asked)
    gathering.add(direct, DIRECT)
    for found in difficult:
        gathering.add(found, DIFFICULTY)
    if sample is None or pairs is None:
        return 0
    return await compare(interview, questions.comparison, sample, pairs, gathering, known, limits.patience)


async def _ask_directly(
    interview: Interview,
    questions: Questions,
    gathering: Gathering,
    main_objects: Sequence[str],
    known: Sequence[str],
) -> Proposed:
    """What the direct query names; WrongAnswer when that is nothing that can be used."""

    def problems(answer: Any) -> list[str]:
        tried = gathering.copy()
        tried.add(proposed(answer), DIRECT)
        if any(c.category is Category.MAIN_OBJECT for c in tried.candidates):
            return []
        reasons = [f"'{out.name}' {out.reason}" for out in tried.dropped[len(gathering.dropped) :]]
        return [f"'{Category.MAIN_OBJECT.value}' holds no attribute that can be used", *reasons]

    inputs = {"main_objects": list(main_objects), "known": list(known)}
    found = proposed(await interview.ask(questions.attributes, inputs, check=problems))
    tried = gathering.copy()
    tried.add(found, DIRECT)
    if not tried.candidates:
        raise WrongAnswer(f"the model '{interview.llm.settings.model}' named no attribute that can be used")
    return found


async def _self_check(
    interview: Interview,
    questions: Questions,
    candidates: Sequence[Candidate],
    main_objects: Sequence[str],
    known: Sequence[str],
) -> tuple[Sequence[Candidate], Sequence[Merged], Sequence[Dropped]]:
    """`candidates` without those that overlap, are vague or do not fit; all of them when the check is of no use."""
    names = [candidate.name for candidate in candidates]
    form = form_of(questions.selfcheck)
    form["properties"]["merge"]["items"]["properties"]["name"]["enum"] = names
    form["properties"]["merge"]["items"]["properties"]["into"]["enum"] = [*names, *known]
    form["properties"]["drop"]["items"]["properties"]["name"]["enum"] = names

    def result(answer: Any) -> tuple[list[Candidate], list[Merged], list[Dropped]]:
        merges = [(item["name"], item["into"], item["reason"]) for item in answer["merge"]]
        drops = [(item["name"], item["reason"]) for item in answer["drop"]]
        return normalise.checked(candidates, known, merges, drops)

    def is_enough(left: Sequence[Candidate]) -> bool:
        return any(c.category is Category.MAIN_OBJECT for c in left)

    interview.begin("checking the attributes")
    inputs = {
        "main_objects": list(main_objects),
        "known": list(known),
        "attributes": [
            {"name": c.name, "category": c.category.value, "description": c.description} for c in candidates
        ],
    }
    answer = await interview.try_ask(
        questions.selfcheck,
        inputs,
        form=form,
        check=lambda answer: [] if is_enough(result(answer)[0]) else ["it leaves no attribute of the main object"],
    )
    if answer is None or not is_enough(result(answer)[0]):
        return candidates, (), ()
    return result(answer)


async def _tags(
    interview: Interview,
    questions: Questions,
    chosen: Sequence[Candidate],
    main_objects: Sequence[str],
    sample: Sample | None,
    encoder: TextEncoder,
    limits: Limits,
    seed: int,
) -> tuple[tagsets.TagLists, int]:
    """The tags of each attribute by its name, and how many images were looked at."""
    interview.expect(-(-len(chosen) // tagsets.LISTED) - 1)
    lists = await tagsets.ask_tags(interview, questions.tags, main_objects, chosen, limits.max_tags)
    added: tagsets.TagLists = {}
    looked = 0
    if sample is not None:
        rows = sample.spread(limits.image_count, seed)
        looked = len(rows)
        added = await tagsets.look(interview, questions.look, sample, rows, chosen, lists)
    settled = await tagsets.settle(
        interview, questions.settle, main_objects, chosen, lists, added, limits.max_tags, encoder
    )
    return settled, looked
