"""`hibug2 predict`: slices that the data does not show, and whether other data bears them out."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

import typer
from rich.text import Text

from hibug2.session import SHOWN, LimitOption, RunArgument, Session


class PredictionMethod(StrEnum):
    tag_substitution = "tag_substitution"
    instruction = "instruction"
    prior = "prior"


def predict(
    session: Session,
    run: RunArgument,
    method: Annotated[
        list[PredictionMethod] | None,
        typer.Option(
            "--method",
            help="Near tags in error slices, a language model, or scores of sub-slices; may be repeated.",
            show_default="tag_substitution",
        ),
    ] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Hold them against scores on other splits.")] = False,
    split: Annotated[
        list[str] | None, typer.Option("--split", help="With --verify; may be repeated.", show_default="test")
    ] = None,
    pairs: Annotated[
        int | None, typer.Option("--pairs", min=2, help="Pairs of each slice; not for tag substitution.")
    ] = None,
    per_class: Annotated[
        int | None, typer.Option("--per-class", min=1, help="Most slices of one class.", show_default="20")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Draws what --verify compares with.")] = 0,
    limit: LimitOption = None,
) -> None:
    """Shows slices thought to be bad that the validation data does not show.

    With --verify also how bad they are on other data, beside random combinations that were not seen either.
    """
    from hibug2 import foresight, messages, show

    if not verify:
        session.refuse(("--split", "--seed"), "goes with --verify; add that, or leave it out")
    methods = [m.value for m in method or [PredictionMethod.tag_substitution]]
    with session.client() as client:
        found = client.get_run(run)
        document: dict[str, Any] = {"run": found.name}
        if verify:
            splits = split or ["test"]
            verified = client.verify_predictions(
                found, methods, splits=splits, seed=seed, pair_count=pairs, max_per_class=per_class
            )
            rows = messages.rows(verified.slices)
            document["verification"] = {
                "splits": splits,
                "overall_mean": verified.overall_mean,
                "scored_count": verified.scored_count,
                "methods": messages.rows(verified.methods),
            }
        else:
            rows = [
                row
                for name in methods
                for row in messages.rows(
                    client.predicted(
                        found, name, pair_count=foresight.pairs_of(name, methods, pairs), max_per_class=per_class
                    )
                )
            ]
    of_method = {name: [row for row in rows if row["method"] == name] for name in methods}
    if session.json:
        session.document({**document, "predicted_slices": [row for rows in of_method.values() for row in rows[:limit]]})
        return
    for name, of_it in of_method.items():
        if len(methods) > 1:
            session.out.print(Text(name, "bold"))
        shown = of_it[: limit or SHOWN]
        show.predicted(shown, session.out, more=len(of_it) > len(shown))
    if verify:
        told = document["verification"]
        scored, where = f"{told['scored_count']:,}", " and ".join(told["splits"])
        session.out.print()
        session.out.print(Text(f"{scored} scored instances of {where}; overall mean {told['overall_mean']:.3f}"))
        show.verified(told["methods"], session.out)
