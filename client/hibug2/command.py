"""The `hibug2` command: thin over the Python client. Imports stay inside the verbs, so that --help is quick."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from hibug2 import typed
from hibug2.errors import RunStopped, UserError
from hibug2.predict_command import predict
from hibug2.repair_command import repair
from hibug2.schema_command import schema_app
from hibug2.session import (
    FAILED,
    SHOWN,
    AddressOption,
    DatasetArgument,
    DebugOption,
    JsonOption,
    LimitOption,
    MaxCostOption,
    RunArgument,
    Session,
    verb,
    written,
)
from hibug2.tagging_command import tagging_app

if TYPE_CHECKING:
    from hibug2.client import Client
    from hibug2.v1.run_pb2 import Run

_HELP = """Finds, explains and repairs the error slices of a vision model.

RUN is the id of a run, or `latest`. Each verb takes --address, --json and --debug.
"""
_EPILOG = (
    "Exit codes: 0 well; 1 the run failed, or found what a gate forbids; 2 wrong usage or input; "
    "3 the server cannot be reached; 130 interrupted. "
    "Settings: HIBUG2_ADDRESS (localhost:50051), HIBUG2_TOKEN."
)

app = typer.Typer(
    help=_HELP, epilog=_EPILOG, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
)
dataset_app = typer.Typer(help="Datasets: which images, and which objects in them.", no_args_is_help=True)
scores_app = typer.Typer(help="Scores of models.", no_args_is_help=True)
app.add_typer(dataset_app, name="dataset")
app.add_typer(scores_app, name="scores")
app.add_typer(schema_app, name="schema")
app.add_typer(tagging_app, name="tagging")


class TaskName(StrEnum):
    classification = "classification"
    detection = "detection"
    pose = "pose"


class MetricName(StrEnum):
    accuracy = "accuracy"
    iou = "iou"
    oks = "oks"
    custom = "custom"


SUREST = "p_value"  # the order in which people are shown slices
DetachOption = Annotated[bool, typer.Option("--detach", help="Do not wait for the end.")]


@app.callback()
def main(
    ctx: typer.Context, address: AddressOption = None, as_json: JsonOption = False, debug: DebugOption = False
) -> None:
    ctx.obj = Session(address, as_json, debug)


@verb(dataset_app, "create")
def dataset_create(
    session: Session,
    name: Annotated[str, typer.Argument(metavar="NAME")],
    images: Annotated[
        Path, typer.Option("--images", metavar="FOLDER|MANIFEST", help="<class>/x.png, or a CSV/Parquet manifest.")
    ],
    task: Annotated[TaskName, typer.Option("--task")] = TaskName.classification,
) -> None:
    """Creates a dataset from a folder of images or a manifest.

    A folder holds <class>/x.png, or <split>/<class>/x.png with splits train, validation, pool, test. A manifest
    has the columns uri, label, split, id, and optionally left, top, width, height of a box; others are kept.
    """
    from hibug2 import messages, show

    if not images.exists():
        raise UserError("--images", f"there is no folder or file '{images}'")
    with session.client() as client:
        dataset = client.create_dataset(name, images, task.value)
    if session.json:
        session.document(messages.as_json(dataset))
    else:
        show.datasets([dataset], session.out)


@verb(dataset_app, "list")
def dataset_list(session: Session) -> None:
    """Lists the datasets."""
    from hibug2 import messages, show

    with session.client() as client:
        found = client.datasets()
    if session.json:
        session.document({"datasets": [messages.as_json(d) for d in found]})
    else:
        show.datasets(found, session.out)


@verb(dataset_app, "show")
def dataset_show(session: Session, dataset: DatasetArgument) -> None:
    """Shows a dataset and the models that have scores."""
    from hibug2 import messages, show

    with session.client() as client:
        found, models = client.dataset(dataset), client.models(dataset)
    if session.json:
        session.document({**messages.as_json(found), "models": [messages.as_json(m) for m in models]})
        return
    show.datasets([found], session.out)
    for model in models:
        line = f"model {model.name.rpartition('/')[2]}: {model.scored_count:,} scored, mean {model.mean_score:.3f}"
        session.out.print(Text(line))


@verb(dataset_app, "delete")
def dataset_delete(session: Session, dataset: DatasetArgument) -> None:
    """Deletes a dataset and everything made from it; the images stay."""
    with session.client() as client:
        client.delete_dataset(dataset)
    if session.json:
        session.document({"deleted": dataset})
    else:
        session.out.print(Text(f"deleted {dataset}"))


@verb(scores_app, "add")
def scores_add(
    session: Session,
    dataset: DatasetArgument,
    model: Annotated[str, typer.Argument(metavar="MODEL")],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="CSV or Parquet.")],
    metric: Annotated[MetricName | None, typer.Option("--metric", help="What the score is.")] = None,
) -> None:
    """Sets the scores of a model from a file with id and score, or id and predicted (label)."""
    from hibug2 import messages

    with session.client() as client:
        added = client.add_scores(dataset, model, file, metric.value if metric else None)
    if session.json:
        session.document(messages.as_json(added))
    else:
        session.out.print(Text(f"{added.name}: {added.scored_count:,} scored, mean {added.mean_score:.3f}"))


@verb(app, "run")
def run(
    session: Session,
    dataset: DatasetArgument,
    model: Annotated[str, typer.Option("--model", metavar="MODEL")],
    depth: Annotated[int, typer.Option("--depth", help="Most pairs of a slice.")] = 3,
    min_count: Annotated[int, typer.Option("--min-count", help="Fewest instances of a slice.")] = 10,
    margin: Annotated[float, typer.Option("--margin", help="How far below the overall mean.")] = 0.2,
    schema: Annotated[
        Path | None, typer.Option("--schema", metavar="FILE", help="Attributes and tags to use (YAML or JSON).")
    ] = None,
    budget: Annotated[
        int | None, typer.Option("--budget", help="Most pool instances to pick.", show_default="500")
    ] = None,
    seed: Annotated[int, typer.Option("--seed")] = 0,
    max_cost: MaxCostOption = None,
    detach: DetachOption = False,
) -> None:
    """Runs the whole pipeline for a model and shows the slices that are surest to be bad."""
    with session.client() as client:
        started = client.run(
            dataset,
            model,
            depth=depth,
            min_count=min_count,
            margin=margin,
            schema=schema,
            budget=budget,
            seed=seed,
            max_cost=max_cost,
            wait=False,
        )
        _follow(session, client, started, detach)


@verb(app, "watch")
def watch(session: Session, run: RunArgument) -> None:
    """Follows a run to its end."""
    with session.client() as client:
        _follow(session, client, client.get_run(run))


@verb(app, "resume")
def resume(session: Session, run: RunArgument, max_cost: MaxCostOption = None, detach: DetachOption = False) -> None:
    """Goes on with a run that failed, paused, was cancelled or lost its gateway; done steps are kept."""
    with session.client() as client:
        _follow(session, client, client.resume(run, max_cost=max_cost), detach)


@verb(app, "estimate")
def estimate(
    session: Session,
    dataset: DatasetArgument,
    schema: Annotated[str, typer.Option("--schema", metavar="SCHEMA", help="Id of a schema.")] = "",
) -> None:
    """Says what a run would ask of language models, before it is started."""
    from hibug2 import messages, show

    with session.client() as client:
        found = client.estimate(dataset, schema)
    if session.json:
        session.document(messages.as_json(found))
    else:
        show.estimate(found, session.out)


def _follow(session: Session, client: Client, started: Run, detach: bool = False) -> None:
    from hibug2 import messages, show
    from hibug2.v1 import types_pb2

    if detach:
        if session.json:
            session.document(messages.as_json(started))
        else:
            session.out.print(Text(started.name))
        return
    ended = _watched(session, client, started)
    if session.json:
        session.document(messages.as_json(ended))
    if ended.job.state != types_pb2.JOB_STATE_SUCCEEDED:
        raise RunStopped(ended)
    if session.json:
        return
    show.summary(ended, session.out)
    found = messages.rows(client.slices(ended, order_by=SUREST, limit=SHOWN // 2))
    show.slices(found, session.out, more=ended.summary.error_slice_count > len(found))
    name = ended.name.removeprefix("runs/")
    session.err.print(Text(f"next: hibug2 slices|families|predict|repair|report {name}", "dim"))


def _watched(session: Session, client: Client, started: Run) -> Run:
    """The last snapshot of a run, its progress shown on the way."""
    from hibug2 import progress

    session.err.print(Text(f"{started.name}  {started.dataset} {started.model.rpartition('/')[2]}"), soft_wrap=True)
    try:
        return progress.follow(client.watch(started), session.err) or started
    except KeyboardInterrupt:
        name = started.name.removeprefix("runs/")
        session.err.print(Text(f"The run goes on: hibug2 watch {name} follows it, hibug2 cancel {name} stops it."))
        raise


@verb(app, "runs")
def runs(
    session: Session,
    dataset: Annotated[str | None, typer.Option("--dataset", help="Only of this dataset.")] = None,
) -> None:
    """Lists the runs, the newest first."""
    from hibug2 import messages, show

    with session.client() as client:
        found = client.runs(dataset)
    if session.json:
        session.document({"runs": [messages.as_json(r) for r in found]})
    else:
        show.runs(found, session.out)


@verb(app, "cancel")
def cancel(session: Session, run: RunArgument) -> None:
    """Stops a run; done steps are kept."""
    from hibug2 import messages, show

    with session.client() as client:
        cancelled = client.cancel(run)
    if session.json:
        session.document(messages.as_json(cancelled))
    else:
        show.runs([cancelled], session.out)


@verb(app, "slices")
def slices(
    session: Session,
    run: RunArgument,
    filter_: Annotated[str | None, typer.Option("--filter", help='For instance: count >= 20 AND tag = "dark"')] = None,
    order_by: Annotated[
        str, typer.Option("--order-by", help='For instance: rank (the lowest mean first), or "error_share desc"')
    ] = SUREST,
    limit: LimitOption = None,
) -> None:
    """Shows the error slices of a run, the surest to be bad first: among the lowest means many are luck."""
    from hibug2 import messages, show

    with session.client() as client:
        found = client.get_run(run)
        if session.json:
            rows = messages.rows(client.slices(found, filter=filter_, order_by=order_by, limit=limit))
        else:
            # One more than is shown tells whether there are more.
            most = limit or SHOWN
            rows = messages.rows(client.slices(found, filter=filter_, order_by=order_by, limit=most + 1))
    if session.json:
        session.document({"run": found.name, "overall_mean": found.summary.overall_mean, "slices": rows})
        return
    order = "the surest to be bad first" if order_by == SUREST else f"by {order_by}"
    session.out.print(Text(f"{found.name}: overall mean {found.summary.overall_mean:.3f}; {order}"))
    if filter_ and not rows:
        session.out.print(Text(f"No error slice passes the filter {filter_}"))
        return
    show.slices(rows[:most], session.out, more=len(rows) > most)


@verb(app, "families")
def families(session: Session, run: RunArgument, limit: LimitOption = None) -> None:
    """Shows the error slices grouped by their instances, those that cover the errors soonest first."""
    from hibug2 import messages, show

    with session.client() as client:
        found = client.get_run(run)
        # One more than is shown tells whether there are more.
        most = limit if session.json else (limit or SHOWN) + 1
        rows = messages.rows(client.families(found, limit=most))
    if session.json:
        session.document({"run": found.name, "overall_mean": found.summary.overall_mean, "families": rows})
    else:
        shown = rows[: limit or SHOWN]
        show.families(shown, session.out, more=len(rows) > len(shown))


@verb(app, "confirm")
def confirm(
    session: Session,
    run: RunArgument,
    seed: Annotated[int, typer.Option("--seed", help="Which halves.")] = 0,
    limit: LimitOption = None,
) -> None:
    """Finds error slices on one half of the instances and tests them on the other, which was not looked at."""
    from hibug2 import messages, show

    with session.client() as client:
        found = client.get_run(run)
        most = limit if session.json else (limit or SHOWN) + 1
        rows = messages.rows(client.confirm(found, seed=seed, limit=most))
    if session.json:
        session.document({"run": found.name, "slices": rows})
    else:
        shown = rows[: limit or SHOWN]
        show.confirmed(shown, session.out, more=len(rows) > len(shown))


@verb(app, "ask")
def ask(
    session: Session,
    run: RunArgument,
    terms: Annotated[
        list[str], typer.Argument(metavar='"ATTRIBUTE: TAG[, TAG…]"…', help="All must hold; of its tags any will do.")
    ],
) -> None:
    """Tells how the model does on a slice that is typed in: hibug2 ask latest "pose: sitting, lying" "color: white"."""
    from hibug2 import show

    tags = typed.any_of(terms, "terms")
    with session.client() as client:
        found = client.get_run(run)
        row = client.hypothesis(found, tags)
    asked = [{"attribute": attribute, "tags": wanted} for attribute, wanted in tags.items()]
    if session.json:
        overall = found.summary.overall_mean
        session.document({"run": found.name, "overall_mean": overall, "terms": asked, **row})
    else:
        show.hypothesis(asked, row, found.summary.overall_mean, session.out)


@verb(app, "compare")
def compare(
    session: Session,
    runs: Annotated[list[str], typer.Argument(metavar="RUN RUN…", help="Runs of one dataset with the same slices.")],
    limit: Annotated[int, typer.Option("--limit", min=1, max=1000, help="Most slices of each kind.")] = SHOWN // 2,
) -> None:
    """Shows models side by side: how much their worst slices agree; of two, what is worse and what has changed."""
    from hibug2 import messages, show

    with session.client() as client:
        found = client.compare_models(runs, limit=limit)
    if session.json:
        session.document(
            {
                "runs": [
                    {"name": r.name, "model": r.model, "overall_mean": r.summary.overall_mean} for r in found.runs
                ],
                "average_overlap": messages.plain(found.average_overlap),
                "overlaps": messages.rows(found.overlaps),
                "changes": found.changes,
                "worse": messages.rows(found.worse),
                "versions": messages.rows(found.versions),
            }
        )
    else:
        show.comparison(found, session.out)


@verb(app, "gate")
def gate(
    session: Session,
    baseline: Annotated[str, typer.Option("--baseline", metavar="MODEL", help="In use; a model, or runs/RUN.")],
    candidate: Annotated[
        str, typer.Option("--candidate", metavar="MODEL", help="To be released; a model, or runs/RUN.")
    ],
    max_drop: Annotated[
        float, typer.Option("--max-drop", min=0, max=1, help="Largest fall of a slice's mean that passes.")
    ],
    dataset: Annotated[
        str | None, typer.Option("--dataset", help="Where both models have scores.", show_default="the only one")
    ] = None,
    overall_drop: Annotated[
        float | None,
        typer.Option("--overall-drop", min=0, max=1, help="The same, overall.", show_default="that of --max-drop"),
    ] = None,
    significance: Annotated[
        float, typer.Option("--significance", help="The chance to stop a candidate that is nowhere worse.")
    ] = 0.05,
    threshold: Annotated[
        list[str] | None,
        typer.Option(
            "--threshold",
            metavar='"ATTRIBUTE: TAG[, ATTRIBUTE: TAG…]=DROP"',
            help="The limit of one slice; may be repeated.",
        ),
    ] = None,
    severity: Annotated[
        list[str] | None,
        typer.Option(
            "--severity",
            metavar='"NAME: BELOW=DROP"',
            help="The limit of slices that lie BELOW or more under the overall mean; may be repeated.",
        ),
    ] = None,
    every_slice: Annotated[
        bool, typer.Option("--every-slice", help="Look at all slices, not only at error slices.")
    ] = False,
    depth: Annotated[int | None, typer.Option("--depth", help="Most pairs of a slice.", show_default="any; 3")] = None,
    min_count: Annotated[
        int | None, typer.Option("--min-count", help="Fewest instances of a slice.", show_default="any; 10")
    ] = None,
    margin: Annotated[
        float | None, typer.Option("--margin", help="How far below the overall mean.", show_default="any; 0.2")
    ] = None,
) -> None:
    """Tells whether a new version may be released: no slice fell by more than allowed. Exit code 1 when one did.

    Takes the newest runs of both models with the same slices and with today's scores, and starts what is missing.
    """
    from hibug2 import messages, show
    from hibug2.v1 import types_pb2

    thresholds = [typed.threshold(text, "--threshold") for text in threshold or ()]
    severities = [typed.severity(text, "--severity") for text in severity or ()]
    with session.client() as client:

        def start(dataset: str, model: str, **parameters: Any) -> Run:
            ended = _watched(session, client, client.run(dataset, model, wait=False, **parameters))
            if ended.job.state != types_pb2.JOB_STATE_SUCCEEDED:
                raise RunStopped(ended)
            return ended

        verdict = client.gate(
            baseline,
            candidate,
            max_drop=max_drop,
            max_overall_drop=overall_drop,
            thresholds=thresholds,
            severities=severities,
            every_slice=every_slice,
            significance=significance,
            dataset=dataset,
            depth=depth,
            min_count=min_count,
            margin=margin,
            start=start,
        )
    old, new = verdict.baseline, verdict.candidate
    if session.json:
        session.document(
            {
                "passed": verdict.passed,
                "summary": verdict.summary,
                "baseline": {"model": old.model, "run": old.name},
                "candidate": {"model": new.model, "run": new.name},
                "compared_slice_count": verdict.compared_slice_count,
                "judged_slice_count": verdict.judged_slice_count,
                "violations": messages.rows(verdict.violations),
            }
        )
    else:
        show.verdict(verdict, session.out)
    if not verdict.passed:
        raise typer.Exit(FAILED)


verb(app, "predict")(predict)


verb(app, "repair")(repair)


@verb(app, "report")
def report(
    session: Session,
    run: RunArgument,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Where to.", show_default="hibug2-RUN.html")
    ] = None,
    compare: Annotated[
        list[str] | None,
        typer.Option(
            "--compare",
            metavar="MODEL=METHOD",
            help="A model that was trained with the picks of a method (lowest_mean, random); may be repeated.",
        ),
    ] = None,
) -> None:
    """Writes the report of a run, one HTML file."""
    compared = typed.trained_with(compare or (), "--compare", "MODEL=METHOD")
    with session.client() as client:
        found = client.get_run(run)
        html = client.report(found, compared)
    target = out or Path(f"hibug2-{found.name.rpartition('/')[2]}.html")
    with written(target) as part:
        part.write_bytes(html)
    if session.json:
        session.document({"run": found.name, "report": str(target.absolute()), "bytes": len(html)})
    else:
        session.out.print(Text(str(target.absolute())), soft_wrap=True)


@verb(app, "enumerate")
def enumerate_table(
    session: Session,
    table: Annotated[Path, typer.Argument(metavar="TABLE", help="CSV or Parquet.")],
    scores: Annotated[str, typer.Option("--scores", metavar="COL[,COL…]", help="The columns that hold scores.")],
    out: Annotated[Path, typer.Option("--out", metavar="SLICES.parquet")],
    depth: Annotated[int, typer.Option("--depth", help="Most pairs of a slice.")] = 3,
    min_count: Annotated[int, typer.Option("--min-count", help="Fewest rows of a slice.")] = 10,
    must_hold: Annotated[
        str, typer.Option("--must-hold", metavar="COL", help="Only slices with a pair of this column.")
    ] = "",
    errors: Annotated[
        str, typer.Option("--errors", metavar="COL", help="Only error slices of this score, the worst first.")
    ] = "",
    margin: Annotated[
        float, typer.Option("--margin", min=0, max=1, help="With --errors: how far below the overall mean.")
    ] = 0.2,
    top: Annotated[int, typer.Option("--top", min=0, help="With --errors: at most so many; 0 for all.")] = 0,
) -> None:
    """Writes every slice of any table: a column that is no score is an attribute, a value a tag, empty unknown.

    Needs no dataset. Without a gateway, a server is started for the call where the platform is installed.
    """
    import pyarrow.parquet

    from hibug2 import messages
    from hibug2.client import Client, ErrorRule
    from hibug2.embedded import enumeration_address

    if not errors:
        session.refuse(("--margin", "--top"), "goes with --errors; name a score there, or leave it out")
    columns = [name.strip() for name in scores.split(",") if name.strip()]
    if not columns:
        raise UserError("--scores", "names no column")
    rule = ErrorRule(errors, margin, top) if errors else None
    found = 0
    with (
        written(out) as part,
        pyarrow.parquet.ParquetWriter(part, messages.enumeration_schema(columns, judged=rule is not None)) as writer,
        enumeration_address(session.address) as address,
        Client(address) as client,
    ):
        for batch in client.enumerate_batches(table, columns, depth, min_count, must_hold=must_hold, errors=rule):
            writer.write_batch(batch)
            found += batch.num_rows
    if session.json:
        session.document({"slice_count": found, "out": str(out.absolute())})
    else:
        session.out.print(Text(f"{found:,} slices in {out}"), soft_wrap=True)
