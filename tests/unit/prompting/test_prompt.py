from __future__ import annotations

import asyncio
import base64
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import structlog

from shared.errors import HiBug2Error, InvalidInput, NotFound
from shared.prompting import Prompt, load_prompt, prompts_root
from shared.schema import Task

BASE = """---
revision: 3
description: Says hello.
temperature: 0.5
max_tokens: 100
---
You greet people.

## Manner

Be {{ manner }}.

## Form

Short.

## Input

Name: {{ name }}
"""
SCHEMA = {"type": "object", "properties": {"hello": {"type": "string"}}, "required": ["hello"]}
EXAMPLES = """
- inputs: {name: Ann}
  answer: {hello: "Hello, Ann"}
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "desk"
    folder.mkdir()
    (folder / "greet.md").write_text(BASE)
    (folder / "greet.schema.json").write_text(json.dumps(SCHEMA))
    (folder / "greet.examples.yaml").write_text(EXAMPLES)
    return tmp_path


def test_a_prompt_is_what_its_files_say(root: Path) -> None:
    prompt = load_prompt("desk", "greet", root=root)
    assert (prompt.revision, prompt.description, prompt.schema) == ("3", "Says hello.", SCHEMA)
    assert (prompt.settings.temperature, prompt.settings.max_tokens) == (0.5, 100)
    assert prompt.render(manner="kind", name="Bo") == [
        {"role": "system", "content": "You greet people.\n\n## Manner\n\nBe kind.\n\n## Form\n\nShort."},
        {"role": "user", "content": "Name: Ann"},
        {"role": "assistant", "content": '{"hello": "Hello, Ann"}'},
        {"role": "user", "content": "Name: Bo"},
    ]


def test_images_come_last(root: Path) -> None:
    messages = load_prompt("desk", "greet", root=root).render(images=[b"one", b"two"], manner="kind", name="Bo")
    text, *images = messages[-1]["content"]
    assert text == {"type": "text", "text": "Name: Bo"}
    urls = [image["image_url"]["url"] for image in images]
    assert urls == [f"data:image/jpeg;base64,{base64.b64encode(b).decode()}" for b in (b"one", b"two")]


def test_what_is_filled_in_is_not_read_as_a_template(root: Path) -> None:
    prompt = load_prompt("desk", "greet", root=root)
    name = "{{ manner }}\n## Input\n<b> & {% raw %}"
    assert prompt.render(manner="kind", name=name)[-1]["content"] == f"Name: {name}"


def test_a_task_replaces_the_sections_that_it_names(root: Path) -> None:
    override = "---\nrevision: 2\ndescription: At sea.\ntemperature: 0\n---\n\n## Manner\n\nSay ahoy, {{ manner }}.\n"
    (root / "desk" / "greet.sea.md").write_text(override)
    plain, sea = load_prompt("desk", "greet", root=root), load_prompt("desk", "greet", "sea", root=root)
    assert sea.revision == "3.2"
    assert (sea.settings.temperature, sea.settings.max_tokens) == (0, 100)
    said = sea.render(manner="mate", name="Bo")[0]["content"]
    assert said == "You greet people.\n\n## Manner\n\nSay ahoy, mate.\n\n## Form\n\nShort."
    assert sea.digest != plain.digest
    assert load_prompt("desk", "greet", "land", root=root).digest == plain.digest


def test_a_task_may_have_its_own_schema_and_examples(root: Path) -> None:
    (root / "desk" / "greet.sea.schema.json").write_text('{"type": "string"}')
    (root / "desk" / "greet.sea.examples.yaml").write_text("[{inputs: {name: Cy}, answer: Ahoy}]")
    sea = load_prompt("desk", "greet", "sea", root=root)
    assert sea.schema == {"type": "string"}
    assert [example.answer for example in sea.examples] == ["Ahoy"]


@pytest.mark.parametrize(
    ("file", "change", "told"),
    [
        ("greet.md", lambda text: text.replace("Short.", "Very short."), True),
        ("greet.md", lambda text: text.replace("Name:", "Their name:"), True),
        ("greet.md", lambda text: text.replace("0.5", "0.6"), True),
        ("greet.md", lambda text: text.replace("100", "101"), True),
        ("greet.examples.yaml", lambda text: text.replace("Hello,", "Hi,"), True),
        ("greet.schema.json", lambda text: text.replace("string", "number", 0).replace("hello", "hello", 1), False),
        ("greet.schema.json", lambda text: text.replace('"object"', '["object"]'), True),
        ("greet.md", lambda text: text.replace("Says hello.", "Greets."), False),
        ("greet.md", lambda text: text.replace("revision: 3", "revision: 4"), False),
    ],
)
def test_the_digest_follows_what_the_model_is_told(
    root: Path, file: str, change: Callable[[str], str], told: bool
) -> None:
    before = load_prompt("desk", "greet", root=root)
    path = root / "desk" / file
    path.write_text(change(path.read_text()))
    assert (load_prompt("desk", "greet", root=root).digest != before.digest) is told
    assert len(before.digest) == 64


def test_a_prompt_is_frozen(root: Path) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        load_prompt("desk", "greet", root=root).name = "other"  # type: ignore[misc]


def test_an_input_that_is_missing_is_named(root: Path) -> None:
    with pytest.raises(InvalidInput, match=r"desk/greet.*'name' is undefined"):
        load_prompt("desk", "greet", root=root).render(manner="kind")


@pytest.mark.parametrize(
    "text",
    [
        "{{ nothing }}",
        "{{ name.nothing }}",
        "{{ name['nothing'] }}",
        "{% if nothing %}a{% endif %}",
        "{% for x in nothing %}a{% endfor %}",
        "{{ nothing | join }}",
        "{{ 'a' if nothing == 1 else 'b' }}",
    ],
)
def test_whatever_is_undefined_is_refused(root: Path, text: str) -> None:
    (root / "desk" / "greet.md").write_text(BASE.replace("{{ manner }}", text))
    with pytest.raises(InvalidInput, match=r"cannot be filled in: .*(undefined|has no attribute)"):
        load_prompt("desk", "greet", root=root).render(name={})


@pytest.mark.parametrize(
    "attack",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ name.append('x') }}",
        "{{ name.__init__.__globals__ }}",
        "{{ ''['__class__']['__mro__'] }}",
        "{{ ('a' | attr('__class__')).mro() }}",
        "{{ self._TemplateReference__context }}",
        "{{ range(10000000) | list }}",
        "{% include 'greet.schema.json' %}",
        "{{ 1 // 0 }}",
        "{{ 1 + 'a' }}",
    ],
)
def test_templates_run_in_a_sandbox(root: Path, attack: str) -> None:
    (root / "desk" / "greet.md").write_text(BASE.replace("{{ manner }}", attack))
    prompt = load_prompt("desk", "greet", root=root)
    with pytest.raises(InvalidInput, match="cannot be filled in"):
        prompt.render(name=[])


@pytest.mark.parametrize(
    ("file", "text", "says"),
    [
        ("greet.md", "No front matter", "front matter"),
        ("greet.md", "---\n- a\n---\n## Input\n", "front matter"),
        ("greet.md", "---\na: [\n---\n## Input\n", "not YAML"),
        ("greet.md", BASE.replace("revision: 3", "revision: none"), "revision"),
        ("greet.md", BASE.replace("max_tokens", "max_token"), "max_token"),
        ("greet.md", BASE.replace("## Input", "## Inputs"), "## Input"),
        ("greet.md", BASE.replace("## Form", "## Manner"), "'## Manner' is there twice"),
        ("greet.md", BASE.replace("{{ name }}", "{{ name"), "Jinja"),
        ("greet.sea.md", "---\nrevision: 1\n---\n## Manners\n", "'## Manners' is not in greet.md"),
        ("greet.sea.md", "---\ndescription: At sea.\n---\n## Manner\n", "revision"),
        ("greet.schema.json", "{", "JSON schema"),
        ("greet.schema.json", '{"type": "thing"}', "JSON schema"),
        ("greet.schema.json", "true", "JSON object"),
        ("greet.examples.yaml", "a: 1", "list"),
        ("greet.examples.yaml", "- {inputs: {name: A}}", r"\[0\]"),
        ("greet.examples.yaml", "- {inputs: {name: A}, answer: {hallo: A}}", r"\[0\]\.answer does not fit"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(root: Path, file: str, text: str, says: str) -> None:
    (root / "desk" / file).write_text(text)
    with pytest.raises(InvalidInput, match=says) as caught:
        load_prompt("desk", "greet", "sea", root=root)
    assert "prompts/desk/greet" in str(caught.value)


@pytest.mark.parametrize("name", ["../greet", "desk/greet", "", "Greet", "greet.md"])
def test_names_lead_nowhere_else(root: Path, name: str) -> None:
    with pytest.raises(HiBug2Error):
        load_prompt("desk", name, root=root)


def test_what_is_not_there_is_said(root: Path) -> None:
    with pytest.raises(NotFound, match=r"desk/farewell\.md"):
        load_prompt("desk", "farewell", root=root)
    with pytest.raises(NotFound, match="HIBUG2_PROMPTS_DIR"):
        prompts_root(str(root / "nowhere"))
    assert prompts_root(str(root)) == root


async def test_the_logs_of_its_calls_name_the_prompt(root: Path) -> None:
    prompt = load_prompt("desk", "greet", root=root)
    other = dataclasses.replace(prompt, name="farewell", input="Bye, {{ name }}")
    log = structlog.get_logger()

    async def call(asked: Prompt, together: asyncio.Barrier) -> None:
        with asked.in_logs():
            await together.wait()
            log.warning("llm call failed")
            await asyncio.gather(asyncio.to_thread(log.warning, "in a thread"), together.wait())
        log.warning("after")

    with structlog.testing.capture_logs(processors=[structlog.contextvars.merge_contextvars]) as lines:
        together = asyncio.Barrier(2)
        await asyncio.gather(call(prompt, together), call(other, together))
    said = sorted((line["event"], line.get("prompt", ""), line.get("prompt_digest", "")) for line in lines)
    assert said == [
        ("after", "", ""),
        ("after", "", ""),
        ("in a thread", "desk/farewell", other.digest),
        ("in a thread", "desk/greet", prompt.digest),
        ("llm call failed", "desk/farewell", other.digest),
        ("llm call failed", "desk/greet", prompt.digest),
    ]


# --- the prompts that come with the code

SHIPPED = sorted(
    {(path.parent.name, path.name.split(".")[0]) for path in prompts_root().glob("*/*.md")},
)


@pytest.mark.parametrize("task", [None, *(task.value for task in Task)])
@pytest.mark.parametrize(("service", "name"), SHIPPED)
def test_shipped_prompts_load(service: str, name: str, task: str | None) -> None:
    prompt = load_prompt(service, name, task, root=prompts_root())
    assert isinstance(prompt, Prompt)
    assert prompt.description
    for example in prompt.examples:
        prompt.render(**example.inputs)


def test_tasks_ask_for_what_is_hard_in_them() -> None:
    digests = {load_prompt("attribute", "attributes", task.value, root=prompts_root()).digest for task in Task}
    assert len(digests) == len(Task)


def test_files_of_overrides_name_a_task() -> None:
    for path in prompts_root().glob("*/*.*.md"):
        assert path.name.split(".")[1] in set(Task)
