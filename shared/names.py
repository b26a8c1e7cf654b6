"""Resource names: `datasets/bears/rankings/4f0c…`; the same path leads to the artifact in the store."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass

from shared.errors import InvalidInput, invalid

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


def check_id(value: str, field: str) -> str:
    """`value` when it is an id: 1 to 63 letters, digits, `.`, `_`, `-`, first a letter or digit."""
    if not _ID.fullmatch(value) or ".." in value:
        raise invalid(field, f"'{value[:80]}' is not an id: 1 to 63 of A-Z a-z 0-9 . _ - and first a letter or digit")
    return value


@dataclass(frozen=True)
class Name:
    """A resource below a dataset: collection is models, schemas, taggings, enumerations, …"""

    dataset: str
    collection: str
    id: str

    def __str__(self) -> str:
        return f"datasets/{self.dataset}/{self.collection}/{self.id}"

    @property
    def parent(self) -> str:
        return f"datasets/{self.dataset}"


def dataset_id(name: str, field: str) -> str:
    """`bears` of `datasets/bears`."""
    parts = name.split("/")
    if len(parts) != 2 or parts[0] != "datasets":
        raise invalid(field, f"'{name[:200]}' is not datasets/{{dataset}}")
    return check_id(parts[1], field)


def parse(name: str, collection: str, field: str, within: str | None = None) -> Name:
    """The parts of `datasets/{dataset}/{collection}/{id}`; InvalidInput when it is none, or not `within` a dataset."""
    parts = name.split("/")
    if len(parts) != 4 or parts[0] != "datasets" or parts[2] != collection:
        raise invalid(field, f"'{name[:200]}' is not datasets/{{dataset}}/{collection}/{{id}}")
    if within is not None and parts[1] != within:
        raise invalid(field, f"'{name[:200]}' belongs to another dataset than '{within}'")
    return Name(check_id(parts[1], field), collection, check_id(parts[3], field))


def parse_any(name: str, collections: tuple[str, ...], field: str) -> Name:
    """As `parse`, for a field that takes more than one kind of resource."""
    for collection in collections:
        try:
            return parse(name, collection, field)
        except InvalidInput:
            continue
    kinds = " or ".join(f"datasets/{{dataset}}/{c}/{{id}}" for c in collections)
    raise invalid(field, f"'{name[:200]}' is not {kinds}")


def content_id(**parts: object) -> str:
    """A name for what is made from `parts`: equal parts give the same id, so equal work is found again."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:20]
