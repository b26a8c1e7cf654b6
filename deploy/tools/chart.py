"""`make chart`: writes what follows from elsewhere into the chart.

- `values.schema.json`, definitions `settings…`: the HIBUG2_ variables that each service's Settings class reads, less
  those that the chart sets itself.
- `README.md`, the table of values: the `# --` comments of `values.yaml`; and where the other components' defaults are
  not the gateway's.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml
from pydantic import SecretStr

CHART = Path(__file__).resolve().parents[2] / "charts" / "hibug2"
# values block -> the service whose settings its pods read
COMPONENTS = {
    "gateway": "gateway",
    "attribute": "attribute",
    "tagging": "tagging",
    "taggingWorkers": "tagging",
    "enumeration": "enumeration",
    "prediction": "prediction",
    "repair": "repair",
}
_BY_THE_IMAGE = {"HIBUG2_PROMPTS_DIR"}
_BEGIN, _END = "<!-- values: written by `make chart` -->", "<!-- end of values -->"


def variables(service: str) -> dict[str, str]:
    """Variable -> description, for everything that the service's Settings class reads."""
    fields = import_module(f"services.{service}.config").Settings.model_fields
    return {f"HIBUG2_{name.upper()}": field.description or "" for name, field in fields.items()}


def set_by_chart() -> set[str]:
    """The variables that the templates set by themselves."""
    text = "".join(path.read_text() for path in sorted((CHART / "templates").glob("_*.tpl")))
    addresses = {f"HIBUG2_{service.upper()}_ADDRESS" for service in COMPONENTS.values() if service != "gateway"}
    return set(re.findall(r'"(HIBUG2_[A-Z0-9_]+)"', text)) | addresses


def left_to_people(service: str) -> dict[str, str]:
    """What a values block's `settings` may hold. ValueError for a secret that the chart does not take from a Secret."""
    kept = set_by_chart() | _BY_THE_IMAGE
    fields = import_module(f"services.{service}.config").Settings.model_fields
    found = {name: text for name, text in variables(service).items() if name not in kept}
    for name in found:
        if fields[name.removeprefix("HIBUG2_").lower()].annotation is SecretStr:
            raise ValueError(f"{name} is a secret: let templates/_deployment.tpl read it from an existingSecret")
    return found


def with_settings(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema of the values with the definitions `settings…` as the Settings classes are now."""
    definitions = {k: v for k, v in schema["definitions"].items() if not k.startswith("settings-")}
    for block, service in COMPONENTS.items():
        definitions[f"settings-{block}"] = {
            "type": "object",
            "additionalProperties": False,
            "properties": {
                name: {"type": "string", **({"description": text} if text else {})}
                for name, text in sorted(left_to_people(service).items())
            },
        }
    return {**schema, "definitions": definitions}


@dataclass(frozen=True)
class Value:
    """One row of the table."""

    path: str
    default: str
    description: str


def documented(text: str) -> Iterator[Value]:
    """The values of `text`, a values.yaml, that have a `# --` comment above them."""
    defaults: Mapping[str, Any] = yaml.safe_load(text)
    above: list[str] = []
    parents: list[tuple[int, str]] = []
    for line in text.splitlines():
        comment = re.fullmatch(r"\s*# ?(-- )?(.*)", line)
        key = re.match(r"( *)([A-Za-z]\w*):", line)
        if comment:
            above = [comment[2]] if comment[1] else [*above, comment[2]] if above else []
        elif key:
            parents = [parent for parent in parents if parent[0] < len(key[1])]
            parents.append((len(key[1]), key[2]))
            names = [name for _, name in parents]
            if above:
                value: Any = defaults
                for name in names:
                    value = value[name]
                yield Value(".".join(names), json.dumps(value), " ".join(above))
            above = []
        else:
            above = []


def differing(text: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Each block of a component but the gateway's: key -> default, where `text`, a values.yaml, has another there."""
    values = yaml.safe_load(text)

    def flat(block: Mapping[str, Any]) -> dict[str, str]:
        scaling = {f"autoscaling.{key}": value for key, value in block["autoscaling"].items()}
        return {key: json.dumps(value) for key, value in {**block, **scaling}.items() if key != "autoscaling"}

    first = flat(values["gateway"])
    for name in COMPONENTS:
        if name != "gateway":
            yield name, {key: default for key, default in flat(values[name]).items() if default != first[key]}


def with_table(readme: str, values: str) -> str:
    """The chart's README with the tables of `values` between its marks."""
    rows = [f"| `{v.path}` | `{v.default}` | {v.description} |" for v in documented(values)]
    others = [
        f"| `{name}` | {', '.join(f'`{key}: {default}`' for key, default in found.items()) or 'none'} |"
        for name, found in differing(values)
    ]
    head, _, rest = readme.partition(_BEGIN)
    tail = rest.partition(_END)[2]
    lines = ["| value | default | |", "|---|---|---|", *rows, ""]
    lines += ["The other components have the keys of `gateway`, and its defaults but for these:", ""]
    lines += ["| block | defaults of its own |", "|---|---|", *others]
    return "\n".join([f"{head}{_BEGIN}", *lines, f"{_END}{tail}"])


def written() -> dict[Path, str]:
    """File -> what it must hold."""
    schema, readme = CHART / "values.schema.json", CHART / "README.md"
    return {
        schema: json.dumps(with_settings(json.loads(schema.read_text())), indent=2) + "\n",
        readme: with_table(readme.read_text(), (CHART / "values.yaml").read_text()),
    }


if __name__ == "__main__":
    for path, text in written().items():
        path.write_text(text)
        print(f"wrote {path}", file=sys.stderr)
