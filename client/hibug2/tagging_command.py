"""`hibug2 tagging`: what could not be tagged, another try for it, how much work there is, and how good the tags are."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from hibug2.session import SHOWN, LimitOption, Session, verb

tagging_app = typer.Typer(
    help="Tagging: what went wrong, how much there is to do, how good the tags are.", no_args_is_help=True
)
ParentArgument = Annotated[
    str,
    typer.Argument(
        metavar="[DATASET|TAGGING]",
        help="A dataset, or a tagging named datasets/…/taggings/….",
        show_default="all datasets",
    ),
]


@verb(tagging_app, "dead")
def dead(session: Session, parent: ParentArgument = "", limit: LimitOption = None) -> None:
    """Shows the instances that could not be tagged, and why."""
    from hibug2 import messages

    with session.client() as client:
        rows = messages.rows(client.dead_items(parent))
    if session.json:
        session.document({"dead_items": rows[:limit]})
        return
    if not rows:
        session.out.print(Text("nothing is dead"))
        return
    table = Table("instance", "reason", "tagging", box=None, header_style="bold", pad_edge=False)
    for row in rows[: limit or SHOWN]:
        tagging = row["tagging"].removeprefix("datasets/")
        table.add_row(Text(row["instance_id"]), Text(row["reason"]), Text(tagging, "dim"))
    session.out.print(table)
    if (more := len(rows) - (limit or SHOWN)) > 0:
        session.out.print(Text(f"… and {more:,} more; --limit shows them", "dim"))
    session.err.print(Text("when the cause is mended: hibug2 tagging redrive", "dim"))


@verb(tagging_app, "redrive")
def redrive(session: Session, parent: ParentArgument = "") -> None:
    """Tries what could not be tagged once more; runs that start from now on use what comes of it."""
    from hibug2 import messages

    with session.client() as client:
        answer = client.redrive(parent)
    if session.json:
        jobs = [messages.as_json(job) for job in answer.jobs]
        session.document({"redriven_count": answer.redriven_count, "jobs": jobs})
        return
    session.out.print(Text(f"{answer.redriven_count:,} tried again"))
    for job in answer.jobs:
        session.out.print(Text(job.name))


@verb(tagging_app, "quality")
def quality(
    session: Session,
    parent: Annotated[
        str, typer.Argument(metavar="DATASET|TAGGING", help="A dataset, or a tagging named datasets/…/taggings/….")
    ],
    check: Annotated[bool, typer.Option("--check", help="Tag a sample once more; costs a call an instance.")] = False,
    sample: Annotated[int, typer.Option("--sample", min=1, help="With --check: how many instances.")] = 100,
    seed: Annotated[int, typer.Option("--seed", help="With --check: which ones.")] = 0,
    max_cost: Annotated[
        float | None,
        typer.Option("--max-cost", help="With --check: most to spend, in the currency of the model's price."),
    ] = None,
) -> None:
    """Shows how far the tags of each attribute can be trusted, as the last check found, or a new one with --check.

    Slices of doubtful attributes are marked as such; --filter "doubtful = 0" leaves them out.
    """
    from hibug2 import messages, progress, show

    if not check:
        session.refuse(("--sample", "--seed", "--max-cost"), "goes with --check; add that, or leave it out")
    with session.client() as client:
        if check:
            with progress.of_job(session.err) as tell:
                found = client.check_tags(parent, sample_count=sample, seed=seed, budget=max_cost, on_progress=tell)
        else:
            found = client.tag_quality(parent)
    if session.json:
        session.document(messages.as_json(found))
    else:
        show.quality(found, session.out)


@verb(tagging_app, "backlog")
def backlog(session: Session) -> None:
    """Shows how many work items wait and are being done, of all teams."""
    with session.client() as client:
        found = client.backlog()
    if session.json:
        counts = {"lag_count": found.lag_count, "pending_count": found.pending_count}
        session.document({**counts, "waiting_count": found.waiting_count})
        return
    session.out.print(
        Text(
            f"{found.pending_count:,} in hand, {found.lag_count:,} in the queue, "
            f"{found.waiting_count:,} held back until their team has room in it"
        )
    )
