"""The schema: the attributes of one dataset and their closed tag sets (paper 3.2).

Every service to the right of the attribute service reads schemas, so their type lives here. A schema is a
value: it is identified by the hash of what it says, and two equal schemas are the same schema.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.errors import Violation, refuse

# Codes of a tag table are uint16: the position of the tag in its attribute's tag set.
UNKNOWN = 65535
UNKNOWN_TAG = "unknown"
NOT_VISIBLE = "not visible"
MAIN_OBJECT = "main object"  # the attribute that holds the class of the instance

MAX_ATTRIBUTES = 72
MAX_TAGS = 1000
_NAME = re.compile(r"[^\s=|,;\x00-\x1f][^=|;\x00-\x1f]{0,79}")
_RULE = "1 to 80 characters without = | ; and control characters, the first no blank or comma"


class Task(StrEnum):
    CLASSIFICATION = "classification"
    DETECTION = "detection"
    POSE = "pose"


class Category(StrEnum):
    MAIN_OBJECT = "main_object"
    BACKGROUND = "background"
    GLOBAL = "global"


class Tagger(StrEnum):
    """Who assigns the tags of an attribute."""

    VLM = "vlm"  # a vision language model behind the LLM endpoint
    MEASURED = "measured"  # pixels and boxes
    CLIP = "clip"  # zero-shot over the tag set
    GIVEN = "given"  # a column of the user's manifest; the class is one


@dataclass(frozen=True)
class Measure:
    """How a measured attribute is read off an image.

    `name` is a function of `shared.images.measures`. Numeric measures have `edges`, ascending: a value v gets
    the tag at position `searchsorted(edges, v, side="right")`. Categorical measures have none: the function
    returns a position in the measure's own tag set, and tags match by name.
    """

    name: str
    edges: tuple[float, ...] = ()


@dataclass(frozen=True)
class Attribute:
    """One visual property with its closed tag set."""

    name: str
    category: Category
    tags: tuple[str, ...]
    tagger: Tagger
    description: str = ""
    measure: Measure | None = None
    sources: tuple[str, ...] = ()  # direct, comparison, difficulty, catalogue, user
    locked: bool = False

    def code(self, tag: str) -> int:
        """Position of `tag` in the tag set, UNKNOWN when it is not in it."""
        return self.tags.index(tag) if tag in self.tags else UNKNOWN


@dataclass(frozen=True)
class Schema:
    """All attributes of one dataset; `schema_id` is the hash of the content."""

    task: Task
    main_objects: tuple[str, ...]
    attributes: tuple[Attribute, ...]

    @property
    def schema_id(self) -> str:
        text = json.dumps(schema_to_json(self), sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @cached_property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        """(attribute, tag) of each item, in item order."""
        return tuple((a.name, tag) for a in self.attributes for tag in a.tags)

    @property
    def tag_counts(self) -> NDArray[np.int64]:
        """(A,) tags of each attribute."""
        return np.array([len(a.tags) for a in self.attributes], dtype=np.int64)

    def names(self) -> tuple[str, ...]:
        return tuple(a.name for a in self.attributes)

    def attribute(self, name: str) -> Attribute:
        """The attribute called `name`; KeyError when there is none."""
        for attribute in self.attributes:
            if attribute.name == name:
                return attribute
        raise KeyError(name)


def is_name(text: str) -> bool:
    """True when `text` has the form that attributes and tags have."""
    return _NAME.fullmatch(text) is not None


def check_schema(schema: Schema) -> Schema:
    """Return `schema` when it obeys the rules, else raise InvalidInput with every violation.

    Rules: 1..72 attributes with unique names; each with 2..1000 unique tags (the main object may have one);
    "is …" attributes have yes and no and at most "not visible" beside them; measured attributes have a measure
    whose edges ascend and cut exactly into the tags.
    """
    found: list[Violation] = []
    if not 1 <= len(schema.attributes) <= MAX_ATTRIBUTES:
        found.append(Violation("schema.attributes", f"holds {len(schema.attributes)}; give 1 to {MAX_ATTRIBUTES}"))
    seen: set[str] = set()
    for i, attribute in enumerate(schema.attributes):
        where = f"schema.attributes[{i}]"
        key = attribute.name.casefold()
        if key in seen:
            found.append(Violation(f"{where}.name", f"'{attribute.name}' is there twice"))
        seen.add(key)
        found += _attribute_violations(attribute, where)
    refuse(found)
    return schema


def _attribute_violations(attribute: Attribute, where: str) -> list[Violation]:
    found: list[Violation] = []
    if not is_name(attribute.name) or attribute.name == "instance_id":  # the column of ids in a tag table
        found.append(Violation(f"{where}.name", f"'{attribute.name}' is not a name: {_RULE}"))
    least = 1 if attribute.tagger is Tagger.GIVEN else 2
    if not least <= len(attribute.tags) <= MAX_TAGS:
        found.append(
            Violation(
                f"{where}.tags",
                f"'{attribute.name}' has {len(attribute.tags)} tags; give {least} to {MAX_TAGS}",
            )
        )
    folded = [tag.casefold() for tag in attribute.tags]
    for tag in attribute.tags:
        if not is_name(tag):
            found.append(Violation(f"{where}.tags", f"'{tag}' is not a tag: {_RULE}"))
        if tag.casefold() == UNKNOWN_TAG:
            found.append(Violation(f"{where}.tags", f"'{UNKNOWN_TAG}' is reserved for instances without an answer"))
    # A manifest may tell tags apart by their case; a model's answer may not.
    apart = set(attribute.tags if attribute.tagger is Tagger.GIVEN else folded)
    if len(apart) != len(attribute.tags):
        found.append(Violation(f"{where}.tags", f"'{attribute.name}' has a tag twice"))
    if (
        attribute.name.startswith("is ")
        and attribute.tagger is not Tagger.GIVEN
        and set(folded) - {NOT_VISIBLE} != {"yes", "no"}
    ):
        found.append(Violation(f"{where}.tags", f"'{attribute.name}' asks yes or no; its tags must be yes and no"))
    if (attribute.tagger is Tagger.MEASURED) != (attribute.measure is not None):
        found.append(Violation(f"{where}.measure", "measured attributes, and only they, name a measure"))
    if attribute.measure is not None and attribute.measure.edges:
        edges = attribute.measure.edges
        if not all(math.isfinite(edge) for edge in edges):
            found.append(Violation(f"{where}.measure.edges", "must be finite numbers"))
        elif any(b <= a for a, b in itertools.pairwise(edges)):
            found.append(Violation(f"{where}.measure.edges", "must ascend"))
        if len(edges) + 1 != len(attribute.tags):
            found.append(
                Violation(
                    f"{where}.measure.edges",
                    f"{len(edges)} edges cut {len(edges) + 1} tags, not {len(attribute.tags)}",
                )
            )
    return found


def schema_to_json(schema: Schema) -> dict[str, Any]:
    """Plain JSON of a schema, the stored and exported form."""
    return {
        "task": schema.task.value,
        "main_objects": list(schema.main_objects),
        "attributes": [_attribute_to_json(a) for a in schema.attributes],
    }


def _attribute_to_json(attribute: Attribute) -> dict[str, Any]:
    out: dict[str, Any] = {
        "name": attribute.name,
        "category": attribute.category.value,
        "tags": list(attribute.tags),
        "tagger": attribute.tagger.value,
    }
    if attribute.description:
        out["description"] = attribute.description
    if attribute.measure is not None:
        out["measure"] = {"name": attribute.measure.name, "edges": list(attribute.measure.edges)}
    if attribute.sources:
        out["sources"] = list(attribute.sources)
    if attribute.locked:
        out["locked"] = True
    return out


def schema_from_json(data: Mapping[str, Any]) -> Schema:
    """The schema that `data` describes, checked; InvalidInput names the field that is wrong."""
    found: list[Violation] = []
    attributes: list[Attribute] = []
    raw = data.get("attributes")
    if not isinstance(raw, Sequence) or isinstance(raw, str):
        found.append(Violation("schema.attributes", "must be a list"))
        raw = []
    for i, item in enumerate(raw):
        try:
            measure = item.get("measure")
            attributes.append(
                Attribute(
                    name=str(item["name"]),
                    category=Category(item["category"]),
                    tags=_texts(item["tags"]),
                    tagger=Tagger(item.get("tagger", "vlm")),
                    description=str(item.get("description", "")),
                    measure=Measure(str(measure["name"]), tuple(float(e) for e in measure.get("edges", ())))
                    if measure
                    else None,
                    sources=_texts(item.get("sources", ())),
                    locked=bool(item.get("locked", False)),
                )
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            found.append(Violation(f"schema.attributes[{i}]", f"cannot be read: {type(error).__name__} {error}"))
    try:
        task = Task(data.get("task", ""))
    except ValueError:
        found.append(Violation("schema.task", f"'{data.get('task')}' is not one of {', '.join(Task)}"))
        task = Task.CLASSIFICATION
    main_objects: tuple[str, ...] = ()
    try:
        main_objects = _texts(data.get("main_objects", ()))
    except TypeError as error:
        found.append(Violation("schema.main_objects", str(error)))
    refuse(found)
    return check_schema(Schema(task, main_objects, tuple(attributes)))


def _texts(value: object) -> tuple[str, ...]:
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise TypeError("must be a list of texts")
    return tuple(str(text) for text in value)
