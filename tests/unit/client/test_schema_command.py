"""`hibug2 schema` over a real socket, with a real program as the editor."""

import json
import stat
import sys
import tempfile
from pathlib import Path

import grpc
import pytest
import yaml
from typer.testing import CliRunner

from hibug2.command import app
from hibug2.v1 import dataset_pb2, types_pb2

ATTRIBUTES = {"pose": ["sitting", "lying"], "is wet": ["yes", "no"]}


@pytest.fixture
def hibug2(gateway, monkeypatch):
    monkeypatch.setenv("HIBUG2_ADDRESS", gateway.address)
    gateway.datasets["bears"] = dataset_pb2.Dataset(
        name="datasets/bears", task=types_pb2.TASK_DETECTION, main_objects=["bear"]
    )

    def invoke(*arguments, code=0):
        result = CliRunner().invoke(app, [str(a) for a in arguments])
        assert result.exit_code == code, (result.stdout, result.stderr, result.exception)
        assert "Traceback" not in result.stderr
        return result

    return invoke


@pytest.fixture
def bears(hibug2, tmp_path):
    """The dataset bears with a schema."""
    (tmp_path / "s.yaml").write_text(yaml.safe_dump({"attributes": ATTRIBUTES}, sort_keys=False))
    hibug2("schema", "import", "bears", tmp_path / "s.yaml")


@pytest.fixture
def editor(tmp_path, monkeypatch):
    """Sets EDITOR to a program that does one Python statement after another to the text `t`, one an opening."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "open"))
    (tmp_path / "open").mkdir()
    monkeypatch.delenv("VISUAL", raising=False)

    def does(*steps):
        program = tmp_path / "editor program"
        program.write_text(
            f"#!{sys.executable}\nimport pathlib, sys\n"
            f"seen = pathlib.Path({str(tmp_path / 'seen')!r})\n"
            "path = pathlib.Path(sys.argv[1])\n"
            "t = path.read_text()\n"
            "count = len(list(seen.iterdir()))\n"
            "(seen / str(count)).write_text(t)\n"
            f"exec({list(steps)!r}[count])\n"
            "path.write_text(t)\n"
        )
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        (tmp_path / "seen").mkdir()
        monkeypatch.setenv("EDITOR", f"'{program}'")

    does.seen = lambda: [p.read_text() for p in sorted((tmp_path / "seen").iterdir())]
    does.left = lambda: list((tmp_path / "open").iterdir())
    return does


def created(gateway):
    return [r for r in gateway.requests if type(r).__name__ == "CreateSchemaRequest"]


def names(gateway):
    return [a.attribute for a in gateway.schemas["datasets/bears/schemas/current"].attributes]


def test_schemas_are_shown_and_survive_export_and_import(hibug2, gateway, bears, tmp_path):
    shown = hibug2("schema", "show", "bears").stdout
    assert "datasets/bears/schemas/s0" in shown
    assert "sitting, lying" in shown
    document = json.loads(hibug2("schema", "show", "bears", "--json").stdout)
    assert (document["name"], document["task"], document["main_objects"]) == (
        "datasets/bears/schemas/s0",
        "detection",
        ["bear"],
    )
    stored = gateway.schemas["datasets/bears/schemas/s0"].SerializeToString(deterministic=True)
    texts = {
        "y.yaml": hibug2("schema", "export", "bears").stdout,
        "j.json": hibug2("schema", "export", "bears", "s0", "--json").stdout,
        "shown.json": json.dumps(document),
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    for name in ("out.yaml", "out.json"):
        assert "s0 in" in hibug2("schema", "export", "bears", "s0", "--out", tmp_path / name).stdout
    assert (tmp_path / "out.yaml").read_text() == texts["y.yaml"]
    assert (tmp_path / "out.json").read_text() == texts["j.json"]
    for name in texts:
        hibug2("schema", "import", "bears", tmp_path / name)
        again = gateway.schemas["datasets/bears/schemas/current"]
        again.name = "datasets/bears/schemas/s0"
        assert again.SerializeToString(deterministic=True) == stored
    assert "there is no" in hibug2("schema", "show", "ants", code=2).stderr


def test_schemas_are_listed(hibug2, bears):
    hibug2("schema", "edit", "bears", "--lock", "pose")
    lines = hibug2("schema", "list", "bears").stdout.splitlines()
    assert [line.split() for line in lines[1:]] == [["s0", "2", "0"], ["s2", "2", "1", "current"]]
    listed = json.loads(hibug2("schema", "list", "bears", "--json").stdout)
    assert listed["current"] == "datasets/bears/schemas/s2"
    assert [len(s["attributes"]) for s in listed["schemas"]] == [2, 2]
    assert hibug2("schema", "list", "ants").stdout.strip() == "No schemas."


def test_edits_are_done_in_the_order_in_which_they_are_typed(hibug2, gateway, bears):
    result = hibug2(
        "schema", "edit", "--rename", "pose=x", "--add=pose=a,b", "bears", "--rename", "x=y", "--lock=y",
        "--drop", "pose", "--add", "--drop=c,d", "--merge-tags", "y:sitting,lying=low", "--unlock", "y", code=2,
    )  # fmt: skip
    assert "'y' is locked" in result.stderr
    assert len(created(gateway)) == 1
    result = hibug2(
        "schema", "edit", "--rename", "pose=x", "--add=pose=a,b", "bears", "--rename", "x=y",
        "--drop", "pose", "--add", "--drop=c,d", "--add-tag", "y:up", "--drop-tag", "y:sitting",
        "--rename-tag", "y:up=high", "--lock=y", "--json",
    )  # fmt: skip
    document = json.loads(result.stdout)
    assert [(a["name"], a["tags"], a.get("locked", False)) for a in document["attributes"]] == [
        ("y", ["lying", "high"], True),
        ("is wet", ["yes", "no"], False),
        ("--drop", ["c", "d"], False),
    ]
    assert "y (locked)" in hibug2("schema", "show", "bears").stdout


def test_an_edit_that_changes_nothing_stores_nothing(hibug2, gateway, bears):
    result = hibug2("schema", "edit", "bears", "--unlock", "pose")
    assert "Nothing has changed" in result.stderr
    assert len(created(gateway)) == 1


def test_the_editor_gets_the_schema_and_what_it_leaves_is_stored(hibug2, gateway, bears, editor):
    editor("t = t.replace('pose', 'object pose') + '  - name: color\\n    tags: [red, blue] # mine\\n'")
    assert "object pose" in hibug2("schema", "edit", "bears").stdout
    assert "  - name: pose\n" in editor.seen()[0]
    assert names(gateway) == ["object pose", "is wet", "color"]
    color = gateway.schemas["datasets/bears/schemas/current"].attributes[2]
    assert (list(color.sources), color.category, color.tagger) == (["user"], 1, 1)
    assert editor.left() == []


@pytest.mark.parametrize("step", ["pass", "t += '# a note\\n'", "t = ''", "t = '# nothing\\n\\n'"])
def test_a_text_left_as_it_is_stores_nothing(hibug2, gateway, bears, editor, step):
    editor(step)
    assert "Nothing has changed" in hibug2("schema", "edit", "bears").stderr
    assert len(created(gateway)) == 1
    assert editor.left() == []


def test_what_is_wrong_is_told_above_the_text_until_it_is_right(hibug2, gateway, bears, editor):
    editor(
        "t = t.replace('attributes:', 'attributes: [', 1)",
        "t = t.replace('attributes: [', 'attributes:', 1).replace('lying', 'sitting')",
        "t = t.replace('sitting, sitting', 'sitting, lying, standing')",
    )
    hibug2("schema", "edit", "bears")
    first, second, third = editor.seen()
    assert second.startswith("#! This was not stored:\n#! schema: is not YAML")
    assert third.startswith(
        "#! This was not stored:\n#! schema.attributes[0].tags: 'pose' has a tag twice\n# Attributes"
    )
    assert third.count("#!") == 2, "old complaints are gone"
    assert "#!" not in first
    assert list(gateway.schemas["datasets/bears/schemas/current"].attributes[0].tags) == [
        "sitting",
        "lying",
        "standing",
    ]
    assert editor.left() == []


def kept(result, editor):
    (file,) = editor.left()
    assert f"your text is in {file}" in result.stderr
    return file.read_text()


def test_a_text_that_stays_wrong_is_kept_and_named(hibug2, gateway, bears, editor):
    editor("t = t.replace('lying', 'sitting')", "pass")
    result = hibug2("schema", "edit", "bears", code=2)
    assert "'pose' has a tag twice" in result.stderr
    assert "tags: [sitting, sitting]" in kept(result, editor)
    assert len(names(gateway)) == 2


def test_what_is_locked_stays_as_it_is_in_the_editor(hibug2, gateway, bears, editor):
    hibug2("schema", "edit", "bears", "--lock", "pose")
    editor("t = t.replace('lying', 'standing')", "t = t.replace('    locked: true\\n', '')")
    hibug2("schema", "edit", "bears")
    assert "'pose' is locked and may not change" in editor.seen()[1]
    assert list(gateway.schemas["datasets/bears/schemas/current"].attributes[0].tags) == ["sitting", "standing"]


@pytest.mark.parametrize(
    ("step", "says", "code"),
    [
        ("t = t.replace('lying', 'prone'); path.write_text(t); sys.exit(3)", "ended with 3", 2),
        ("path.write_bytes(t.encode() + b'\\xff'); sys.exit(0)", "cannot be read", 2),
    ],
)
def test_an_editor_that_fails_loses_nothing(hibug2, gateway, bears, editor, step, says, code):
    editor(step)
    result = hibug2("schema", "edit", "bears", code=code)
    assert says in result.stderr
    (file,) = editor.left()
    assert str(file) in result.stderr
    assert len(created(gateway)) == 1


class _Later(list):
    """Faults that begin after some calls."""

    def __init__(self, calls, code):
        super().__init__([code])
        self.calls = calls

    def __bool__(self):
        self.calls -= 1
        return self.calls < 0 and len(self) > 0


def test_a_server_that_fails_loses_nothing(hibug2, gateway, bears, editor):
    editor("t = t.replace('lying', 'prone')")
    gateway.faults = _Later(2, grpc.StatusCode.INTERNAL)  # the schema is read before and after, then stored
    result = hibug2("schema", "edit", "bears", code=1)
    assert "told to fail" in result.stderr
    assert "prone" in kept(result, editor)


def test_a_schema_that_another_has_changed_meanwhile_is_not_overwritten(hibug2, gateway, bears, editor):
    theirs = ["-c", "from hibug2.command import app; app()", "schema", "edit", "bears", "--lock", "pose"]
    editor(
        f"import subprocess; subprocess.run([sys.executable, *{theirs}], check=True); t = t.replace('lying', 'prone')"
    )
    result = hibug2("schema", "edit", "bears", code=2)
    assert "was changed meanwhile, to datasets/bears/schemas/s2" in result.stderr
    assert "prone" in kept(result, editor)
    assert len(created(gateway)) == 2


@pytest.mark.parametrize(
    ("command", "says"), [("", "names no editor"), ("/nowhere/vi", "cannot be started"), ("vi 'x", "as a command")]
)
def test_without_an_editor_the_edits_are_named(hibug2, gateway, bears, editor, monkeypatch, command, says):
    monkeypatch.setenv("EDITOR", command)
    assert says in hibug2("schema", "edit", "bears", code=2).stderr
    assert len(created(gateway)) == 1


def test_a_list_without_tags_is_refused_by_name(hibug2, gateway, tmp_path):
    (tmp_path / "s.yaml").write_text("attributes:\n  - name: pose\n")
    result = hibug2("schema", "import", "bears", tmp_path / "s.yaml", code=2)
    assert "schema.attributes[0].tags: 'pose' has none; list two or more" in result.stderr
    assert created(gateway) == []


def test_the_editors_file_names_its_dataset(hibug2, bears, editor, tmp_path):
    editor(f"pathlib.Path({str(tmp_path / 'name')!r}).write_text(path.name)")
    hibug2("schema", "edit", "bears")
    name = Path(tmp_path / "name").read_text()
    assert name.startswith("hibug2-bears-")
    assert name.endswith(".yaml")
