"""What the verbs of the command share: where to call, how to answer, how an error ends."""

from __future__ import annotations

import functools
import inspect
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperCommand

from hibug2.errors import HiBug2Error, RunStopped, UserError

if TYPE_CHECKING:
    from hibug2.client import Client

FAILED, BAD_INPUT, UNREACHABLE, INTERRUPTED = 1, 2, 3, 130
_EXIT_CODES = {
    "INVALID_ARGUMENT": BAD_INPUT,
    "NOT_FOUND": BAD_INPUT,
    "ALREADY_EXISTS": BAD_INPUT,
    "FAILED_PRECONDITION": BAD_INPUT,
    "OUT_OF_RANGE": BAD_INPUT,
    "PERMISSION_DENIED": BAD_INPUT,
    "UNAUTHENTICATED": BAD_INPUT,
    "RESOURCE_EXHAUSTED": BAD_INPUT,
    "UNAVAILABLE": UNREACHABLE,
    "DEADLINE_EXCEEDED": UNREACHABLE,
}
# The width of tables in a pipe or file.
_PLAIN_WIDTH = 120


@dataclass(frozen=True)
class Session:
    """What every verb shares: where to call, and how to answer."""

    address: str | None = None
    json: bool = False
    debug: bool = False
    named: frozenset[str] = frozenset()  # the options that were typed, as "--limit"

    @property
    def out(self) -> Console:
        console = Console(highlight=False)
        return console if console.is_terminal else Console(highlight=False, width=_PLAIN_WIDTH)

    @property
    def err(self) -> Console:
        return Console(stderr=True, highlight=False)

    def client(self) -> Client:
        from hibug2.client import Client

        return Client(self.address)

    def refuse(self, options: Iterable[str], why: str) -> None:
        """UserError with `why` for the first of `options` that was typed, since it would do nothing."""
        for option in options:
            if option in self.named:
                raise UserError(option, why)

    def document(self, value: Any) -> None:
        """Write the one JSON document of this call to stdout."""
        sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


AddressOption = Annotated[
    str | None, typer.Option("--address", metavar="HOST:PORT", help="The gateway.", show_default="HIBUG2_ADDRESS")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Answer with one JSON document on stdout.")]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
DatasetArgument = Annotated[str, typer.Argument(metavar="DATASET")]
MaxCostOption = Annotated[
    float | None,
    typer.Option("--max-cost", help="Most to spend on language models, in the currency of the model's price."),
]
RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="Id of a run, or latest.")]
SHOWN = 20  # rows that are shown where nobody says how many
LimitOption = Annotated[
    int | None,
    typer.Option("--limit", min=1, help="Most rows.", show_default=f"{SHOWN}; all with --json"),
]


def verb(
    group: typer.Typer, name: str, cls: type[TyperCommand] | None = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a verb whose first parameter is the Session: adds the common options and turns errors into exits.

    `cls` is the command's class where its arguments are read in a way of their own.
    """

    def register(function: Callable[..., None]) -> Callable[..., None]:
        own = list(inspect.signature(function, eval_str=True).parameters.values())[1:]
        common = [
            inspect.Parameter("ctx", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context),
            inspect.Parameter("address", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=AddressOption),
            inspect.Parameter("as_json", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=JsonOption),
            inspect.Parameter("debug", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=DebugOption),
        ]

        @functools.wraps(function)
        def call(*, ctx: typer.Context, address: str | None, as_json: bool, debug: bool, **given: Any) -> None:
            base: Session = ctx.obj
            session = replace(
                base,
                address=address or base.address,
                json=as_json or base.json,
                debug=debug or base.debug,
                named=_named(ctx),
            )
            # gRPC's own log lines would stand between ours.
            os.environ.setdefault("GRPC_VERBOSITY", "NONE")
            try:
                function(session, **given)
            except HiBug2Error as error:
                _explain(error, session)
                raise typer.Exit(FAILED if isinstance(error, RunStopped) else _exit_code(error)) from None
            except KeyboardInterrupt:
                raise typer.Exit(INTERRUPTED) from None

        parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own] + common
        del call.__wrapped__
        call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        call.__annotations__ = {p.name: p.annotation for p in parameters}
        group.command(name, cls=cls)(call)
        return function

    return register


def _named(ctx: typer.Context) -> frozenset[str]:
    """The options that were typed, also those that were given their default."""
    sources = {option.opts[0]: ctx.get_parameter_source(option.name or "") for option in ctx.command.params}
    # By its name: which module holds the enum depends on the version of typer.
    return frozenset(option for option, source in sources.items() if source and source.name == "COMMANDLINE")


def _exit_code(error: HiBug2Error) -> int:
    return _EXIT_CODES.get(error.code, FAILED)


def _explain(error: HiBug2Error, session: Session) -> None:
    """One message on stderr: what was wrong, in which field, what to do."""
    err = session.err
    if session.debug:
        err.print(Text("".join(traceback.format_exception(error))), soft_wrap=True)
    err.print(Text.assemble(("error: ", "bold red"), error.message), soft_wrap=True)
    for violation in error.violations:
        if violation.field not in error.message or violation.description not in error.message:
            err.print(Text(f"  {violation.field}: {violation.description}"), soft_wrap=True)
    if error.request_id and _exit_code(error) == FAILED:
        err.print(Text(f"  request {error.request_id}", "dim"), soft_wrap=True)


@contextmanager
def written(target: Path) -> Iterator[Path]:
    """A path to write to, which becomes `target` when the block ends well and is removed when it does not."""
    if not target.absolute().parent.is_dir():
        raise UserError("--out", f"there is no folder '{target.parent}'")
    if target.is_dir():
        raise UserError("--out", f"'{target}' is a folder; name a file")
    part = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        yield part
        part.replace(target)
    except OSError as error:
        raise UserError("--out", f"'{target}' cannot be written: {error}") from error
    finally:
        part.unlink(missing_ok=True)
