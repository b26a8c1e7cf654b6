"""Rankings asked again: confirmed on held instances, models side by side, and the gate between two versions."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from services.enumeration import engine, lattice, models
from services.enumeration.error_slices import find_error_slices
from services.enumeration.gate import Severity, Verdict, gate
from services.enumeration.read import Vocabulary, schema_vocabulary
from services.enumeration.slices import rows_of_split
from services.enumeration.statistics import Confirmation, confirm
from shared.errors import InvalidInput, Violation, invalid, refuse
from shared.names import Name
from shared.schema import Schema
from shared.store.artifacts import Artifacts, TagTable, scores_in_order

Pairs = Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Shared:
    """What rankings of one enumeration have in common, and the scores (N, K) of their models, in their order."""

    table: TagTable
    scores: npt.NDArray[np.float64]
    margin: float
    min_count: int
    max_depth: int

    @property
    def words(self) -> Vocabulary:
        return schema_vocabulary(self.table.schema)

    def slices(self, columns: npt.NDArray[np.float64]) -> lattice.Slices:
        """The slices of the enumeration, always in the same order, with the sums of `columns` (N, K).

        Enumerating again is many times quicker than reading the slices and looking up the rows of each.
        """
        return engine.enumerate_slices(
            self.table.codes,
            self.table.tag_counts,
            columns,
            min_count=self.min_count,
            max_depth=self.max_depth,
            max_slices=sys.maxsize,  # as many as the enumeration was let have
        )


def open_shared(artifacts: Artifacts, rankings: Sequence[Name], field: str) -> Shared:
    """The rankings' common ground; InvalidInput naming `field` when they are not of one enumeration."""
    manifests = [artifacts.manifest(name) for name in rankings]
    parameters = [m.provenance.parameters for m in manifests]
    first = parameters[0]
    for i, other in enumerate(parameters):
        if rankings[i].dataset != rankings[0].dataset or other["enumeration"] != first["enumeration"]:
            raise invalid(
                f"{field}[{i}]",
                f"{rankings[i]} ranks other slices than {rankings[0]}; run both with the same dataset, schema, "
                "min_count and max_depth",
            )
    dataset = rankings[0].dataset
    tagging = Name(dataset, "taggings", str(first["tagging"]).rpartition("/")[2])
    table = rows_of_split(artifacts, tagging, str(first["split"]))
    digests = [str(m.provenance.inputs["scores"]) for m in manifests]  # those ranked, whatever the models have now
    scores = np.column_stack([scores_in_order(artifacts.scores_of(dataset, d), table.instance_ids) for d in digests])
    return Shared(table, scores, float(first["margin"]), int(first["min_count"]), int(first["max_depth"]))


def confirm_slices(artifacts: Artifacts, ranking: Name, seed: int) -> tuple[Shared, Confirmation]:
    """Error slices of the ranking's model found on one half of its instances and tested on the other.

    A slice needs half the ranking's M on the half that is searched, for it holds half the instances.
    """
    shared = open_shared(artifacts, [ranking], "parent")
    found = confirm(
        shared.table.codes,
        shared.table.tag_counts,
        shared.scores[:, 0],
        min_count=max(1, shared.min_count // 2),
        max_depth=shared.max_depth,
        margin=shared.margin,
        seed=seed,
    )
    return shared, found


@dataclass(frozen=True)
class Difference:
    """A slice on which two models differ, and the paired test where it was made.

    items: as in `Slices`. count, paired: its instances, and those that both models scored.
    """

    items: tuple[int, ...]
    count: int
    paired: int
    first_mean: float
    second_mean: float
    p: float | None
    q: float | None
    change: str  # fixed, regressed, new, kept; "" for slices of the difference


@dataclass(frozen=True)
class Comparison:
    shared: Shared
    overlap: models.Overlap
    worse: tuple[Difference, ...]
    change_counts: Mapping[str, int]
    versions: tuple[Difference, ...]


def compare_models(artifacts: Artifacts, rankings: Sequence[Name], limit: int) -> Comparison:
    """Overlap of the worst slices of all (paper 5.3); of two, also where the second is worse and what changed.

    At most `limit` slices of each kind.
    """
    shared = open_shared(artifacts, rankings, "rankings")
    slices = shared.slices(shared.scores)
    overlap = models.worst_overlap(slices)
    if len(rankings) != 2:
        return Comparison(shared, overlap, (), {}, ())
    paired = models.paired_scores(shared.scores[:, 0], shared.scores[:, 1])
    both = shared.slices(paired)
    found = models.difference_slices(both, paired, margin=shared.margin, min_scored=shared.min_count)
    worse = tuple(
        Difference(
            **_facts(both, int(found.index[i])),
            first_mean=float(found.baseline_mean[i]),
            second_mean=float(found.candidate_mean[i]),
            p=_known(found.p[i]),
            q=_known(found.q[i]),
            change="",
        )
        for i in range(min(limit, len(found.index)))
    )
    overall = (float(np.nanmean(shared.scores[:, 0])), float(np.nanmean(shared.scores[:, 1])))
    errors = [find_error_slices(slices, k, overall[k], 0.0, margin=shared.margin) for k in (0, 1)]
    changed = models.changes(slices, errors[0], errors[1], overall, margin=shared.margin)
    kinds = {kind: getattr(changed, kind) for kind in ("fixed", "regressed", "new", "kept")}
    versions = tuple(
        Difference(
            **_facts(both, int(position)),
            first_mean=float(changed.baseline_mean[position]),
            second_mean=float(changed.candidate_mean[position]),
            p=None,
            q=None,
            change=kind,
        )
        for kind, positions in kinds.items()
        for position in positions[:limit]
    )
    return Comparison(shared, overlap, worse, {kind: len(positions) for kind, positions in kinds.items()}, versions)


def _facts(both: lattice.Slices, position: int) -> dict[str, Any]:
    items = tuple(both.items[position].tolist())
    return {"items": items, "count": int(both.count[position]), "paired": int(both.scored[position, 0])}


def _known(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def check_gate(
    artifacts: Artifacts,
    baseline: Name,
    candidate: Name,
    *,
    max_drop: float,
    max_overall_drop: float | None,
    significance: float,
    thresholds: Sequence[tuple[Pairs, float]],
    severities: Sequence[Severity],
    every_slice: bool,
) -> tuple[Shared, Verdict]:
    """Judge the candidate's ranking against the baseline's; InvalidInput names the field that is wrong."""
    shared = open_shared(artifacts, [baseline, candidate], "candidate")
    limits = {
        items_of_pairs(shared.table.schema, pairs, f"thresholds[{i}].tags"): drop
        for i, (pairs, drop) in enumerate(thresholds)
    }
    paired = models.paired_scores(shared.scores[:, 0], shared.scores[:, 1])
    verdict = gate(
        shared.slices(paired),
        paired,
        max_drop=max_drop,
        margin=shared.margin,
        min_scored=shared.min_count,
        max_overall_drop=max_overall_drop,
        slice_limits=limits,
        severities=severities,
        every_slice=every_slice,
        max_false_alarm=significance,
        describe=_describer(shared.words),
    )
    return shared, verdict


def _describer(words: Vocabulary) -> Callable[[tuple[int, ...]], str]:
    attributes, tags = words.attributes.to_pylist(), words.tags.to_pylist()
    return lambda items: " and ".join(f"{attributes[i]}: {tags[i]}" for i in items)


def items_of_pairs(schema: Schema, pairs: Pairs, field: str) -> tuple[int, ...]:
    """The items of pairs (attribute, tag), ascending; InvalidInput for what the schema lacks, and for none."""
    if not pairs:
        raise invalid(field, "names no tag")
    offsets = lattice.item_offsets(schema.tag_counts)
    found: list[int] = []
    faults: list[Violation] = []
    for i, (name, tag) in enumerate(pairs):
        try:
            column, code = tag_position(schema, name, tag, f"{field}[{i}]")
        except InvalidInput as error:
            faults += error.violations
            continue
        found.append(int(offsets[column]) + code)
    if len({name for name, _ in pairs}) != len(pairs):
        faults.append(Violation(field, "name each attribute once"))
    refuse(faults)
    return tuple(sorted(found))


def tag_position(schema: Schema, attribute: str, tag: str, field: str) -> tuple[int, int]:
    """(position of the attribute, code of the tag); InvalidInput when the schema lacks one of them."""
    if attribute not in schema.names():
        raise invalid(
            f"{field}.attribute", f"'{attribute[:80]}' is not in the schema; it has {', '.join(schema.names()[:50])}"
        )
    column = schema.names().index(attribute)
    if tag not in schema.attributes[column].tags:
        known = ", ".join(schema.attributes[column].tags[:20])
        raise invalid(f"{field}.tag", f"'{tag[:80]}' is no tag of '{attribute}'; its tags are {known}")
    return column, schema.attributes[column].code(tag)
