"""Tags, and models with their picks, as they are typed on a command line: "pose: sitting, lying", v2=random."""

from __future__ import annotations

import csv
from collections.abc import Iterable

from hibug2.errors import UserError


def any_of(texts: Iterable[str], field: str) -> dict[str, list[str]]:
    """Attribute to tags, from texts "attribute: tag" or "attribute: tag, tag". UserError for what cannot be read.

    A tag that holds a comma stands in double quotes.
    """
    found: dict[str, list[str]] = {}
    for text in texts:
        attribute, tags = _attribute(text, field)
        if attribute in found:
            raise UserError(field, f"names '{attribute}' twice; give its tags together: \"{attribute}: tag, tag\"")
        found[attribute] = parts(tags, field)
    return found


def threshold(text: str, field: str) -> tuple[dict[str, str], float]:
    """The tags of a slice and its limit, from "attribute: tag, attribute: tag=0.1"."""
    tags, limit = _limit(text, field, "pose: sitting=0.1")
    found: dict[str, str] = {}
    for part in parts(tags, field):
        attribute, tag = _attribute(part, field)
        if attribute in found:
            raise UserError(field, f"'{text}' names '{attribute}' twice; a slice has one tag of each attribute")
        found[attribute] = tag
    return found, limit


def severity(text: str, field: str) -> tuple[str, float, float]:
    """Name, how far below the overall mean, and limit, from "grave: 0.3=0.02"."""
    rest, limit = _limit(text, field, "grave: 0.3=0.02")
    name, below = _attribute(rest, field)
    return name, _number(below, text, field, "grave: 0.3=0.02"), limit


def trained_with(texts: Iterable[str], field: str, form: str) -> dict[str, str]:
    """Model to the picks that it was trained with, from texts of the `form` MODEL=PICKS. UserError for others."""
    found: dict[str, str] = {}
    for text in texts:
        model, _, picks = text.partition("=")
        if not model or not picks:
            raise UserError(field, f"'{text}' is not {form}")
        if model in found:
            raise UserError(field, f"names '{model}' twice; compare it with one kind of picks")
        found[model] = picks
    return found


def _limit(text: str, field: str, example: str) -> tuple[str, float]:
    rest, _, limit = text.rpartition("=")
    return rest, _number(limit, text, field, example)


def _number(number: str, text: str, field: str, example: str) -> float:
    try:
        found = float(number)
    except ValueError:
        found = -1.0
    if not 0.0 <= found <= 1.0:
        raise UserError(field, f"'{number}' in '{text}' is no number from 0 to 1; write it as in \"{example}\"")
    return found


def _attribute(text: str, field: str) -> tuple[str, str]:
    attribute, _, rest = text.partition(":")
    if not attribute.strip() or not rest.strip():
        raise UserError(field, f"'{text}' is not \"attribute: tag\"")
    return attribute.strip(), rest.strip()


def parts(text: str, field: str) -> list[str]:
    """The parts of a list with commas, of which those in double quotes may hold commas themselves."""
    try:
        found = [part.strip() for part in next(csv.reader([text], skipinitialspace=True))]
    except csv.Error as error:
        raise UserError(field, f"'{text}' cannot be read: {error}") from error
    if not found or not all(found):
        raise UserError(field, f"'{text}' names nothing, or has a comma with nothing beside it")
    return found
