"""Edits of a schema: pure functions on its exported form (`messages.schema_to_json`).

An edit is a verb and a text:

    add         [CATEGORY:]NAME=TAG,TAG,…     for the language model to tag; of the main object, or CATEGORY
    rename      OLD=NEW
    merge       NAME,NAME,…=NEW               one attribute with the tags of all
    drop        NAME
    lock        NAME                          refuses every edit but unlock
    unlock      NAME
    add-tag     ATTRIBUTE:TAG,TAG,…
    rename-tag  ATTRIBUTE:OLD=NEW
    merge-tags  ATTRIBUTE:TAG,TAG,…=NEW
    drop-tag    ATTRIBUTE:TAG,TAG,…

In lists a name that holds a comma stands in double quotes. What an edit does not speak of stays to the letter, so that
the tags given for it still hold.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from hibug2 import typed
from hibug2.errors import UserError

Document = Mapping[str, Any]  # a schema, or one attribute of it

CATEGORIES = ("main_object", "background", "global")
NOT_VISIBLE = "not visible"
USER = "user"


def edited(schema: Document, edits: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """`schema` after `edits`, (verb, text) each, in their order. UserError names the edit that cannot be done."""
    attributes = tuple(schema["attributes"])
    for verb, text in edits:
        if verb not in EDITS:
            raise UserError("edits", f"'{verb}' is not one of {', '.join(EDITS)}")
        attributes = EDITS[verb](attributes, text, f"--{verb}")
    return {**schema, "attributes": list(attributes)}


def check_locks(before: Document, after: Document) -> None:
    """UserError when `after` lacks an attribute that `before` has locked, or has it locked and otherwise changed."""
    there = {attribute["name"]: attribute for attribute in after["attributes"]}
    for attribute in before["attributes"]:
        if not attribute.get("locked"):
            continue
        name = attribute["name"]
        if name not in there:
            raise UserError("schema.attributes", f"'{name}' is locked and may not go; unlock it first")
        if there[name].get("locked") and there[name] != attribute:
            raise UserError(
                "schema.attributes", f"'{name}' is locked and may not change; take its `locked: true` away as well"
            )


# Attributes


def _add(attributes: Sequence[Document], text: str, field: str) -> tuple[Document, ...]:
    name, tags = _sides(text, field)
    category, colon, rest = name.partition(":")
    if colon and category.strip() in CATEGORIES and rest.strip():
        name = rest.strip()
    else:
        category = "main_object"
    _refuse_taken(attributes, name, (), field)
    listed = typed.parts(tags, field)
    _refuse_twice(listed, field)
    new = {"name": name, "category": category.strip(), "tags": listed, "tagger": "vlm", "sources": [USER]}
    return (*attributes, new)


def _rename(attributes: Sequence[Document], text: str, field: str) -> tuple[Document, ...]:
    old, new = _sides(text, field)
    attribute = _open(attributes, old, field)
    if attribute["tagger"] == "given":
        raise UserError(field, f"'{old}' is a column of the manifest, which is found by its name")
    _refuse_taken(attributes, new, (attribute["name"],), field)
    return _replaced(attributes, attribute, name=new)


def _merge(attributes: Sequence[Document], text: str, field: str) -> tuple[Document, ...]:
    left, new = _sides(text, field)
    merged = [_open(attributes, name, field) for name in typed.parts(left, field)]
    names = [attribute["name"] for attribute in merged]
    _refuse_few(names, "attributes", field)
    for attribute in merged:
        if attribute["tagger"] != merged[0]["tagger"] or attribute["tagger"] in ("given", "measured"):
            raise UserError(field, f"'{attribute['name']}' is {attribute['tagger']}; only what is asked can be merged")
    _refuse_taken(attributes, new, names, field)
    said = dict.fromkeys(attribute.get("description", "") for attribute in merged)
    one: dict[str, Any] = {
        "name": new,
        "category": merged[0]["category"],
        "tags": _union(tag for attribute in merged for tag in attribute["tags"]),
        "tagger": merged[0]["tagger"],
    }
    if description := " ".join(text for text in said if text):
        one["description"] = description
    one["sources"] = list(dict.fromkeys([*(s for attribute in merged for s in attribute["sources"]), USER]))
    kept = [one if a is merged[0] else a for a in attributes if a is merged[0] or a["name"] not in names]
    return tuple(kept)


def _drop(attributes: Sequence[Document], text: str, field: str) -> tuple[Document, ...]:
    gone = _open(attributes, text, field)
    return tuple(attribute for attribute in attributes if attribute is not gone)


def _lock(attributes: Sequence[Document], text: str, field: str) -> tuple[Document, ...]:
    return _replaced(attributes, _find(attributes, text, field), locked=True)


def _unlock(attributes: Sequence[Document], text: str, field: str) -> tuple[Document, ...]:
    found = _find(attributes, text, field)
    free = {key: value for key, value in found.items() if key != "locked"}
    return tuple(free if attribute is found else attribute for attribute in attributes)


# Tags


def _add_tag(attributes: Sequence[Document], text: str, field: str) -> tuple[Document, ...]:
    attribute, rest = _addressed(attributes, text, field)
    if attribute["tagger"] == "measured":
        raise UserError(field, f"'{attribute['name']}' is measured; its tags are those of the measure")
    tags = [*attribute["tags"], *typed.parts(rest, field)]
    _refuse_twice(tags, field)
    return _replaced(attributes, attribute, tags=tags)


def _rename_tag(attributes: Sequence[Document], text: str, field: str) -> tuple[Document, ...]:
    attribute, rest = _addressed(attributes, text, field)
    old, new = _sides(rest, field)
    old = _tag(attribute, old, field)
    _refuse_bound(attribute, field)
    tags = [new if tag == old else tag for tag in attribute["tags"]]
    if new != old and new in attribute["tags"]:
        raise UserError(field, f"'{attribute['name']}' has '{new}' already; merge-tags makes one of two")
    return _replaced(attributes, attribute, tags=tags)


def _merge_tags(attributes: Sequence[Document], text: str, field: str) -> tuple[Document, ...]:
    attribute, rest = _addressed(attributes, text, field)
    left, new = _sides(rest, field)
    merged = [_tag(attribute, tag, field) for tag in typed.parts(left, field)]
    _refuse_few(merged, "tags", field)
    _refuse_bound(attribute, field)
    if new in attribute["tags"] and new not in merged:
        raise UserError(field, f"'{attribute['name']}' has '{new}' beside them; name it among those to merge")
    places = sorted(attribute["tags"].index(tag) for tag in merged)
    tags = [new if i == places[0] else tag for i, tag in enumerate(attribute["tags"]) if i not in places[1:]]
    if "measure" not in attribute:
        return _replaced(attributes, attribute, tags=tags)
    if places != list(range(places[0], places[-1] + 1)):
        raise UserError(field, f"the tags of '{attribute['name']}' are ranges; only neighbours can be merged")
    edges = attribute["measure"]["edges"]
    measure = {**attribute["measure"], "edges": [*edges[: places[0]], *edges[places[-1] :]]}
    return _replaced(attributes, attribute, tags=tags, measure=measure)


def _drop_tag(attributes: Sequence[Document], text: str, field: str) -> tuple[Document, ...]:
    attribute, rest = _addressed(attributes, text, field)
    gone = [_tag(attribute, tag, field) for tag in typed.parts(rest, field)]
    if attribute.get("measure", {}).get("edges"):
        raise UserError(field, f"the tags of '{attribute['name']}' are ranges; merge them with their neighbours")
    return _replaced(attributes, attribute, tags=[tag for tag in attribute["tags"] if tag not in gone])


EDITS: Mapping[str, Callable[[Sequence[Document], str, str], tuple[Document, ...]]] = {
    "add": _add,
    "rename": _rename,
    "merge": _merge,
    "drop": _drop,
    "lock": _lock,
    "unlock": _unlock,
    "add-tag": _add_tag,
    "rename-tag": _rename_tag,
    "merge-tags": _merge_tags,
    "drop-tag": _drop_tag,
}


# What they stand on


def _sides(text: str, field: str) -> tuple[str, str]:
    """What stands to the left and right of the first =, which no name holds."""
    left, equals, right = text.partition("=")
    if not equals or not left.strip() or not right.strip():
        raise UserError(field, f"'{text}' must say something on both sides of a =")
    return left.strip(), right.strip()


def _addressed(attributes: Sequence[Document], text: str, field: str) -> tuple[Document, str]:
    """The attribute before a colon, and what follows; names may hold colons, so the longest that is there counts."""
    ends = [i for i, character in enumerate(text) if character == ":"]
    names = {attribute["name"] for attribute in attributes}
    if not ends:
        raise UserError(field, f"'{text}' names no attribute: write ATTRIBUTE:TAG")
    at = next((i for i in reversed(ends) if text[:i].strip() in names), ends[0])
    return _open(attributes, text[:at], field), text[at + 1 :].strip()


def _find(attributes: Sequence[Document], name: str, field: str) -> Document:
    names = [attribute["name"] for attribute in attributes]
    for wanted in (name, name.strip()):
        if wanted in names:
            return attributes[names.index(wanted)]
    raise UserError(field, f"there is no attribute '{name.strip()}'{_near(name, names)}")


def _open(attributes: Sequence[Document], name: str, field: str) -> Document:
    """The attribute `name`, which must not be locked."""
    found = _find(attributes, name, field)
    if found.get("locked"):
        raise UserError(field, f"'{found['name']}' is locked; unlock it first")
    return found


def _tag(attribute: Document, tag: str, field: str) -> str:
    tags: Sequence[str] = attribute["tags"]
    if tag in tags:
        return tag
    raise UserError(field, f"'{attribute['name']}' has no tag '{tag}'{_near(tag, tags)}")


def _near(text: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(text.strip(), known, n=1)
    return f"; did you mean '{near[0]}'?" if near else f"; there is {', '.join(known)}" if known else ""


def _refuse_taken(attributes: Sequence[Document], name: str, but: Sequence[str], field: str) -> None:
    for attribute in attributes:
        if attribute["name"].casefold() == name.casefold() and attribute["name"] not in but:
            raise UserError(field, f"there is an attribute '{attribute['name']}' already")


def _refuse_few(names: Sequence[str], what: str, field: str) -> None:
    _refuse_twice(names, field)
    if len(names) < 2:
        raise UserError(field, f"one thing cannot be merged; name the {what}, with commas between them")


def _refuse_twice(names: Sequence[str], field: str) -> None:
    twice = [name for i, name in enumerate(names) if name in names[:i]]
    if twice:
        raise UserError(field, f"'{twice[0]}' is there twice")


def _refuse_bound(attribute: Document, field: str) -> None:
    """Tags that are found by their wording keep it."""
    if attribute["tagger"] == "given":
        raise UserError(field, f"the tags of '{attribute['name']}' are values of the manifest, which stay as they are")
    if attribute["tagger"] == "measured" and not attribute["measure"]["edges"]:
        raise UserError(field, f"the tags of '{attribute['name']}' are the measure's own, which stay as they are")


def _union(tags: Iterable[str]) -> list[str]:
    """Each tag once, whatever its case; "not visible" comes last."""
    once: dict[str, str] = {}
    for tag in tags:
        once.setdefault(tag.casefold(), tag)
    absent = once.pop(NOT_VISIBLE, None)
    return [*once.values(), absent] if absent is not None else list(once.values())


def _replaced(attributes: Sequence[Document], old: Document, **changes: Any) -> tuple[Document, ...]:
    return tuple({**attribute, **changes} if attribute is old else attribute for attribute in attributes)
