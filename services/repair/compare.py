"""What a repair brought: scores before and after, in the slices that failed and outside them (paper 5.5, Table 3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from services.repair.pick import pool_of
from shared.errors import Precondition
from shared.names import Name
from shared.store.artifacts import Artifacts, TagTable, items_of, scores_in_order

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Outcome:
    """Mean scores of one model; None where no scored instance lies there."""

    model: str
    selection: Name | None
    method: str  # "" for the ranked model
    added: int
    overall: float
    failing: float | None
    other: float | None


@dataclass(frozen=True)
class Comparison:
    outcomes: tuple[Outcome, ...]
    instance_count: int
    failing_count: int


def compare(artifacts: Artifacts, ranking: Name, compared: Sequence[tuple[str, Name]], split: str) -> Comparison:
    """The ranked model and the `compared` (model, selection it was trained with) on the instances of `split`.

    Precondition when the split holds no tagged instance or a model has no score there.
    """
    parameters = artifacts.manifest(ranking).provenance.parameters
    tagging = Name(ranking.dataset, "taggings", str(parameters["tagging"]).rpartition("/")[2])
    table, _ = pool_of(artifacts, tagging, split)
    failing = in_any_slice(table, items_of(artifacts.read_part(ranking, "error_slices")))
    rivals: list[tuple[str, Name | None]] = [(str(parameters["model"]), None), *compared]
    outcomes = tuple(
        _outcome(artifacts, ranking.dataset, model, selection, table, failing, split) for model, selection in rivals
    )
    return Comparison(outcomes, len(failing), int(failing.sum()))


def in_any_slice(table: TagTable, items: npt.NDArray[np.int32]) -> Mask:
    """(N,) which rows of `table` lie in at least one of the slices (E, D), padded with -1."""
    member = [table.codes[:, j] == t for j, tags in enumerate(table.tag_counts) for t in range(tags)]
    found = np.zeros(len(table.codes), dtype=bool)
    for row in items:
        keep = ~found
        for item in row[row >= 0]:
            keep &= member[item]
        found |= keep
    return found


def _outcome(
    artifacts: Artifacts,
    dataset: str,
    model: str,
    selection: Name | None,
    table: TagTable,
    failing: Mask,
    split: str,
) -> Outcome:
    scores = scores_in_order(artifacts.scores(artifacts.model(dataset, model)), table.instance_ids)
    scored = ~np.isnan(scores)
    if not scored.any():
        raise Precondition(f"model '{model}' has no score for any '{split}' instance; add them and compare again")
    method, added = "", 0
    if selection is not None:
        summary = artifacts.manifest(selection).summary
        method, added = str(summary["method"]), int(summary["pick_count"])
    return Outcome(
        model=model,
        selection=selection,
        method=method,
        added=added,
        overall=float(scores[scored].mean()),
        failing=_mean(scores, scored & failing),
        other=_mean(scores, scored & ~failing),
    )


def _mean(scores: npt.NDArray[np.float64], where: Mask) -> float | None:
    return float(scores[where].mean()) if where.any() else None
