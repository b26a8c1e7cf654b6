"""Tag sets in stages: from meaning alone, then what images show beside, then made of one piece (paper 3.2.2, A.8)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from services.attribute.interview import Interview
from services.attribute.normalise import Candidate, clean_tags, tag_key
from services.attribute.questions import form_of
from services.attribute.sample import Sample
from shared.llm import WrongAnswer, together
from shared.prompting import Prompt
from shared.schema import NOT_VISIBLE
from shared.text import TextEncoder

TagLists = dict[str, list[str]]  # by the name of the attribute

LISTED = 24  # attributes of one question for tags
SETTLED = 12  # attributes of one question that settles tags
MAX_ADDED = 15  # new tags of an attribute, those seen most often first
NEAR = 0.4  # cosine of two tags that are put to the model: synonyms lie above, and so do some siblings and opposites
MAX_NEAR = 10  # near pairs of an attribute
MOST = 100  # tags of an attribute before they are settled

_YES_NO = {"yes", "no"}


async def ask_tags(
    interview: Interview, prompt: Prompt, main_objects: Sequence[str], chosen: Sequence[Candidate], max_tags: int
) -> TagLists:
    """The first tags of each attribute, from its meaning alone: no image is seen, so no dataset can bias them.

    Attributes of an answer that is of no use have none. Raises WrongAnswer when no answer is of use.
    """
    batches = [chosen[i : i + LISTED] for i in range(0, len(chosen), LISTED)]
    interview.begin("asking for tags")
    failures: list[WrongAnswer] = []

    async def ask(batch: Sequence[Candidate]) -> TagLists:
        try:
            return await _ask_batch(interview, prompt, main_objects, batch, max_tags)
        except WrongAnswer as wrong:
            failures.append(wrong)
            return {}

    found = {name: tags for lists in await together([ask(b) for b in batches]) for name, tags in lists.items()}
    if len(failures) == len(batches):
        raise failures[0]
    return {c.name: list(clean_tags(c.name, c.category, found.get(c.name, ()), MOST)) for c in chosen}


async def _ask_batch(
    interview: Interview, prompt: Prompt, main_objects: Sequence[str], batch: Sequence[Candidate], max_tags: int
) -> TagLists:
    names = [candidate.name for candidate in batch]
    form = form_of(prompt)
    form["properties"]["attributes"]["items"]["properties"]["name"]["enum"] = names

    def lists(answer: Any) -> TagLists:
        return {item["name"]: item["tags"] for item in reversed(answer["attributes"])}  # of a name twice, the first

    def check(answer: Any) -> list[str]:
        given = lists(answer)
        problems = [f"'{name}' is missing" for name in names if name not in given]
        for candidate in batch:
            tags = given.get(candidate.name)
            if tags is None or candidate.name.startswith("is "):
                continue
            if len(tags) > max_tags:
                problems.append(f"'{candidate.name}' has {len(tags)} tags; group them into at most {max_tags}")
            elif len(clean_tags(candidate.name, candidate.category, tags, max_tags)) < 2:
                problems.append(f"'{candidate.name}' has fewer than two tags that can be used")
        return problems

    inputs = {
        "main_objects": list(main_objects),
        "max_tags": max_tags,
        "attributes": [{"name": c.name, "category": c.category.value, "description": c.description} for c in batch],
    }
    return lists(await interview.ask(prompt, inputs, form=form, check=check))


async def look(
    interview: Interview,
    prompt: Prompt,
    sample: Sample,
    rows: npt.NDArray[np.int64],
    chosen: Sequence[Candidate],
    tags: TagLists,
) -> TagLists:
    """Tags that the images at `rows` of `sample` need and `tags` lack, those of the most images first.

    Only attributes with open answers are asked about: yes or no fits every image.
    """
    open_ = [c for c in chosen if len(tags[c.name]) > 1 and _is_open(tags[c.name])]
    if not open_:
        interview.expect(-len(rows))
        return {}
    form = form_of(prompt)
    form["properties"]["missing"]["items"]["properties"]["attribute"]["enum"] = [c.name for c in open_]
    shown = [{"name": c.name, "tags": tags[c.name], "description": c.description} for c in open_]
    interview.begin("looking for missing tags")

    async def ask(i: int) -> Any:
        async with interview.places:
            images = await sample.shown(i)
            if images is None:
                interview.expect(-1)
                return None
            inputs = {"attributes": shown, "main_object": sample.labels[i], "pictured": ""}
            return await interview.try_ask(prompt, inputs, form=form, images=images)

    seen: dict[str, Counter[str]] = {c.name: Counter() for c in open_}
    for answer in await together([ask(int(i)) for i in rows]):
        wanted = {(item["attribute"], item["tag"]) for item in answer["missing"]} if answer is not None else set()
        for name, tag in sorted(wanted):
            seen[name][tag] += 1
    added: TagLists = {}
    for candidate in open_:
        there = {tag_key(tag) for tag in tags[candidate.name]}
        often = [tag for tag, _ in sorted(seen[candidate.name].items(), key=lambda item: (-item[1], item[0]))]
        new = clean_tags(candidate.name, candidate.category, [*tags[candidate.name], *often], MOST)
        fresh = [tag for tag in new if tag_key(tag) not in there and tag != NOT_VISIBLE]
        if NOT_VISIBLE in new and tag_key(NOT_VISIBLE) not in there:
            fresh.append(NOT_VISIBLE)
        if fresh:
            added[candidate.name] = fresh[:MAX_ADDED]
    return added


async def settle(
    interview: Interview,
    prompt: Prompt,
    main_objects: Sequence[str],
    chosen: Sequence[Candidate],
    tags: TagLists,
    added: Mapping[str, Sequence[str]],
    max_tags: int,
    encoder: TextEncoder,
) -> TagLists:
    """`tags` and `added` as one list each: same granularity, no synonyms, at most `max_tags`.

    Asked about are the attributes that have new tags, tags near each other by `encoder`, or too many. What is near
    by embedding may be a synonym, a sibling or an opposite, so the model decides; no tag is lost in its answer.
    """
    lists = {
        c.name: list(clean_tags(c.name, c.category, [*tags[c.name], *added.get(c.name, ())], MOST)) for c in chosen
    }
    near = {c.name: near_pairs(lists[c.name], encoder) for c in chosen}
    unsettled = [
        c
        for c in chosen
        if _is_open(lists[c.name]) and (c.name in added or near[c.name] or len(lists[c.name]) > max_tags)
    ]
    batches = [unsettled[i : i + SETTLED] for i in range(0, len(unsettled), SETTLED)]
    interview.begin("settling tags")
    interview.expect(len(batches))
    asked = [_settle_batch(interview, prompt, main_objects, batch, lists, near, max_tags) for batch in batches]
    for settled in await together(asked):
        lists |= settled
    return lists


def near_pairs(tags: Sequence[str], encoder: TextEncoder) -> list[tuple[str, str]]:
    """At most MAX_NEAR pairs of `tags` whose cosine is NEAR or more, the nearest first; "not visible" is near none."""
    compared = [tag for tag in tags if tag != NOT_VISIBLE]
    if len(compared) < 2:
        return []
    vectors = encoder.encode(compared)
    cosines = np.triu(vectors @ vectors.T, 1)
    first, second = np.nonzero(cosines >= NEAR)
    order = np.argsort(-cosines[first, second], kind="stable")[:MAX_NEAR]
    return [(compared[a], compared[b]) for a, b in zip(first[order], second[order], strict=True)]


async def _settle_batch(
    interview: Interview,
    prompt: Prompt,
    main_objects: Sequence[str],
    batch: Sequence[Candidate],
    lists: Mapping[str, list[str]],
    near: Mapping[str, list[tuple[str, str]]],
    max_tags: int,
) -> TagLists:
    form = form_of(prompt)
    form["properties"]["attributes"]["items"]["properties"]["name"]["enum"] = [c.name for c in batch]

    def check(answer: Any) -> list[str]:
        given = _settled(answer)
        problems = [f"'{c.name}' is missing" for c in batch if c.name not in given]
        for candidate in batch:
            groups = given.get(candidate.name)
            if groups is None:
                continue
            if lost := [tag for tag in _lost(lists[candidate.name], groups) if tag != NOT_VISIBLE]:
                problems.append(f"'{candidate.name}': no tag covers {', '.join(map(repr, lost))}")
            kept = clean_tags(candidate.name, candidate.category, [tag for tag, _ in groups], MOST)
            if not 2 <= len(kept) <= max_tags:
                problems.append(f"'{candidate.name}' has {len(kept)} tags; give 2 to {max_tags}")
        return problems

    inputs = {
        "main_objects": list(main_objects),
        "max_tags": max_tags,
        "attributes": [
            {
                "name": c.name,
                "category": c.category.value,
                "description": c.description,
                "tags": lists[c.name],
                "near": [list(pair) for pair in near[c.name]],
            }
            for c in batch
        ],
    }
    answer = await interview.try_ask(prompt, inputs, form=form, check=check)
    given = _settled(answer) if answer is not None else {}
    out: TagLists = {}
    for candidate in batch:
        before = lists[candidate.name]
        groups = given.get(candidate.name, [])
        merged = [tag for tag, covers in groups if _covered(before, tag, covers)]
        kept = [*merged, *_lost(before, groups)]
        if len(clean_tags(candidate.name, candidate.category, kept, MOST)) > 1:
            out[candidate.name] = kept
    return out


def _is_open(tags: Sequence[str]) -> bool:
    return not set(tags) >= _YES_NO


def _settled(answer: Any) -> dict[str, list[tuple[str, list[str]]]]:
    return {
        item["name"]: [(group["tag"], group["covers"]) for group in item["tags"]]
        for item in reversed(answer["attributes"])  # of a name twice, the first
    }


def _covered(before: Sequence[str], tag: str, covers: Sequence[str]) -> list[str]:
    """Which of the tags `before` a new tag stands for."""
    keys = {tag_key(text.strip()) for text in (tag, *covers)}
    return [old for old in before if tag_key(old) in keys]


def _lost(before: Sequence[str], groups: Sequence[tuple[str, Sequence[str]]]) -> list[str]:
    covered = {old for tag, covers in groups for old in _covered(before, tag, covers)}
    return [old for old in before if old not in covered]
