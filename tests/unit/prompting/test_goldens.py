"""A prompt that says something else is a new revision, and what it says is kept as a file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shared.prompting import prompts_root
from tests.golden import renders
from tests.golden.renders import COMMAND, GOLDEN, Variant

ROOT = prompts_root()


@pytest.mark.parametrize("variant", renders.variants(ROOT), ids=lambda variant: variant.label)
def test_a_prompt_is_what_was_kept_of_it(variant: Variant) -> None:
    label, prompt = variant.label, variant.load(ROOT)
    kept = renders.read_lock(GOLDEN).get(label)
    assert kept is not None, f"{label} is new: run `{COMMAND}`"
    now = {"revision": prompt.revision, "digest": prompt.digest}
    raised = not renders.unraised({label: kept}, {label: now})
    assert raised, f"{label} says something else than in revision {kept['revision']}: raise it, then run `{COMMAND}`"
    assert now == kept, f"{label} has changed: run `{COMMAND}` and look at what it changes"
    text = (GOLDEN / f"{label}.txt").read_text("utf-8")
    assert renders.render(variant, ROOT, GOLDEN) == text, f"{label} renders otherwise: run `{COMMAND}`"


def test_nothing_is_kept_of_prompts_that_are_gone() -> None:
    labels = {variant.label for variant in renders.variants(ROOT)}
    files = {str(path.relative_to(GOLDEN).with_suffix("")) for path in GOLDEN.glob("*/*.txt")}
    assert set(renders.read_lock(GOLDEN)) == files == labels, f"run `{COMMAND}`"


# --- the command

TEXT = (
    "---\nrevision: 3\ndescription: Says hello.\n---\nBe {{ manner }}.\n\n## Tone\n\nPlain.\n\n## Input\n\n{{ name }}\n"
)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    desk = tmp_path / "all" / "desk"
    desk.mkdir(parents=True)
    (desk / "greet.md").write_text(TEXT)
    (desk / "greet.sea.md").write_text("---\nrevision: 1\ndescription: At sea.\n---\n\n## Tone\n\nSalty.\n")
    (desk / "greet.examples.yaml").write_text("[{inputs: {manner: kind, name: Ann}, answer: Hello}]")
    return tmp_path / "all"


@pytest.fixture
def golden(tmp_path: Path, prompts: Path) -> Path:
    folder = tmp_path / "golden"
    assert renders.write(prompts, folder) == []
    return folder


def files(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def change(path: Path, old: str, new: str) -> None:
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


def test_every_task_that_changes_a_prompt_is_kept(golden: Path) -> None:
    kept = files(golden)
    assert sorted(kept) == ["desk/greet.inputs.yaml", "desk/greet.sea.txt", "desk/greet.txt", "digests.json"]
    assert kept["desk/greet.txt"] == (
        "===== system =====\nBe kind.\n\n## Tone\n\nPlain.\n\n===== user =====\nAnn\n\n"
        '===== assistant =====\n"Hello"\n\n===== user =====\nAnn\n'
    )
    assert "Salty." in kept["desk/greet.sea.txt"]
    assert {label: entry["revision"] for label, entry in json.loads(kept["digests.json"]).items()} == {
        "desk/greet": "3",
        "desk/greet.sea": "3.1",
    }


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("greet.md", "Plain.", "Curt."),
        ("greet.md", "description: Says hello.", "description: Says hello.\ntemperature: 0"),
        ("greet.examples.yaml", "Hello", "Good day"),
        ("greet.sea.md", "Salty.", "Saltier."),
    ],
)
def test_a_changed_prompt_needs_a_raised_revision(prompts: Path, golden: Path, file: str, old: str, new: str) -> None:
    before = files(golden)
    change(prompts / "desk" / file, old, new)
    refused = renders.write(prompts, golden)
    assert refused
    assert all("raise its revision" in line for line in refused)
    assert files(golden) == before
    owner = prompts / "desk" / (file if file.endswith(".md") else "greet.md")
    front = owner.read_text().partition("\n")[2].partition("\n")[0]
    if front != "revision: 1":
        change(owner, front, "revision: 1")  # another is not a higher one
        assert renders.write(prompts, golden)
        change(owner, "revision: 1", front)
    change(owner, front, "revision: 10")
    assert renders.write(prompts, golden) == []
    assert files(golden) != before


def test_what_changes_nothing_for_the_model_needs_no_revision(prompts: Path, golden: Path) -> None:
    change(prompts / "desk" / "greet.md", "Says hello.", "Greets.")
    before = files(golden)
    assert renders.write(prompts, golden) == []
    assert files(golden) == before


def test_a_task_of_its_own_schema_is_a_variant(prompts: Path, golden: Path) -> None:
    (prompts / "desk" / "greet.land.schema.json").write_text('{"type": "string"}')
    assert renders.write(prompts, golden) == []
    assert "desk/greet.land.txt" in files(golden)
    (prompts / "desk" / "greet.land.schema.json").unlink()
    assert renders.write(prompts, golden) == []
    assert "desk/greet.land.txt" not in files(golden)


def test_inputs_that_are_missing_are_named(prompts: Path, golden: Path) -> None:
    (prompts / "desk" / "part.md").write_text(TEXT)
    before = files(golden)
    (problem,) = renders.write(prompts, golden)
    assert "desk/part.inputs.yaml must give the inputs manner, name" in problem
    assert files(golden) == before
    (golden / "desk" / "part.inputs.yaml").write_text("{inputs: {manner: kind, name: Bo}, images: 2}")
    assert renders.write(prompts, golden) == []
    assert files(golden)["desk/part.txt"].endswith("Bo\n[image, detail auto]\n[image, detail auto]\n")
    for path in (prompts / "desk").glob("part*"):
        path.unlink()
    assert renders.write(prompts, golden) == []
    assert not [name for name in files(golden) if "part" in name]
