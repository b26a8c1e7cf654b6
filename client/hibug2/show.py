"""Results as tables that a person can read."""

from __future__ import annotations

import datetime as dt
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from google.protobuf.timestamp_pb2 import Timestamp

    from hibug2.gate import Verdict
    from hibug2.insight import Comparison
    from hibug2.v1.dataset_pb2 import Dataset
    from hibug2.v1.run_pb2 import EstimateRunResponse, Run, RunSummary
    from hibug2.v1.tagging_pb2 import TagQuality
    from hibug2.v1.types_pb2 import Cost, Schema

_BAR_CELLS = 10
_REASONS = 20
Row = Mapping[str, Any]


def _table(*columns: str, right: Sequence[str] = ()) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", no_wrap=column in right)
    return table


def _tags(tags: Sequence[Mapping[str, str]], doubtful: Sequence[str] | None = ()) -> Text:
    text = Text()
    for i, pair in enumerate(tags):
        text.append(" · " if i else "", style="dim")
        text.append(f"{pair['attribute']}: ", style="dim")
        text.append(pair["tag"])
        if pair["attribute"] in (doubtful or ()):
            text.append(" (doubtful)", style="yellow")
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
            _tags(row["tags"], row.get("doubtful")),
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
            _tags(row["tags"], row.get("doubtful")),
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
            _tags(row["tags"], row.get("doubtful")),
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
            _tags(row["tags"], row.get("doubtful")),
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
    reasons = [row["reason"] + _doubts(row["doubtful"]) for row in messages.rows(found.violations)]
    for reason in reasons[:_REASONS] or [found.summary]:
        console.print(Text(f"- {reason}"), soft_wrap=True)
    if len(reasons) > _REASONS:
        console.print(Text(f"… and {len(reasons) - _REASONS:,} more (--json for all)", "dim"))
    if reasons:
        judged, compared = found.judged_slice_count, found.compared_slice_count
        console.print(Text(f"{judged:,} of {compared:,} slices were held to a limit"))


def predicted(rows: Sequence[Row], console: Console, *, more: bool = False) -> None:
    """Predicted slices of one method with what they come from, or where they were verified what came of them."""
    if not rows:
        console.print("No predicted slices.")
        return
    kinds: dict[str, Callable[[Row], Text]]
    if "is_error_slice" in rows[0]:
        kinds = {
            "count": lambda row: Text(f"{row['scored_count']:,}"),
            "mean": lambda row: _number(row["mean"]),
            "95%": lambda row: _interval(row["interval_low"], row["interval_high"]),
            "drop": lambda row: _number(row["drop"]),
            "error": lambda row: Text("yes" if row["is_error_slice"] else ""),
        }
    elif rows[0]["method"] == "tag_substitution":
        kinds = {
            "replaced": lambda row: _tags([row["replaced"]] if row["replaced"] else []),
            "like": lambda row: _number(row["similarity"], 2),
            "from rank": lambda row: Text(", ".join(str(r) for r in row["origin_ranks"][:3])),
        }
    elif rows[0]["method"] == "instruction":
        kinds = {"taken for": lambda row: Text(row["target"] or "")}
    else:
        kinds = {"expected": lambda row: _number(row["expected_mean"])}
    right = ("rank", "score", "like", "from rank", "expected", "seen", "count", "mean", "95%", "drop")
    table = _table("rank", "slice", "score", *kinds, *["seen"] * ("count" not in kinds), right=right)
    for row in rows:
        cells = [Text(str(row["rank"])), _tags(row["tags"], row.get("doubtful")), _number(row["score"])]
        cells += [cell(row) for cell in kinds.values()]
        cells += [Text("–" if row["known_count"] is None else str(row["known_count"]))] * ("count" not in kinds)
        table.add_row(*cells)
    console.print(table)
    _say_more(more, console)


def verified(rows: Sequence[Row], console: Console) -> None:
    """How far each method's predictions lie below the overall mean, beside random combinations that were unseen too."""
    right = ("pairs", "predicted", "verified", "drop", "95%", "errors", "random", "random drop", "random errors")
    table = _table("method", *right, right=right)
    for row in rows:
        table.add_row(
            Text(row["method"]),
            Text(", ".join(str(n) for n in row["pair_counts"])),
            Text(f"{row['predicted_count']:,}"),
            Text(f"{row['verified_count']:,}"),
            _number(row["verified_mean_drop"]),
            _interval(row["verified_interval_low"], row["verified_interval_high"]),
            _share(row["verified_error_slice_share"]),
            Text(f"{row['base_count']:,}"),
            _number(row["base_mean_drop"]),
            _share(row["base_error_slice_share"]),
        )
    console.print(table)


def _interval(low: float | None, high: float | None) -> Text:
    return Text("–" if low is None or high is None else f"{low:.2f} … {high:.2f}")


def picks(rows: Sequence[Row], console: Console, *, limit: int) -> None:
    """The picks counted by the slice that asked for them, then the first ones by name."""
    if not rows:
        console.print("No picks.")
        return
    asked = Counter((row["slice_rank"], row["slice_mean"]) for row in rows)
    tags_of = {row["slice_rank"]: row["tags"] for row in rows}
    table = _table("slice rank", "mean", "picks", "slice", right=("slice rank", "mean", "picks"))
    for (rank, mean), count in sorted(asked.items(), key=lambda item: item[0][0])[:limit]:
        cells = [Text(str(rank) if rank else "none"), _number(mean if rank else None), Text(f"{count:,}")]
        table.add_row(*cells, _tags(tags_of[rank]))
    console.print(table)
    _say_more(len(asked) > limit, console, " slices")
    console.print()
    for row in rows[:limit]:
        console.print(Text(row["image_uri"]), soft_wrap=True)
    _say_more(len(rows) > limit, console, " images")


def picked_methods(rows: Sequence[Row], console: Console) -> None:
    """What each method of a selection picked, beside its own."""
    table = _table("method", "picks", "same as first", "in an error slice", right=("picks", "same as first"))
    for row in rows:
        counts = (row["pick_count"], row["shared_count"], row["matching_count"])
        table.add_row(Text(row["method"]), *(Text(f"{count:,}") for count in counts))
    console.print(table)


def outcomes(rows: Sequence[Row], console: Console) -> None:
    """Mean scores of models in groups of instances, and how they changed against the first one."""
    for row in rows:
        added = f", {row['added_count']:,} picks added" if row["added_count"] else ""
        table = _table("group", "scored", "mean", "change", "95% interval", right=("scored", "mean", "change"))
        table.title, table.title_justify = Text(f"{row['model']}: {row['method']}{added}"), "left"
        for group in row["groups"]:
            known = group["change"] is not None
            table.add_row(
                Text(group["group"].replace("_", " ")),
                Text(f"{group['scored_count']:,}"),
                _number(group["mean"]),
                Text(f"{group['change']:+.3f}" if known else "–"),
                Text(f"{group['change_low']:+.3f} … {group['change_high']:+.3f}" if known else "–"),
            )
        console.print(table)


def needs(rows: Sequence[Row], console: Console, *, more: bool) -> None:
    """What to collect, a sentence each."""
    if not rows:
        console.print("Nothing: the pool has enough of every error slice.")
        return
    for row in rows:
        told = f"{row['slice_rank']:>5}  {row['description']}{_doubts(row['doubtful'])}"
        console.print(Text(told), soft_wrap=True)
    _say_more(more, console, " slices")


def _doubts(doubtful: Sequence[str]) -> str:
    return f" (doubtful tags: {', '.join(doubtful)})" if doubtful else ""


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
    if run.job.cost.call_count:
        console.print(Text(f"{cost(run.job.cost)} of language models"))


def cost(found: Cost) -> str:
    """`1,200 calls, 2,400,000 + 60,000 tokens, 0.41 USD`."""
    parts = [f"{found.call_count:,} calls", f"{found.input_token_count:,} + {found.output_token_count:,} tokens"]
    if found.HasField("amount"):
        parts.append(_money(found))
    return ", ".join(parts)


def _money(found: Cost) -> str:
    return f"{found.amount:,.2f} {found.currency}" if found.amount >= 1 else f"{found.amount:.2g} {found.currency}"


def estimate(found: EstimateRunResponse, console: Console) -> None:
    """What each step would ask of a language model."""
    from hibug2 import messages
    from hibug2.v1 import run_pb2

    if not found.steps:
        console.print("No step asks a language model.")
        return
    right = ("calls", "tokens in", "tokens out", "cost")
    table = _table("step", *right, "taken for granted", right=right)
    rows = [(messages.word(run_pb2.StepKind.DESCRIPTOR, step.kind), step.cost, step.assumption) for step in found.steps]
    for name, spent, assumption in (*rows, ("in all", found.total, "")):
        counts = (f"{n:,}" for n in (spent.call_count, spent.input_token_count, spent.output_token_count))
        table.add_row(name, *counts, _money(spent), Text(assumption))
    console.print(table)


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


def schema(found: Schema, console: Console, doubts: Mapping[str, str] | None = None) -> None:
    """The attributes of a schema and their tags; `doubts` says why some are not to be relied on."""
    from hibug2 import messages
    from hibug2.v1 import types_pb2

    console.print(Text(found.name, "bold"))
    table = _table("attribute", "category", "tagger", "from", "tags")
    for attribute in found.attributes:
        table.add_row(
            Text.assemble(
                attribute.attribute,
                *[(" (locked)", "dim")] * attribute.locked,
                *[(" (doubtful)", "yellow")] * (attribute.attribute in (doubts or {})),
            ),
            messages.word(types_pb2.Category.DESCRIPTOR, attribute.category),
            messages.word(types_pb2.Tagger.DESCRIPTOR, attribute.tagger),
            Text(", ".join(attribute.sources)),
            Text(", ".join(attribute.tags)),
        )
    console.print(table)
    for name, why in (doubts or {}).items():
        console.print(Text.assemble((f"{name}: ", "yellow"), why), soft_wrap=True)


def quality(found: TagQuality, console: Console) -> None:
    """What a check of tags found, a line an attribute."""
    from hibug2 import messages

    console.print(Text(found.tagging, "bold"), soft_wrap=True)
    right = ("unknown", "not visible", "same again", "kappa")
    table = _table("attribute", "tagger", "unknown", "not visible", "same again", "kappa", "beside", "", right=right)
    for row in (messages.as_json(attribute) for attribute in found.attributes):
        again = row["retagged"] or {"share": None, "kappa": None}
        beside = [
            f"{r['reference']} {'–' if r['agreement']['kappa'] is None else format(r['agreement']['kappa'], '.2f')}"
            for r in row["references"]
        ]
        table.add_row(
            Text(row["attribute"]),
            row["tagger"],
            _share(row["unknown_share"]),
            _share(row["not_visible_share"]),
            _share(again["share"]),
            _number(again["kappa"], 2),
            Text(", ".join(beside)),
            Text("doubtful", "yellow") if row["doubt"] else Text(),
        )
    console.print(table)
    for attribute in found.attributes:
        if attribute.doubt:
            console.print(Text.assemble((f"{attribute.attribute}: ", "yellow"), attribute.doubt), soft_wrap=True)
    asked = (
        f"{found.sampled_count:,} instances tagged again by {found.model}" if found.model else "nothing tagged again"
    )
    console.print(Text(f"{asked}; kappa is agreement beyond chance, doubtful below {found.min_kappa:g}", "dim"))


def schemas(found: Iterable[Schema], current: str, console: Console) -> None:
    """A line a schema; `current` is the name of the one that runs use."""
    table = _table("schema", "attributes", "locked", "", right=("attributes", "locked"))
    for schema in found:
        table.add_row(
            Text(schema.name.rpartition("/")[2]),
            f"{len(schema.attributes):,}",
            f"{sum(attribute.locked for attribute in schema.attributes):,}",
            "current" if schema.name == current else "",
        )
    console.print(table if table.row_count else "No schemas.")


def _time(stamp: Timestamp) -> str:
    return stamp.ToDatetime(dt.UTC).astimezone().strftime("%Y-%m-%d %H:%M") if stamp.seconds else "–"
