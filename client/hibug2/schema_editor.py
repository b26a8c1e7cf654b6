"""A schema in the user's editor, as git does it with a commit's message."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from rich.text import Text

from hibug2 import messages, schema_edit, schema_text
from hibug2.errors import HiBug2Error, UserError

if TYPE_CHECKING:
    from rich.console import Console

    from hibug2.client import Client
    from hibug2.v1.types_pb2 import Schema

_COMPLAINT = "#! "
_HELP = """\
# Attributes and tags of {dataset}; lines with # are passed over.
# Save and close, and the schema is stored; close it unchanged or empty, and nothing is.
# A new attribute needs a name and tags. `locked: true` keeps one from edits and new generations.
"""


def edit(client: Client, dataset: str, before: Schema, err: Console) -> Schema:
    """The schema that `before`, the current one of `dataset`, becomes in the editor; `before` when it stays.

    The text lies in a file that goes only when all is well, and is named otherwise. UserError when there is no editor,
    or a text that was refused is left as it is.
    """
    document = messages.schema_to_json(before)
    command = _editor()

    def accept(text: str) -> Schema:
        changed = messages.schema_from_json(schema_text.from_yaml(text, "schema"))
        wanted = messages.schema_to_json(changed)
        if wanted == document:
            return before
        schema_edit.check_locks(document, wanted)
        current = client.schema(dataset)
        if current.name != before.name:
            raise HiBug2Error(
                f"the schema was changed meanwhile, to {current.name}, and yours was not stored; "
                "`hibug2 schema import` puts yours in its place",
                code="FAILED_PRECONDITION",
                reason="PRECONDITION",
            )
        return client.import_schema(dataset, wanted)

    short = dataset.rpartition("/")[2]
    handle, name = tempfile.mkstemp(prefix=f"hibug2-{short}-", suffix=".yaml")
    os.close(handle)
    path = Path(name)
    try:
        text = _HELP.format(dataset=short) + schema_text.to_yaml(document)
        after = until_accepted(path, text, lambda: _run(command, path), accept) or before
    except BaseException:
        err.print(Text(f"your text is in {path}"), soft_wrap=True)
        raise
    path.unlink()
    return after


def until_accepted(
    path: Path, text: str, run_editor: Callable[[], None], accept: Callable[[str], Schema]
) -> Schema | None:
    """What `accept` makes of the text at `path` after the editor; None when it was left unchanged or emptied.

    A text with which something is wrong is opened again under what is wrong, until it is right or left as it is.
    """
    path.write_text(text, "utf-8")
    refusal: HiBug2Error | None = None
    while True:
        run_editor()
        changed = _read(path)
        if changed == text:
            if refusal is not None:
                raise refusal
            return None
        text = changed
        if not any(line.strip() and not line.lstrip().startswith("#") for line in text.splitlines()):
            return None
        try:
            return accept(text)
        except HiBug2Error as error:
            if error.code != "INVALID_ARGUMENT":
                raise
            refusal = error
            path.write_text(_complaints(error) + text, "utf-8")


def _complaints(error: HiBug2Error) -> str:
    told = [f"{v.field}: {v.description}" for v in error.violations] or [error.message]
    lines = ["This was not stored:", *(line for text in told for line in text.splitlines())]
    return "".join(f"{_COMPLAINT}{line}\n" for line in lines)


def _read(path: Path) -> str:
    """The text less the complaints above it."""
    try:
        lines = path.read_text("utf-8").splitlines(keepends=True)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(str(path), f"cannot be read: {error}") from error
    while lines and lines[0].startswith(_COMPLAINT.rstrip()):
        del lines[0]
    return "".join(lines)


def _editor() -> list[str]:
    said = os.environ.get("VISUAL") or os.environ.get("EDITOR") or ""
    try:
        command = shlex.split(said)
    except ValueError as error:
        raise UserError("EDITOR", f"'{said}' cannot be read as a command: {error}") from error
    if not command:
        raise UserError("EDITOR", "names no editor; set it, or say what is to change: hibug2 schema edit --help")
    return command


def _run(command: list[str], path: Path) -> None:
    try:
        process = subprocess.Popen([*command, str(path)])  # noqa: S603 the user's own editor
    except OSError as error:
        raise UserError("EDITOR", f"'{shlex.join(command)}' cannot be started: {error}") from error
    # Ctrl-C belongs to the editor while it is open.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        status = process.wait()
    finally:
        signal.signal(signal.SIGINT, before)
    if status != 0:
        raise UserError("EDITOR", f"'{shlex.join(command)}' ended with {status}, so nothing was stored")
