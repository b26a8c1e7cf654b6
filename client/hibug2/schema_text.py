"""Schemas as files: YAML that people write, JSON that programs write.

A file has `task`, `main_objects` and `attributes`, each with `name` and `tags`, and as far as wanted `category`
(main_object), `tagger` (vlm), `description`, `measure`, `sources` (user) and `locked`. Where names and tags say all,
`attributes` may map the one to the other. `task` and `main_objects` may be left to the dataset.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import yaml

from hibug2.errors import UserError


class _Loader(yaml.BaseLoader):
    """Every scalar is the text that stands there: the tags yes, 1 and 2026-01-01 need no quotes."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        found: dict[Hashable, Any] = super().construct_mapping(node, deep)
        if len(found) < len(node.value):
            twice = next(name for name, n in Counter(str(key.value) for key, _ in node.value).items() if n > 1)
            raise yaml.constructor.ConstructorError(None, None, f"'{twice}' is there twice", node.start_mark)
        return found


class _Dumper(yaml.SafeDumper):
    """Lists of attributes indented below their key, and nothing by reference."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)

    def represent_text(self, text: str) -> yaml.ScalarNode:
        # In its other styles the library writes some line ends of Unicode so that it does not read them back.
        return self.represent_scalar("tag:yaml.org,2002:str", text, None if text.isprintable() else '"')


_Dumper.add_representer(str, _Dumper.represent_text)


def to_yaml(schema: Mapping[str, Any]) -> str:
    """`schema`, as `messages.schema_to_json` writes it, as YAML; `from_yaml` reads exactly it back."""
    return yaml.dump(schema, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110, default_flow_style=None)


def from_yaml(text: str, where: str) -> Any:
    """What the YAML `text` says, every value as text but `locked`. UserError naming `where` when it is no YAML."""
    try:
        read = yaml.load(text, _Loader)  # noqa: S506 the base loader makes texts, lists and mappings only
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(where, f"is not YAML: {error}") from error
    attributes = read.get("attributes") if isinstance(read, dict) else None
    for attribute in attributes if isinstance(attributes, list) else ():
        if isinstance(attribute, dict) and attribute.get("locked") in ("true", "false"):
            attribute["locked"] = attribute["locked"] == "true"
    return read


def read_file(path: Path) -> Any:
    """What a file says: JSON where its name ends in .json, else YAML. UserError when it cannot be read."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(str(path), f"cannot be read: {error}") from error
    if path.suffix.lower() != ".json":
        return from_yaml(text, str(path))
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(str(path), f"is not JSON: {error}") from error
