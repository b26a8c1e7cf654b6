"""`make prompts`: what the prompts say, kept as files, and their digests by revision.

`prompts/<service>/<name>[.<task>].txt` is a render with the inputs of `<name>.inputs.yaml` beside it: `inputs`, and
`images`, how many are shown. `prompts/digests.json` tells which digest a revision of a prompt has. The tests compare;
this command writes both anew, and refuses where a prompt says something else under the same revision.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from jinja2 import Environment, meta

from shared.errors import HiBug2Error
from shared.prompting import Prompt, load_prompt, prompts_root

GOLDEN = Path(__file__).parent / "prompts"
COMMAND = "make prompts"
Lock = Mapping[str, Mapping[str, str]]  # a variant's label -> its revision and digest


class Variant(NamedTuple):
    """A prompt as one task has it, or, for None, the tasks that change nothing."""

    service: str
    name: str
    task: str | None

    @property
    def label(self) -> str:
        return f"{self.service}/{self.name}" + (f".{self.task}" if self.task else "")

    def load(self, prompts: Path) -> Prompt:
        return load_prompt(self.service, self.name, self.task, root=prompts)


def variants(prompts: Path) -> list[Variant]:
    """Every prompt below `prompts`, and every task that changes one, in the order of their labels."""
    found = {Variant(path.parent.name, path.name.split(".")[0], None) for path in prompts.glob("*/*.md")}
    for path in prompts.glob("*/*.*.*"):
        name, task, *ending = path.name.split(".")
        if ".".join(ending) in ("md", "schema.json", "examples.yaml"):
            found.add(Variant(path.parent.name, name, task))
    return sorted(found, key=lambda variant: variant.label)


def render(variant: Variant, prompts: Path, golden: Path) -> str:
    """The messages of `variant` with its kept inputs, as text."""
    prompt, given = variant.load(prompts), _inputs(variant, golden)
    blocks: list[str] = []
    for message in prompt.render(images=[b"image"] * given.get("images", 0), **given["inputs"]):
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        said = [p["text"] if p["type"] == "text" else f"[image, detail {p['image_url']['detail']}]" for p in parts]
        blocks.append(f"===== {message['role']} =====\n" + "\n".join(said))
    return "\n\n".join(blocks) + "\n"


def lock_of(prompts: Path) -> dict[str, dict[str, str]]:
    """What the prompts are now."""
    loaded = {variant.label: variant.load(prompts) for variant in variants(prompts)}
    return {label: {"revision": prompt.revision, "digest": prompt.digest} for label, prompt in loaded.items()}


def read_lock(golden: Path) -> dict[str, dict[str, str]]:
    """What the prompts were when the goldens were written."""
    path = golden / "digests.json"
    read: dict[str, dict[str, str]] = json.loads(path.read_text("utf-8")) if path.exists() else {}
    return read


def unraised(before: Lock, now: Lock) -> list[str]:
    """The labels of prompts that say something else than before under a revision that is not higher."""
    both = before.keys() & now.keys()
    return sorted(
        label
        for label in both
        if before[label]["digest"] != now[label]["digest"]
        and _number(now[label]["revision"]) <= _number(before[label]["revision"])
    )


def write(prompts: Path, golden: Path) -> list[str]:
    """Write renders and digests anew; returns why not, where something is wrong, and then writes nothing."""
    now, found = lock_of(prompts), variants(prompts)
    wrong = [f"{label}: says something else; raise its revision" for label in unraised(read_lock(golden), now)]
    started = {
        path: text for variant in found if (start := _first_inputs(variant, prompts, golden)) for path, text in [start]
    }
    for path, text in started.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")
    texts: dict[Path, str] = {}
    for variant in found:
        try:
            texts[golden / f"{variant.label}.txt"] = render(variant, prompts, golden)
        except (HiBug2Error, FileNotFoundError) as error:
            needed = ", ".join(sorted(_needed(variant.load(prompts))))
            wrong.append(
                f"{variant.label}: cannot be rendered: {error}; "
                f"{golden.name}/{variant.service}/{variant.name}.inputs.yaml must give the inputs {needed}"
            )
    if wrong:
        for path in started:
            path.unlink()
        return wrong
    kept = {Path(f"{variant.service}/{variant.name}.inputs.yaml") for variant in found}
    for path in [*golden.glob("*/*.txt"), *golden.glob("*/*.inputs.yaml")]:
        if path not in texts and path.relative_to(golden) not in kept:
            path.unlink()
    for path, text in texts.items():
        path.write_text(text, "utf-8")
    (golden / "digests.json").write_text(json.dumps(now, indent=1, sort_keys=True) + "\n", "utf-8")
    return []


def _number(revision: str) -> tuple[int, ...]:
    return tuple(int(part) for part in revision.split("."))


def _inputs(variant: Variant, golden: Path) -> dict[str, Any]:
    path = golden / variant.service / f"{variant.name}.inputs.yaml"
    read: dict[str, Any] = yaml.safe_load(path.read_text("utf-8"))
    return read


def _first_inputs(variant: Variant, prompts: Path, golden: Path) -> tuple[Path, str] | None:
    """Where a prompt has no inputs yet, those of its first example, to begin with."""
    path = golden / variant.service / f"{variant.name}.inputs.yaml"
    examples = variant.load(prompts).examples
    if path.exists() or not examples:
        return None
    return path, yaml.safe_dump({"inputs": dict(examples[0].inputs)}, sort_keys=False, allow_unicode=True, width=110)


def _needed(prompt: Prompt) -> set[str]:
    parsed = (Environment(autoescape=False).parse(text) for text in (prompt.instructions, prompt.input))
    return set().union(*(meta.find_undeclared_variables(tree) for tree in parsed))


if __name__ == "__main__":
    problems = write(prompts_root(), GOLDEN)
    if problems:
        sys.exit("nothing was written:\n" + "\n".join(problems))
