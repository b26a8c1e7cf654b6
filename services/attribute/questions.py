"""Which questions a task asks: the prompts of `prompts/attribute/`, found by their files alone (paper A.1.4, A.8).

Every task asks for attributes, comparisons, a self-check and tags. What makes a task hard is asked once for the
dataset (`difficulty.md`), or for each pair of classes that are taken for one another (`confusion.md`): a task asks
what it has a file `<name>.<task>.md` for, and the general `difficulty.md` when it has neither.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

from shared.prompting import Prompt, load_question

SERVICE = "attribute"


@dataclass(frozen=True)
class Questions:
    """The prompts of one task; None where the task does not ask."""

    attributes: Prompt  # the direct query
    comparison: Prompt
    difficulty: Prompt | None
    similar: Prompt | None  # which classes are taken for one another, where no predictions tell
    confusion: Prompt | None
    selfcheck: Prompt
    tags: Prompt
    look: Prompt
    settle: Prompt

    @property
    def digests(self) -> Mapping[str, str]:
        """The digest of each prompt that is asked, by `attribute/<name>`."""
        asked = [getattr(self, field.name) for field in fields(self)]
        return {f"{SERVICE}/{prompt.name}": prompt.digest for prompt in asked if prompt is not None}


def load_questions(root: Path, task: str) -> Questions:
    """The prompts of `task` in the folder of prompts `root`.

    Raises NotFound when one is not there, InvalidInput when one cannot be read or says no form for its answer.
    """

    load = partial(load_question, SERVICE, task=task, root=root)

    def has(name: str) -> bool:
        return (root / SERVICE / f"{name}.{task}.md").is_file()

    by_pairs = has("confusion")
    return Questions(
        attributes=load("attributes"),
        comparison=load("comparison"),
        difficulty=load("difficulty") if has("difficulty") or not by_pairs else None,
        similar=load("similar") if by_pairs else None,
        confusion=load("confusion") if by_pairs else None,
        selfcheck=load("selfcheck"),
        tags=load("tags"),
        look=load("look"),
        settle=load("settle"),
    )


def form_of(prompt: Prompt) -> dict[str, Any]:
    """The JSON schema of the answer to `prompt`, a copy of its own that may be narrowed."""
    return copy.deepcopy(dict(prompt.schema or {}))
