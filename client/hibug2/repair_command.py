"""`hibug2 repair`: which pool images to train on next, and what to collect."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from hibug2 import typed
from hibug2.errors import UserError
from hibug2.session import SHOWN, LimitOption, RunArgument, Session, written

if TYPE_CHECKING:
    from hibug2.repair import PickRules

# What only picks go by.
_OF_PICKS = (
    "--method",
    "--rival",
    "--budget",
    "--seed",
    "--per-class",
    "--exclude",
    "--without-near-copies",
    "--spread",
    "--one-per-family",
    "--embeddings",
    "--out",
)


class PickMethod(StrEnum):
    lowest_mean = "lowest_mean"
    drop_support = "drop_support"
    p_value = "p_value"
    single_attribute = "single_attribute"
    slices_and_margin = "slices_and_margin"
    random = "random"
    least_confidence = "least_confidence"
    margin = "margin"
    entropy = "entropy"
    k_center = "k_center"


def repair(
    session: Session,
    run: RunArgument,
    method: Annotated[
        PickMethod, typer.Option("--method", help="The first five go by error slices.")
    ] = PickMethod.lowest_mean,
    rival: Annotated[
        list[PickMethod] | None, typer.Option("--rival", help="Picks as many beside, to compare; may be repeated.")
    ] = None,
    budget: Annotated[
        int | None, typer.Option("--budget", min=1, help="Most picks.", show_default="that of the run")
    ] = None,
    split: Annotated[str, typer.Option("--split", help="Where to pick from.", show_default="pool")] = "",
    seed: Annotated[int | None, typer.Option("--seed", help="Of the random draw.", show_default="the run's")] = None,
    per_class: Annotated[int, typer.Option("--per-class", min=0, help="Most picks of one class; 0: no limit.")] = 0,
    exclude: Annotated[
        Path | None, typer.Option("--exclude", metavar="FILE", help="Ids that are never picked, one a line.")
    ] = None,
    without_near_copies: Annotated[
        bool, typer.Option("--without-near-copies", help="Leave out images that look like one picked before.")
    ] = False,
    spread: Annotated[bool, typer.Option("--spread", help="Slices take one image each, in turn.")] = False,
    one_per_family: Annotated[
        bool, typer.Option("--one-per-family", help="Of slices with nearly the same images ask one.")
    ] = False,
    embeddings: Annotated[
        str, typer.Option("--embeddings", metavar="URI", help="For k_center: Parquet with instance_id, embedding.")
    ] = "",
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="x.csv, x.parquet, x.jsonl, x.coco.json or x.index.json."),
    ] = None,
    collect: Annotated[
        bool, typer.Option("--collect", help="Say instead what to collect where the pool has too little.")
    ] = False,
    wanted: Annotated[
        int, typer.Option("--wanted", min=0, help="With --collect: images that a slice should have.")
    ] = 0,
    compare: Annotated[
        list[str] | None,
        typer.Option(
            "--compare",
            metavar="MODEL=PICKS",
            help="Say instead what a model gained that was trained with picks: a method of the run, or a selection's "
            "name, a rival's as NAME#METHOD; may be repeated.",
        ),
    ] = None,
    repaired: Annotated[
        list[int] | None,
        typer.Option("--slice", metavar="RANK", help="With --compare: a slice that was to be repaired; repeatable."),
    ] = None,
    limit: LimitOption = None,
) -> None:
    """Shows which pool images to train on next, and which slices asked for them.

    x.index.json holds the places of the picks in the pool, as torch.utils.data.Subset takes them. --collect says what
    to photograph, and with --json how to ask an image generator for it. --compare looks at the scores of the test
    split, or of --split.
    """
    from hibug2.repair import PickRules

    if compare:
        unused = ("--collect", "--wanted", "--limit", *_OF_PICKS)
        session.refuse(unused, "does nothing with --compare; leave one of the two out")
        models = typed.trained_with(compare, "--compare", "MODEL=PICKS")
        _compare(session, run, models, split or "test", repaired or [])
        return
    session.refuse(("--slice",), "goes with --compare; add that, or leave it out")
    if collect:
        session.refuse(_OF_PICKS, "does nothing with --collect; leave one of the two out")
        _collect(session, run, wanted, split, limit)
        return
    session.refuse(("--wanted",), "goes with --collect; add that, or leave it out")
    rules = PickRules(
        class_quota=per_class,
        exclude=_ids(exclude) if exclude else (),
        without_near_copies=without_near_copies,
        spread=spread,
        one_per_family=one_per_family,
        embeddings=embeddings,
    )
    rivals = [r.value for r in rival or ()]
    _pick(session, run, method, rivals, budget=budget, split=split, seed=seed, rules=rules, out=out, limit=limit)


def _compare(session: Session, run: str, models: dict[str, str], split: str, repaired: list[int]) -> None:
    """What the `models` gained that were trained with picks."""
    from hibug2 import messages, show

    with session.client() as client:
        found = client.get_run(run)
        rows = messages.rows(client.compare_repair(found, models, split, repaired=repaired))
    if session.json:
        session.document({"run": found.name, "outcomes": rows})
    else:
        show.outcomes(rows, session.out)


def _collect(session: Session, run: str, wanted: int, split: str, limit: int | None) -> None:
    """What to collect where the pool has too little."""
    from hibug2 import messages, show

    with session.client() as client:
        found = client.get_run(run)
        rows = messages.rows(client.data_needs(found, wanted, split))
    if session.json:
        session.document({"run": found.name, "needs": rows[:limit]})
    else:
        most = limit or SHOWN
        show.needs(rows[:most], session.out, more=len(rows) > most)


def _pick(
    session: Session,
    run: str,
    method: PickMethod,
    rivals: list[str],
    *,
    budget: int | None,
    split: str,
    seed: int | None,
    rules: PickRules,
    out: Path | None,
    limit: int | None,
) -> None:
    """The picks of the run where nothing else is asked for, else those of a selection that is made."""
    from hibug2 import messages, picks_file, show
    from hibug2.repair import PickRules
    from hibug2.v1 import run_pb2

    write = picks_file.writer(out) if out else None
    document: dict[str, Any] = {}
    methods: list[dict[str, Any]] = []
    with session.client() as client:
        found = client.get_run(run)
        own = method in (PickMethod.lowest_mean, PickMethod.random)
        if own and not rivals and rules == PickRules() and (budget, split, seed) == (None, "", None):
            picks = client.picks(found, method.value)
        else:
            made = client.select(found, method.value, budget=budget, rivals=rivals, split=split, seed=seed, rules=rules)
            picks, methods = client.selected(made), messages.rows(made.methods)
            document = {
                "selection": made.name,
                "methods": methods,
                "near_copy_count": made.near_copy_count,
                "unreadable_count": made.unreadable_count,
            }
    if write and out:
        with written(out) as part:
            write(picks, part)
        document["out"] = str(out.absolute())
    rows = messages.rows(picks)
    if session.json:
        session.document({"run": found.name, "method": method.value, **document, "picks": rows[:limit]})
        return
    show.picks(rows, session.out, limit=limit or SHOWN)
    if not rows and own and not found.selections:
        why = next((step.skipped for step in found.steps if step.kind == run_pb2.STEP_KIND_SELECTION), "")
        session.out.print(Text(f"The run left them out: {why or 'it has none'}."))
    if len(methods) > 1:
        session.out.print()
        show.picked_methods(methods, session.out)
    if out:
        session.out.print(Text(f"{len(rows):,} picks in {out}"), soft_wrap=True)


def _ids(path: Path) -> list[str]:
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError("--exclude", f"'{path}' cannot be read: {error}") from error
