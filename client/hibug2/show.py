"""Results as tables that a person can read."""

from __future__ import annotations

import datetime as dt
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from google.protobuf.timestamp_pb2 import Timestamp

    from hibug2.v1.dataset_pb2 import Dataset
    from hibug2.v1.run_pb2 import Run
    from hibug2.v1.types_pb2 import Schema

_BAR_CELLS = 10
Row = Mapping[str, Any]


def _table(*columns: str, right: Sequence[str] = ()) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", no_wrap=column in right)
    return table


def _tags(tags: Sequence[Mapping[str, str]]) -> Text:
    text = Text()
    for i, pair in enumerate(tags):
        text.append(" · " if i else "", style="dim")
        text.append(f"{pair['attribute']}: ", style="dim")
        text.append(pair["tag"])
    return text


def _number(value: float | None, digits: int = 3) -> Text:
    return Text("–" if value is None else f"{value:.{digits}f}")


def _bar(value: float, largest: float, console: Console) -> Text:
    full = "█" if console.encoding.startswith("utf") else "#"
    share = value / largest if largest > 0 else 0.0
    cells = min(_BAR_CELLS, max(1, round(_BAR_CELLS * share)))
    style = "red" if share > 2 / 3 else "dark_orange" if share > 1 / 3 else "yellow"
    return Text.assemble((full * cells, style), f" {value:.3f}")


def slices(rows: Sequence[Row], console: Console, *, more: bool = False) -> None:
    """Error slices; `more` says that there are others."""
    if not rows:
        console.print("No error slices.")
        return
    largest = max((row["drop"] or 0.0 for row in rows), default=0.0)
    table = _table("rank", "slice", "count", "mean", "drop", "errors", right=("rank", "count", "mean", "errors"))
    for row in rows:
        table.add_row(
            Text(str(row["rank"] or "")),
            _tags(row["tags"]),
            Text(f"{row['count']:,}"),
            _number(row["mean"]),
            Text("–") if row["drop"] is None else _bar(row["drop"], largest, console),
            Text("–" if row["error_share"] is None else f"{row['error_share']:.1%}"),
        )
    console.print(table)
    _say_more(more, console)


def predicted(rows: Sequence[Row], console: Console, *, more: bool = False) -> None:
    """Predicted slices and the tag that was replaced in each."""
    if not rows:
        console.print("No predicted slices.")
        return
    right = ("rank", "score", "like", "from rank")
    table = _table("rank", "slice", "score", "replaced", "like", "from rank", right=right)
    for row in rows:
        table.add_row(
            Text(str(row["rank"])),
            _tags(row["tags"]),
            _number(row["score"]),
            _tags([row["replaced"]] if row["replaced"] else []),
            _number(row["similarity"], 2),
            Text(", ".join(str(r) for r in row["origin_ranks"][:3])),
        )
    console.print(table)
    _say_more(more, console)


def picks(rows: Sequence[Row], console: Console, *, limit: int) -> None:
    """The picks counted by the slice that asked for them, then the first ones by name."""
    if not rows:
        console.print("No picks.")
        return
    asked = Counter((row["slice_rank"], row["slice_mean"]) for row in rows)
    table = _table("slice rank", "mean", "picks", right=("slice rank", "mean", "picks"))
    for (rank, mean), count in sorted(asked.items(), key=lambda item: item[0][0])[:limit]:
        table.add_row(Text(str(rank) if rank else "random"), _number(mean if rank else None), Text(f"{count:,}"))
    console.print(table)
    _say_more(len(asked) > limit, console, " slices")
    console.print()
    for row in rows[:limit]:
        console.print(Text(row["image_uri"]), soft_wrap=True)
    _say_more(len(rows) > limit, console, " images")


def _say_more(more: bool, console: Console, what: str = "") -> None:
    if more:
        console.print(Text(f"… and more{what} (--limit, or --json for all)", "dim"))


def datasets(found: Iterable[Dataset], console: Console) -> None:
    """A line a dataset."""
    from hibug2 import messages
    from hibug2.v1 import types_pb2

    table = _table("dataset", "task", "instances", "splits", "classes", "created", right=("instances", "classes"))
    for dataset in found:
        table.add_row(
            Text(dataset.name.removeprefix("datasets/")),
            messages.word(types_pb2.Task.DESCRIPTOR, dataset.task),
            f"{dataset.instance_count:,}",
            Text(", ".join(f"{s.split} {s.instance_count:,}" for s in dataset.splits)),
            f"{len(dataset.main_objects):,}",
            _time(dataset.create_time),
        )
    console.print(table if table.row_count else "No datasets.")


def runs(found: Iterable[Run], console: Console) -> None:
    """A line a run."""
    from hibug2 import messages
    from hibug2.v1 import types_pb2

    right = ("mean", "error slices")
    table = _table("run", "dataset", "model", "state", "mean", "error slices", "created", right=right)
    for run in found:
        state = messages.word(types_pb2.JobState.DESCRIPTOR, run.job.state)
        ended = run.HasField("summary")
        table.add_row(
            Text(run.name.removeprefix("runs/")),
            Text(run.dataset.removeprefix("datasets/")),
            Text(run.model.rpartition("/")[2]),
            Text(state, {"succeeded": "green", "failed": "red"}.get(state, "")),
            _number(run.summary.overall_mean if ended else None),
            f"{run.summary.error_slice_count:,}" if ended else "–",
            _time(run.job.create_time),
        )
    console.print(table if table.row_count else "No runs.")


def summary(run: Run, console: Console) -> None:
    """What a run found, in two lines."""
    s = run.summary
    console.print(
        Text.assemble(
            (f"{s.error_slice_count:,} error slices", "bold"),
            f" of {s.slice_count:,} slices over {s.instance_count:,} instances; overall mean {s.overall_mean:.3f}",
        ),
        soft_wrap=True,
    )
    console.print(f"{s.predicted_slice_count:,} predicted slices, {s.pick_count:,} picks", highlight=False)


def schema(found: Schema, console: Console) -> None:
    """The attributes of a schema and their tags."""
    from hibug2 import messages
    from hibug2.v1 import types_pb2

    console.print(Text(found.name, "bold"))
    table = _table("attribute", "category", "tagger", "tags")
    for attribute in found.attributes:
        table.add_row(
            Text(attribute.attribute),
            messages.word(types_pb2.Category.DESCRIPTOR, attribute.category),
            messages.word(types_pb2.Tagger.DESCRIPTOR, attribute.tagger),
            Text(", ".join(attribute.tags)),
        )
    console.print(table)


def _time(stamp: Timestamp) -> str:
    return stamp.ToDatetime(dt.UTC).astimezone().strftime("%Y-%m-%d %H:%M") if stamp.seconds else "–"
