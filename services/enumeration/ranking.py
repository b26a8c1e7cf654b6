"""A ranking as an artifact: slices scored for one model, its error slices, and how far they are to be believed."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from services.enumeration import engine, lattice
from services.enumeration.error_slices import ErrorSlices, find_error_slices
from services.enumeration.families import Look, extents_of, families, greedy_cover, how_many_fit, tag_blame
from services.enumeration.slices import Cancelled, OnProgress, rows_of_split
from services.enumeration.statistics import Chance, chance_of, found_by_chance, permuted_scores, slice_significance
from services.enumeration.work_units import looking
from shared.errors import Precondition
from shared.names import Name
from shared.store.artifacts import (
    Artifacts,
    Manifest,
    ModelRecord,
    Provenance,
    TagTable,
    item_columns,
    scores_in_order,
)

# Families are made of the error slices that are surest to be bad; their extents are held in memory together.
MAX_FAMILY_SLICES = 20_000
_COLUMNS_AT_ONCE = 4  # permutations scored together: sums of all slices are held for each
SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Scored:
    """The slices of an enumeration with the scores of one model, and the rows they were counted on."""

    table: TagTable
    scores: npt.NDArray[np.float64]
    slices: lattice.Slices
    overall_mean: float
    limits: tuple[int, int]  # M and D

    @property
    def loss(self) -> float:
        """Score lost over all instances."""
        return float(np.nansum(1.0 - self.scores))


def score_enumeration(
    artifacts: Artifacts, enumeration: Name, model: ModelRecord, on_progress: OnProgress, cancelled: Cancelled
) -> Scored:
    """Count and sum a model's scores in every slice; Precondition when none of its instances is scored."""
    parameters = artifacts.manifest(enumeration).provenance.parameters
    tagging = Name(enumeration.dataset, "taggings", str(parameters["tagging"]).rpartition("/")[2])
    table = rows_of_split(artifacts, tagging, str(parameters["split"]))
    scores = scores_in_order(artifacts.scores(model), table.instance_ids)
    if np.isnan(scores).all():
        raise Precondition(
            f"model '{model.model}' has no score for any of the {len(scores)} {parameters['split']} instances; add them"
        )
    limits = (int(parameters["min_count"]), int(parameters["max_depth"]))
    slices = _sums(table, scores[:, None], limits, on_progress, cancelled)
    return Scored(table, scores, slices, float(np.nanmean(scores)), limits)


def _sums(
    table: TagTable,
    columns: npt.NDArray[np.float64],
    limits: tuple[int, int],
    on_progress: OnProgress | None,
    cancelled: Cancelled,
) -> lattice.Slices:
    """The slices with the sums of `columns` (N, K), in the order in which they were enumerated.

    Enumerating again counts and sums in one pass, which is quicker than looking up the rows of slices that are known.
    """
    return engine.enumerate_slices(
        table.codes,
        table.tag_counts,
        columns,
        min_count=limits[0],
        max_depth=limits[1],
        max_slices=sys.maxsize,  # as many as the enumeration was let have
        on_progress=on_progress,
        cancelled=cancelled,
    )


def rank_artifact(
    artifacts: Artifacts,
    name: Name,
    enumeration: Name,
    model: ModelRecord,
    *,
    margin: float,
    permutations: int,
    seed: int,
    on_progress: OnProgress,
    cancelled: Cancelled,
) -> None:
    """Score the slices of an enumeration for one model and store its error slices, in rank order, as `name`.

    Beside each: p- and q-value over all slices with at least M scored instances, its family, and each tag's share of
    the drop. `permutations` shuffles of the scores tell how many error slices chance alone names.
    """
    parameters = artifacts.manifest(enumeration).provenance.parameters

    def look() -> None:
        if cancelled():
            raise lattice.Cancelled("the ranking was cancelled")

    # The scores, each batch of shuffled ones, and the families.
    passes = Passes(2 + -(-permutations // _COLUMNS_AT_ONCE), on_progress)
    known = score_enumeration(artifacts, enumeration, model, passes.report, cancelled)
    passes.end()
    rule = partial(find_error_slices, known.slices, 0, known.overall_mean, known.loss, margin=margin)
    found = looking(look, rule)
    look()
    min_count = int(parameters["min_count"])
    p, q = looking(look, partial(slice_significance, known.slices, 0, known.scores, min_scored=min_count))
    look()
    chance = _chance(known, margin, permutations, seed, passes, cancelled, look) if permutations else None
    table, family_table = _tables(known, found, p, q, look)
    passes.end()
    artifacts.write_part(name, "error_slices", table)
    artifacts.write_part(name, "families", family_table)
    artifacts.complete(
        name,
        Manifest(
            Provenance(
                inputs={"enumeration": str(enumeration), "scores": model.digest},
                parameters={
                    **{k: parameters[k] for k in ("tagging", "schema", "split", "min_count", "max_depth")},
                    "enumeration": str(enumeration),
                    "model": model.model,
                    "margin": margin,
                    "permutations": permutations,
                },
                seed=seed,
            ),
            {
                "overall_mean": known.overall_mean,
                "scored_count": int((~np.isnan(known.scores)).sum()),
                "slice_count": len(known.slices),
                "tested_count": int((~np.isnan(p)).sum()),
                "error_slice_count": len(found),
                "significant_count": int((q[found.index] <= SIGNIFICANT).sum()),
                "family_count": family_table.num_rows,
                "by_chance": None if chance is None else [chance.mean, chance.low, chance.high],
            },
        ),
    )


class Passes:
    """Progress of several passes that are about as long as the first: each counts its steps anew."""

    def __init__(self, count: int, on_progress: OnProgress) -> None:
        self._count, self._on_progress = count, on_progress
        self._ended, self._steps = 0, 1

    def report(self, done: int, total: int) -> None:
        """Steps of the pass that is under way."""
        self._steps = total
        self._on_progress(self._ended * total + done, self._count * total)

    def end(self) -> None:
        self._ended += 1
        self.report(0, self._steps)


def _chance(
    known: Scored, margin: float, permutations: int, seed: int, passes: Passes, cancelled: Cancelled, look: Look
) -> Chance:
    shuffled = looking(look, partial(permuted_scores, known.scores, permutations, seed))
    counts = []
    for start in range(0, permutations, _COLUMNS_AT_ONCE):
        columns = shuffled[:, start : start + _COLUMNS_AT_ONCE]
        slices = _sums(known.table, columns, known.limits, passes.report, cancelled)
        counts.append(looking(look, partial(found_by_chance, slices, known.overall_mean, margin=margin)).counts)
        passes.end()
    return chance_of(np.concatenate(counts))


def _tables(
    known: Scored, found: ErrorSlices, p: npt.NDArray[np.float64], q: npt.NDArray[np.float64], look: Look
) -> tuple[pa.Table, pa.Table]:
    """The error slices in rank order, and their families in the order that covers the errors soonest."""
    slices, items = known.slices, known.slices.items[found.index]
    family = np.zeros(len(items), dtype=np.int64)  # 0: beyond those that are grouped
    blame = looking(look, partial(tag_blame, slices, 0, known.overall_mean, found.index))
    members: dict[int, list[int]] = {}
    cover_of: dict[int, tuple[int, float]] = {}
    surest = np.argsort(p[found.index], kind="stable")[:MAX_FAMILY_SLICES]
    surest = surest[: how_many_fit(len(known.scores), slices.count[found.index[surest]])]
    grouped = np.sort(surest)  # positions, in rank order
    if len(grouped):
        extents = extents_of(known.table.codes, known.table.tag_counts, items[grouped], look)
        groups = families(extents, items[grouped], look=look)
        family[grouped] = grouped[groups.representative] + 1
        leaders = groups.leaders
        cover = greedy_cover(extents.at(leaders), known.scores, look)
        cover_of = {
            int(grouped[leaders[at]]): (place + 1, float(cover.share[place]))
            for place, at in enumerate(cover.order.tolist())
        }
        for position, leader in zip(grouped.tolist(), grouped[groups.representative].tolist(), strict=True):
            members.setdefault(leader, []).append(position)
    ranked = sorted(members, key=lambda leader: (cover_of.get(leader, (len(members) + 1, 1.0))[0], leader))
    whole = max((share for _, share in cover_of.values()), default=0.0)
    error_slices = pa.table(
        {
            **item_columns(items),
            "count": pa.array(slices.count[found.index], pa.int64()),
            "scored_count": pa.array(slices.scored[found.index, 0], pa.int64()),
            "mean": pa.array(found.mean),
            "drop": pa.array(found.drop),
            "parent_drop": pa.array(found.parent_drop),
            "error_share": pa.array(found.error_share),
            "interval_low": pa.array(found.interval_low),
            "interval_high": pa.array(found.interval_high),
            "p_value": pa.array(p[found.index]),
            "q_value": pa.array(q[found.index]),
            "family": pa.array(family),
            **{f"blame_{i}": pa.array(np.ascontiguousarray(blame[:, i])) for i in range(blame.shape[1])},
        }
    )
    family_table = pa.table(
        {
            "representative": pa.array([leader + 1 for leader in ranked], pa.int64()),
            "members": pa.array(
                [[leader + 1, *(m + 1 for m in members[leader] if m != leader)] for leader in ranked],
                pa.list_(pa.int64()),
            ),
            "cover_rank": pa.array([cover_of.get(leader, (0, whole))[0] for leader in ranked], pa.int64()),
            "covered_share": pa.array([cover_of.get(leader, (0, whole))[1] for leader in ranked], pa.float64()),
        }
    )
    return error_slices, family_table
