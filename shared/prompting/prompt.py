"""One prompt: its files, its digest, and the messages it becomes (paper A.1.1, A.1.4, A.8).

`prompts/<service>/<name>.md` has YAML front matter and a Jinja body. The part of the body below the heading
`## Input` becomes the user message, everything above it the instructions, so that the instructions of one prompt
stay the same from call to call and providers can cache them. Beside it may lie `<name>.schema.json`, the JSON
schema of the answer, and `<name>.examples.yaml`, a list of `inputs` and the `answer` they should get.

A task changes a prompt by `<name>.<task>.md`: its front matter and its sections (`## …`) replace those of the
same name, the rest stays. Schema and examples are replaced whole by `<name>.<task>.schema.json` and
`<name>.<task>.examples.yaml`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal

import jinja2
import structlog
import yaml
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jsonschema import Draft202012Validator, SchemaError
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from shared.errors import NotFound, invalid

Message = dict[str, Any]  # of the chat completions API

_INPUT = "Input"
_PART = re.compile(r"^[a-z][a-z0-9_-]*$")
_FRONT_MATTER = re.compile(r"\A---\n(.*?)^---\n(.*)\Z", re.DOTALL | re.MULTILINE)
_HEADING = re.compile(r"^## +(.+?) *$", re.MULTILINE)

# What a template says is read by a model, not by a browser: nothing is to be escaped.
_JINJA = ImmutableSandboxedEnvironment(
    undefined=jinja2.StrictUndefined,
    autoescape=False,
    trim_blocks=True,
    lstrip_blocks=True,
)
# What an expression of a template may raise besides: "1 + name" of a text, a range that is too long, an include.
_ITS_OWN = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)


class DataURL(str):
    """An image as it stands in a message; JSON needs to escape nothing in it."""


class PromptSettings(BaseModel):
    """How a model is asked; None leaves the choice to the endpoint."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    temperature: float | None = Field(None, ge=0, le=2)
    max_tokens: int | None = Field(None, ge=1)
    detail: Literal["low", "high", "auto"] = "auto"  # of images


class _FrontMatter(PromptSettings):
    revision: int = Field(ge=1)
    description: str


@dataclass(frozen=True)
class Example:
    """What a prompt might be given and what it should get back."""

    inputs: Mapping[str, Any]
    answer: Any


@dataclass(frozen=True)
class Prompt:
    """A prompt as it is on disk; `digest` changes with everything that a model may answer differently to."""

    service: str
    name: str
    task: str | None
    revision: str  # of the prompt, and after a dot that of the task's override
    description: str
    instructions: str  # Jinja
    input: str  # Jinja
    schema: Mapping[str, Any] | None
    examples: tuple[Example, ...]
    settings: PromptSettings

    @cached_property
    def digest(self) -> str:
        """sha256 (64 hex digits) over text, examples, schema and settings."""
        said = {
            "instructions": self.instructions,
            "input": self.input,
            "examples": [{"inputs": e.inputs, "answer": e.answer} for e in self.examples],
            "schema": self.schema,
            "settings": self.settings.model_dump(),
        }
        text = json.dumps(said, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def render(self, /, *, images: Sequence[bytes] = (), **inputs: Any) -> list[Message]:
        """The messages of one call: instructions, examples, then the input with its JPEG `images` last.

        Raises InvalidInput when the template needs an input that is not given.
        """
        messages: list[Message] = [{"role": "system", "content": self._fill(self.instructions, inputs)}]
        for example in self.examples:
            messages.append({"role": "user", "content": self._fill(self.input, example.inputs)})
            messages.append({"role": "assistant", "content": json.dumps(example.answer, ensure_ascii=False)})
        return self.showing([*messages, {"role": "user", "content": self._fill(self.input, inputs)}], images)

    def showing(self, messages: Sequence[Message], images: Sequence[bytes]) -> list[Message]:
        """The `messages` that `render` made without images, with JPEG `images` in the last."""
        if not images:
            return list(messages)
        *before, last = messages
        parts: list[Message] = [{"type": "text", "text": last["content"]}]
        for image in images:
            url = DataURL("data:image/jpeg;base64," + base64.b64encode(image).decode())
            parts.append({"type": "image_url", "image_url": {"url": url, "detail": self.settings.detail}})
        return [*before, {**last, "content": parts}]

    @contextmanager
    def in_logs(self) -> Iterator[None]:
        """While the block runs, the log lines of its task, those of the calls to the model too, name this prompt."""
        named = {"prompt": f"{self.service}/{self.name}", "prompt_digest": self.digest}
        with structlog.contextvars.bound_contextvars(**named):
            yield

    def _fill(self, template: str, inputs: Mapping[str, Any]) -> str:
        try:
            return _compiled(template).render(inputs).strip()
        except (jinja2.TemplateError, *_ITS_OWN) as error:
            raise invalid(f"prompts/{self.service}/{self.name}", f"cannot be filled in: {error}") from error


def prompts_root(folder: str = "") -> Path:
    """`folder`, or where it is empty the prompts that lie next to the code. Raises NotFound when it is no folder."""
    root = Path(folder) if folder else Path(__file__).resolve().parents[2] / "prompts"
    if not root.is_dir():
        raise NotFound(f"the prompts folder {root} does not exist; set HIBUG2_PROMPTS_DIR to one")
    return root


def load_prompt(service: str, name: str, task: str | None = None, *, root: Path) -> Prompt:
    """The prompt `name` of `service` below `root`, as `task` has it where the task overrides it.

    Raises NotFound when there is no such prompt, InvalidInput naming the file when it cannot be read as one.
    """
    for part in (service, name, *([task] if task else [])):
        if not _PART.match(part):
            raise invalid("prompt", f"'{part[:80]}' cannot be part of a prompt's file name")
    folder = root / service
    source = folder / f"{name}.md"
    if not source.is_file():
        raise NotFound(f"there is no prompt {service}/{name}.md below {root}")
    front, sections = _read(source)
    revision = str(front.get("revision"))
    override = folder / f"{name}.{task}.md"
    if task and override.is_file():
        changed, replaced = _read(override)
        if strange := [heading for heading in replaced if heading not in sections]:
            raise invalid(
                _shown(override), f"section '## {strange[0]}' is not in {source.name}, so it replaces nothing"
            )
        if type(changed.get("revision")) is not int:
            raise invalid(_shown(override), "front matter: revision: give a whole number from 1")
        front, sections = front | changed, sections | replaced
        revision += f".{changed['revision']}"
    try:
        matter = _FrontMatter.model_validate(front)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise invalid(_shown(source), f"front matter: {where}: {first['msg']}") from error
    if _INPUT not in sections:
        raise invalid(_shown(source), f"has no section '## {_INPUT}', the part that changes from call to call")
    schema = _schema(_first_file(folder, name, task, "schema.json"))
    prompt = Prompt(
        service=service,
        name=name,
        task=task,
        revision=revision,
        description=matter.description,
        instructions="\n\n".join(
            f"## {heading}\n\n{text}" if heading else text
            for heading, text in sections.items()
            if heading != _INPUT and text
        ),
        input=sections[_INPUT],
        schema=schema,
        examples=_examples(_first_file(folder, name, task, "examples.yaml"), schema),
        settings=PromptSettings(temperature=matter.temperature, max_tokens=matter.max_tokens, detail=matter.detail),
    )
    for template in (prompt.instructions, prompt.input):
        try:
            _compiled(template)
        except jinja2.TemplateSyntaxError as error:
            raise invalid(_shown(source), f"is not a Jinja template: {error}") from error
    return prompt


def load_question(service: str, name: str, task: str | None = None, *, root: Path) -> Prompt:
    """As `load_prompt`, for a prompt that must say the form of its answer; InvalidInput where it does not."""
    prompt = load_prompt(service, name, task, root=root)
    if prompt.schema is None:
        raise invalid(f"prompts/{service}/{name}.schema.json", "is missing: it is the form of the answer")
    return prompt


@lru_cache(maxsize=256)
def _compiled(template: str) -> jinja2.Template:
    return _JINJA.from_string(template)


def _shown(path: Path) -> str:
    return f"prompts/{path.parent.name}/{path.name}"


def _read(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Front matter and sections by heading; what stands before the first heading has the heading ""."""
    match = _FRONT_MATTER.match(path.read_text(encoding="utf-8"))
    if match is None:
        raise invalid(_shown(path), "must start with front matter between two lines of ---")
    try:
        front = yaml.safe_load(match[1])
    except yaml.YAMLError as error:
        raise invalid(_shown(path), f"front matter is not YAML: {error}") from error
    if not isinstance(front, dict):
        raise invalid(_shown(path), "front matter must name a revision and a description")
    before, *rest = _HEADING.split(match[2])
    sections = {"": before.strip()} if before.strip() else {}
    for heading, text in zip(rest[::2], rest[1::2], strict=True):
        if heading in sections:
            raise invalid(_shown(path), f"section '## {heading}' is there twice")
        sections[heading] = text.strip()
    return front, sections


def _first_file(folder: Path, name: str, task: str | None, ending: str) -> Path | None:
    own = [folder / f"{name}.{task}.{ending}"] if task else []
    return next((path for path in (*own, folder / f"{name}.{ending}") if path.is_file()), None)


def _schema(path: Path | None) -> Mapping[str, Any] | None:
    if path is None:
        return None
    try:
        schema = json.loads(path.read_text(encoding="utf-8"))
        Draft202012Validator.check_schema(schema)
    except (ValueError, SchemaError) as error:
        raise invalid(_shown(path), f"is not a JSON schema: {error}") from error
    if not isinstance(schema, dict):
        raise invalid(_shown(path), "must be a JSON object")
    return schema


def _examples(path: Path | None, schema: Mapping[str, Any] | None) -> tuple[Example, ...]:
    if path is None:
        return ()
    try:
        listed = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise invalid(_shown(path), f"is not YAML: {error}") from error
    if not isinstance(listed, list):
        raise invalid(_shown(path), "must be a list of examples")
    examples: list[Example] = []
    for i, item in enumerate(listed):
        if not isinstance(item, dict) or set(item) != {"inputs", "answer"} or not isinstance(item["inputs"], dict):
            raise invalid(_shown(path), f"[{i}] must have inputs, a mapping, and answer")
        if schema is not None:
            wrong = next(iter(Draft202012Validator(schema).iter_errors(item["answer"])), None)
            if wrong is not None:
                raise invalid(_shown(path), f"[{i}].answer does not fit the schema: {wrong.json_path}: {wrong.message}")
        examples.append(Example(item["inputs"], item["answer"]))
    return tuple(examples)
