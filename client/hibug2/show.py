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

    from hibug2.gate import Verdict
    from hibug2.insight import Comparison
    from hibug2.v1.dataset_pb2 import Dataset
    from hibug2.v1.run_pb2 import Run, RunSummary
    from hibug2.v1.types_pb2 import Schema

_BAR_CELLS = 10
_REASONS = 20
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


def _chance(value: float | None) -> Text:
    return Text("–" if value is None else "<0.001" if value < 0.001 else f"{value:.3f}")


def _share(value: float | None) -> Text:
    return Text("–" if value is None else f"{value:.1%}")


def slices(rows: Sequence[Row], console: Console, *, more: bool = False) -> None:
    """Error slices; `more` says that there are others."""
    if not rows:
        console.print("No error slices.")
        return
    tested = any(row["q_value"] is not None for row in rows)
    grouped = any(row["family"] for row in rows)
    names = ["rank", "slice", "count", "mean", "drop", "errors", *["q"] * tested, *["family"] * grouped]
    largest = max((row["drop"] or 0.0 for row in rows), default=0.0)
    table = _table(*names, right=("rank", "count", "mean", "errors", "q", "family"))
    for row in rows:
        cells = [
            Text(str(row["rank"] or "")),
            _tags(row["tags"]),
            Text(f"{row['count']:,}"),
            _number(row["mean"]),
            Text("–") if row["drop"] is None else _bar(row["drop"], largest, console),
            _share(row["error_share"]),
        ]
        cells += [_chance(row["q_value"])] * tested + [Text(str(row["family"] or "–"))] * grouped
        table.add_row(*cells)
    console.print(table)
    _say_more(more, console)


def families(rows: Sequence[Row], console: Console, *, more: bool = False) -> None:
    """Families of error slices, each under the slice that stands for it; `covered` adds up from the top."""
    if not rows:
        console.print("No error slices.")
        return
    largest = max((row["drop"] or 0.0 for row in rows), default=0.0)
    right = ("rank", "count", "mean", "q", "errors", "covered", "slices")
    table = _table("rank", "slice", "count", "mean", "drop", "q", "errors", "covered", "slices", right=right)
    for row in rows:
        table.add_row(
            Text(str(row["rank"])),
            _tags(row["tags"]),
            Text(f"{row['count']:,}"),
            _number(row["mean"]),
            Text("–") if row["drop"] is None else _bar(row["drop"], largest, console),
            _chance(row["q_value"]),
            _share(row["error_share"]),
            # A family that adds nothing has no place in the cover.
            _share(row["covered_share"] if row["cover_rank"] else None),
            Text(f"{len(row['member_ranks']):,}"),
        )
    console.print(table)
    _say_more(more, console)


def confirmed(rows: Sequence[Row], console: Console, *, more: bool = False) -> None:
    """Slices found on one half of the instances, and what the other half says of them."""
    if not rows:
        console.print("No error slices on the half that was searched.")
        return
    right = ("found", "mean", "held", "held mean", "q")
    table = _table("slice", "found", "mean", "held", "held mean", "q", right=right)
    for row in rows:
        table.add_row(
            _tags(row["tags"]),
            Text(f"{row['found_count']:,}"),
            _number(row["found_mean"]),
            Text(f"{row['held_count']:,}"),
            _number(row["held_mean"]),
            _chance(row["q_value"]),
        )
    console.print(table)
    _say_more(more, console)


def hypothesis(terms: Sequence[Row], row: Row, overall_mean: float, console: Console) -> None:
    """What the scores say of a slice that was typed in."""
    console.print(_tags([{"attribute": t["attribute"], "tag": " or ".join(t["tags"])} for t in terms]))
    console.print(Text(f"{row['count']:,} instances, {row['scored_count']:,} scored"))
    if row["mean"] is None:
        return
    side = "below" if row["drop"] >= 0 else "above"
    console.print(
        Text(
            f"mean {row['mean']:.3f} (95%: {row['interval_low']:.3f} to {row['interval_high']:.3f}), "
            f"{abs(row['drop']):.3f} {side} the overall mean {overall_mean:.3f}; {row['error_share']:.1%} of all errors"
        ),
        soft_wrap=True,
    )
    if row["p_value"] is not None:
        chance = "< 0.001" if row["p_value"] < 0.001 else f"= {row['p_value']:.3f}"
        console.print(Text(f"p {chance}: how often a random group of this size does as badly"), soft_wrap=True)


def comparison(found: Comparison, console: Console) -> None:
    """How far models agree, and for two, where the second is worse and what has changed."""
    from hibug2 import messages

    label = _labels(found)
    table = _table("run", "model", "mean", "error slices", right=("mean", "error slices"))
    for run in found.runs:
        table.add_row(
            Text(run.name.removeprefix("runs/")),
            Text(run.model.rpartition("/")[2]),
            _number(run.summary.overall_mean),
            Text(f"{run.summary.error_slice_count:,}"),
        )
    console.print(table)
    console.print()
    console.print(Text("The worst tenth of the slices that two models share:"))
    for row in messages.rows(found.overlaps):
        console.print(Text(f"  {row['share']:.0%}  {label[row['first']]} and {label[row['second']]}"), soft_wrap=True)
    if len(found.runs) > 2:
        console.print(Text(f"  {found.average_overlap:.0%}  on average"))
        return
    second = label[found.runs[1].name]
    console.print()
    if found.worse.num_rows:
        console.print(Text(f"Where {second} is worse, beyond the overall difference:", "bold"))
        _differences(messages.rows(found.worse), console, label, found, change=False)
    else:
        console.print(Text(f"No slice on which {second} is worse beyond the overall difference."))
    console.print()
    counts = ", ".join(f"{count:,} {change}" for change, count in found.changes.items())
    console.print(Text(f"Error slices: {counts or 'none in either'}", "bold"))
    if found.versions.num_rows:
        _differences(messages.rows(found.versions), console, label, found, change=True)


def _labels(found: Comparison) -> dict[str, str]:
    """Runs by the name of their model, with their own where two runs have one model."""
    models = Counter(run.model for run in found.runs)
    return {
        run.name: run.model.rpartition("/")[2] + (f" ({run.name})" if models[run.model] > 1 else "")
        for run in found.runs
    }


def _differences(
    rows: Sequence[Row], console: Console, label: Mapping[str, str], found: Comparison, *, change: bool
) -> None:
    first, second = (label[run.name] for run in found.runs)
    tested = any(row["q_value"] is not None for row in rows)
    names = [*["change"] * change, "slice", "count", first, second, "difference", *["q"] * tested]
    table = _table(*names, right=("count", first, second, "difference", "q"))
    for row in rows:
        cells = [
            _tags(row["tags"]),
            Text(f"{row['count']:,}"),
            _number(row["first_mean"]),
            _number(row["second_mean"]),
            Text(f"{row['difference']:+.3f}"),
        ]
        table.add_row(*[Text(row["change"])] * change, *cells, *[_chance(row["q_value"])] * tested)
    console.print(table)


def verdict(found: Verdict, console: Console) -> None:
    """What a gate says, a line a reason, so that a build's log shows it whole."""
    from hibug2 import messages

    old, new = (run.model.rpartition("/")[2] for run in (found.baseline, found.candidate))
    word, style = ("passed", "bold green") if found.passed else ("failed", "bold red")
    dataset = found.candidate.dataset.removeprefix("datasets/")
    facts = f": {new} in place of {old} on {dataset} ({found.candidate.name} against {found.baseline.name})"
    console.print(Text.assemble((f"gate {word}", style), facts), soft_wrap=True)
    reasons = [row["reason"] for row in messages.rows(found.violations)]
    for reason in reasons[:_REASONS] or [found.summary]:
        console.print(Text(f"- {reason}"), soft_wrap=True)
    if len(reasons) > _REASONS:
        console.print(Text(f"… and {len(reasons) - _REASONS:,} more (--json for all)", "dim"))
    if reasons:
        judged, compared = found.judged_slice_count, found.compared_slice_count
        console.print(Text(f"{judged:,} of {compared:,} slices were held to a limit"))


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
            _belief(s),
            f" of {s.slice_count:,} slices over {s.instance_count:,} instances; overall mean {s.overall_mean:.3f}",
        ),
        soft_wrap=True,
    )
    console.print(f"{s.predicted_slice_count:,} predicted slices, {s.pick_count:,} picks", highlight=False)


def _belief(s: RunSummary) -> str:
    """How many of the error slices are to be believed, and in how many families they are."""
    # A ranking without tests has no families either.
    if not s.family_count:
        return ""
    chance = ""
    if s.HasField("expected_by_chance"):
        x = s.expected_by_chance
        chance = f", about {x:,.0f} by chance" if x >= 1 or x == 0 else f", about {x:.1g} by chance"
    families = "family" if s.family_count == 1 else "families"
    return f" ({s.significant_slice_count:,} at q ≤ 0.05{chance}) in {s.family_count:,} {families},"


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
