"""What a repair brought: scores before and after, in the slices that failed and outside them (paper 5.5, Table 3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from services.repair.interval import Change, paired_change
from services.repair.pick import pick_count, ranked_scores, tagging_of
from shared.errors import Precondition, invalid
from shared.names import Name
from shared.store.artifacts import Artifacts, TagTable, items_of, scores_in_order

Mask = npt.NDArray[np.bool_]


class Group(StrEnum):
    """Which instances a mean is over. The last three part the failing ones by the slices that were repaired."""

    OVERALL = "overall"
    FAILING = "failing"  # in an error slice
    OTHER = "other"  # in none
    MATCHING = "matching"  # in a repaired slice
    OVERLAPPING = "overlapping"  # else in an error slice that shares a pair with a repaired one
    NON_OVERLAPPING = "non_overlapping"  # else in an error slice


@dataclass(frozen=True)
class GroupOutcome:
    """Mean score of `count` >= 1 scored instances, and its change against the ranked model, if it is not it."""

    group: Group
    count: int
    mean: float
    change: Change | None


@dataclass(frozen=True)
class Compared:
    """A model that was trained with picks, of the selection and by the method that are named."""

    model: str
    selection: Name
    method: str = ""  # empty: the selection's own


@dataclass(frozen=True)
class Outcome:
    """Means of one model; a group in which it has no scored instance is left out."""

    model: str
    selection: Name | None
    method: str  # "" for the ranked model
    added: int
    groups: Mapping[Group, GroupOutcome]


@dataclass(frozen=True)
class Comparison:
    outcomes: tuple[Outcome, ...]
    instance_count: int
    failing_count: int


def compare(
    artifacts: Artifacts, ranking: Name, compared: Sequence[Compared], split: str, repaired: Sequence[int] = ()
) -> Comparison:
    """The model as it was ranked and the `compared` ones on the tagged instances of `split`.

    `repaired` are ranks of error slices, 1 for the worst: what matches them, what overlaps with them and the rest of
    what fails are then told apart, as in the paper's Table 3. Changes are over the instances that both models have a
    score for. InvalidInput for a rank that there is not. Precondition when the split holds no tagged instance, a model
    has no score there, or the tags are of another schema by now.
    """
    parameters = artifacts.manifest(ranking).provenance.parameters
    table, _ = artifacts.tagged(tagging_of(artifacts, ranking), [split])
    if not len(table.codes):
        raise Precondition(
            f"there is nothing to compare on: no tagged instance is in the split '{split}'; add some and run again, or "
            "name another split"
        )
    items = items_of(artifacts.read_part(ranking, "error_slices"))
    groups = groups_of(table, items, _positions(repaired, len(items)))
    first = str(parameters["model"])
    before = _in_order(ranked_scores(artifacts, ranking), table, f"'{first}' had", split, "run again")
    outcomes = [Outcome(first, None, "", 0, _means(groups, before, None))]
    for one in compared:
        scores = artifacts.scores(artifacts.model(ranking.dataset, one.model))
        after = _in_order(scores, table, f"'{one.model}' has", split, "compare again")
        summary = artifacts.manifest(one.selection).summary
        method = one.method or str(summary["method"])
        added = pick_count(one.selection, summary, method)
        outcomes.append(Outcome(one.model, one.selection, method, added, _means(groups, after, before)))
    return Comparison(tuple(outcomes), len(table.codes), int(groups[Group.FAILING].sum()))


def groups_of(table: TagTable, items: npt.NDArray[np.int32], repaired: Sequence[int] = ()) -> dict[Group, Mask]:
    """(N,) which rows of `table` lie in each group, for the error slices (E, D), padded with -1.

    `repaired` are positions of error slices; without them the last three groups are left out.
    """
    failing = in_any_slice(table, items)
    groups = {Group.OVERALL: np.ones(len(failing), bool), Group.FAILING: failing, Group.OTHER: ~failing}
    if len(repaired):
        chosen = items[list(repaired)]
        shares = np.isin(items, chosen[chosen >= 0]).any(axis=1)
        matching = in_any_slice(table, chosen)
        overlapping = in_any_slice(table, items[shares]) & ~matching
        groups |= {
            Group.MATCHING: matching,
            Group.OVERLAPPING: overlapping,
            Group.NON_OVERLAPPING: failing & ~matching & ~overlapping,
        }
    return groups


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


def _positions(ranks: Sequence[int], n_slices: int) -> list[int]:
    for i, rank in enumerate(ranks):
        if not 1 <= rank <= n_slices:
            has = f"the ranking has 1 to {n_slices}" if n_slices else "the ranking has no error slices"
            raise invalid(f"repaired_ranks[{i}]", f"is {rank}; {has}")
    return [rank - 1 for rank in ranks]


def _in_order(scores: pa.Table, table: TagTable, whose: str, split: str, then: str) -> npt.NDArray[np.float64]:
    found = scores_in_order(scores, table.instance_ids)
    if np.isnan(found).all():
        raise Precondition(f"model {whose} no score for any '{split}' instance; add them and {then}")
    return found


def _means(
    groups: Mapping[Group, Mask], scores: npt.NDArray[np.float64], before: npt.NDArray[np.float64] | None
) -> dict[Group, GroupOutcome]:
    scored = ~np.isnan(scores)
    found = {}
    for group, mask in groups.items():
        where = mask & scored
        if not where.any():
            continue
        both = where & ~np.isnan(before) if before is not None else where
        change = paired_change(before[both], scores[both]) if before is not None and both.any() else None
        found[group] = GroupOutcome(group, int(where.sum()), float(scores[where].mean()), change)
    return found
