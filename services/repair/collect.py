"""What to collect for error slices that the pool has too little of, in words and as prompts for an image generator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from services.repair.methods import ErrorSlices
from services.repair.pick import class_codes, error_slices_of, ranked_scores, tagging_of
from services.repair.selection import Pool, match_counts
from shared.errors import invalid
from shared.names import Name
from shared.schema import MAIN_OBJECT, NOT_VISIBLE, Category, Schema, Task
from shared.store.artifacts import Artifacts

Tags = tuple[tuple[str, str], ...]
MIN_COUNT = 10  # where the ranking does not say how many instances its slices have
_IS, _YES, _NO = "is ", "yes", "no"


@dataclass(frozen=True)
class Need:
    """Data to collect for one error slice."""

    slice: int  # position in rank order
    mean: float
    tags: Tags
    pool_count: int
    missing_count: int
    description: str
    prompt: str


def data_needs(artifacts: Artifacts, ranking: Name, split: str, wanted: int) -> list[Need]:
    """The error slices of which the pool has fewer than `wanted` instances; 0 is the minimum count of the enumeration.

    The pool's class is what the ranked model predicts. The split may be empty.
    """
    parameters = artifacts.manifest(ranking).provenance.parameters
    table, rows = artifacts.tagged(tagging_of(artifacts, ranking), [split])
    errors = error_slices_of(artifacts.read_part(ranking, "error_slices"))
    matched = np.zeros(len(errors), np.int64)
    if rows.num_rows and len(errors):
        codes = table.codes.copy()
        if MAIN_OBJECT in table.schema.names():
            predicted = class_codes(table.schema, rows, ranked_scores(artifacts, ranking))
            codes[:, table.schema.names().index(MAIN_OBJECT)] = predicted
        matched = match_counts(Pool(table.instance_ids.to_pylist(), codes, table.tag_counts), errors.items)
    return needs(table.schema, errors, matched, wanted or int(parameters.get("min_count", MIN_COUNT)))


def needs(schema: Schema, errors: ErrorSlices, matched: NDArray[np.int64], wanted: int) -> list[Need]:
    """The error slices with fewer than `wanted` of the `matched` (E,) pool instances, worst first.

    What is told by another slice of its family is left out, for it asks for the same. InvalidInput for `wanted` < 1.
    """
    if wanted < 1:
        raise invalid("wanted_count", f"is {wanted}; give 1 or more")
    found = []
    for slice_ in np.flatnonzero((matched < wanted) & errors.leads).tolist():
        tags = tuple(schema.pairs[item] for item in errors.items[slice_].tolist() if item >= 0)
        has, mean = int(matched[slice_]), float(errors.mean[slice_])
        words = describe(schema, tags, has, wanted)
        found.append(Need(slice_, mean, tags, has, wanted - has, words, prompt(schema, tags)))
    return found


def describe(schema: Schema, tags: Tags, has: int, wanted: int) -> str:
    """One sentence for a person: how many instances of what, where the pool has `has` of the `wanted` ones."""
    missing = wanted - has
    thing = "image" if schema.task is Task.CLASSIFICATION else "object"
    words = ", ".join(_words(attribute, tag) for attribute, tag in tags)
    stock = "has none" if has == 0 else f"has {has}"
    return f"Collect {missing} {thing}{'s' if missing > 1 else ''} with {words}; the pool {stock}."


def prompt(schema: Schema, tags: Tags) -> str:
    """A prompt for an image generator: the same tags give the same text."""
    of = dict(tags)
    about = {category: _sentence(schema, tags, category) for category in Category}
    anything = f"one of these: {', '.join(schema.main_objects)}" if schema.main_objects else "an object"
    picture = "A realistic photo of" if schema.task is Task.CLASSIFICATION else "A realistic scene with"
    parts = [f"{picture} {of.get(MAIN_OBJECT, anything)}."]
    if about[Category.MAIN_OBJECT]:
        parts.append(f"The object: {about[Category.MAIN_OBJECT]}.")
    if about[Category.BACKGROUND]:
        parts.append(f"The background: {about[Category.BACKGROUND]}.")
    if about[Category.GLOBAL]:
        parts.append(f"The whole image: {about[Category.GLOBAL]}.")
    return " ".join(parts)


def _sentence(schema: Schema, tags: Sequence[tuple[str, str]], category: Category) -> str:
    return ", ".join(
        _words(attribute, tag)
        for attribute, tag in tags
        if attribute != MAIN_OBJECT and schema.attribute(attribute).category is category
    )


def _words(attribute: str, tag: str) -> str:
    if attribute.startswith(_IS) and tag in (_YES, _NO):
        return attribute.removeprefix(_IS) if tag == _YES else f"not {attribute.removeprefix(_IS)}"
    if tag == NOT_VISIBLE:
        return f"{attribute} not visible"
    return f"{attribute} {tag}"
