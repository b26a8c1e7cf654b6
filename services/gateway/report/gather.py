"""From a run's artifacts to what its report shows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from services.gateway.report import model as page
from services.gateway.report.choose import cross, widest_pairs
from shared.errors import HiBug2Error
from shared.images.box import Box
from shared.images.reader import ImageReader, crop, thumbnail
from shared.names import Name, parse
from shared.schema import Schema
from shared.store.artifacts import (
    Artifacts,
    TagTable,
    column_by_id,
    items_of,
    scores_in_order,
)
from shared.version import VERSION

MAX_SLICES, MAX_FAMILIES, MAX_PREDICTED, MAX_PICK_SLICES = 200, 12, 40, 40
PICTURED_SLICES, PICTURES, PICTURE_PX = 40, 6, 96
HEATMAPS = 2
SHARES = (0.5, 0.9)  # of the errors, for which the page says how many families hold them
_CROP_MARGIN = 0.15

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class RunRefs:
    """The artifacts of one run, by name."""

    run: str
    dataset: str
    model: str
    ranking: Name
    prediction: Name | None
    selection: Name | None  # picks of the method


@dataclass(frozen=True)
class Outcomes:
    """What training with the selection brought, on `test_count` held-out instances."""

    rows: tuple[page.Outcome, ...] = ()
    test_count: int = 0
    failing_test_count: int = 0


@dataclass(frozen=True)
class _Facts:
    """What the sections are drawn from: the split that is debugged, in the order of its tag table."""

    artifacts: Artifacts
    refs: RunRefs
    table: TagTable
    rows: pa.Table
    scores: npt.NDArray[np.float64]
    predicted: list[str | None]
    errors: pa.Table
    doubtful: frozenset[str]

    @property
    def schema(self) -> Schema:
        return self.table.schema

    @cached_property
    def offsets(self) -> npt.NDArray[np.int64]:
        return np.concatenate([[0], np.cumsum(self.table.tag_counts)])

    def words(self, items: npt.NDArray[np.int32]) -> tuple[page.Pair, ...]:
        return tuple(self.schema.pairs[i] for i in items if i >= 0)

    def doubtful_of(self, pairs: Sequence[page.Pair]) -> tuple[str, ...]:
        return tuple(attribute for attribute, _ in pairs if attribute in self.doubtful)


def gather(artifacts: Artifacts, reader: ImageReader, refs: RunRefs, outcomes: Outcomes) -> page.ReportData:
    """Everything that the report of a run shows; lists are cut to what a page can hold."""
    manifest = artifacts.manifest(refs.ranking)
    parameters, summary = manifest.provenance.parameters, manifest.summary
    split = str(parameters["split"])
    tagging = parse(str(parameters["tagging"]), "taggings", "tagging")
    table, rows = artifacts.tagged(tagging, [split])
    record = artifacts.model(refs.dataset, refs.model)
    ranked = str(manifest.provenance.inputs["scores"])  # whatever the model has now
    stored = artifacts.scores_of(refs.dataset, ranked)
    facts = _Facts(
        artifacts,
        refs,
        table,
        rows,
        scores_in_order(stored, table.instance_ids),
        column_by_id(stored, table.instance_ids, "predicted_label").to_pylist(),
        artifacts.read_part(refs.ranking, "error_slices"),
        artifacts.doubtful_attributes(tagging),
    )
    dataset = artifacts.dataset(refs.dataset)
    predicted, predicted_total = _predicted(facts)
    return page.ReportData(
        title=f"{refs.model} on {refs.dataset}",
        dataset=refs.dataset,
        model=refs.model,
        task=dataset.task,
        made_at=datetime.now(UTC),
        split=split,
        instance_count=int(summary["scored_count"]),
        overall_mean=float(summary["overall_mean"]),
        parameters=page.Parameters(
            int(parameters["max_depth"]), int(parameters["min_count"]), float(parameters["margin"]), _seed(facts)
        ),
        slice_count=int(summary["slice_count"]),
        error_slices=_error_slices(facts, reader),
        error_slice_total=facts.errors.num_rows,
        tested_count=int(summary["tested_count"]),
        significant_count=int(summary["significant_count"]),
        by_chance=page.Chance(*summary["by_chance"]) if summary["by_chance"] else None,
        cover=_cover(facts, reader),
        tag_scores=_tag_scores(facts),
        heatmaps=_heatmaps(facts, int(parameters["min_count"])),
        predicted_slices=predicted,
        predicted_slice_total=predicted_total,
        repair=_repair(facts, outcomes),
        provenance={
            "run": refs.run,
            "dataset hash": artifacts.manifest(tagging).provenance.inputs["dataset"],  # it may have grown since
            "schema": facts.schema.schema_id,
            "scores hash": ranked,
            **({"metric": record.metric} if record.digest == ranked else {}),  # that of other scores says nothing
            "tagging": str(tagging),
            "enumeration": str(parameters["enumeration"]),
            "ranking": str(refs.ranking),
            **({"prediction": str(refs.prediction)} if refs.prediction else {}),
            **({"selection": str(refs.selection)} if refs.selection else {}),
            "version": VERSION,
        },
    )


def _seed(facts: _Facts) -> int:
    return facts.artifacts.manifest(facts.refs.selection).provenance.seed if facts.refs.selection else 0


def _members(table: TagTable, offsets: npt.NDArray[np.int64], items: npt.NDArray[np.int32]) -> Mask:
    """(N,) which rows of `table` hold every pair of one slice."""
    keep = np.ones(len(table.codes), dtype=bool)
    for item in items[items >= 0]:
        column = int(np.searchsorted(offsets, item, side="right")) - 1
        keep &= table.codes[:, column] == item - offsets[column]
    return keep


def _error_slice(facts: _Facts, row: dict[str, Any], rank: int, items: npt.NDArray[np.int32]) -> page.ErrorSlice:
    pairs = facts.words(items)
    q = row["q_value"]
    return page.ErrorSlice(
        rank=rank,
        pairs=pairs,
        count=row["count"],
        mean=row["mean"],
        interval=(row["interval_low"], row["interval_high"]),
        drop=row["drop"],
        error_share=row["error_share"],
        q=None if q is None or math.isnan(q) else q,
        blame=tuple(row[f"blame_{i}"] for i in range(len(pairs))),
        told_by=row["family"],
        doubtful=facts.doubtful_of(pairs),
    )


def _error_slices(facts: _Facts, reader: ImageReader) -> tuple[page.ErrorSlice, ...]:
    # The surest first: among the lowest means, which ranks go by, many are luck. Untested ones (NaN) are last.
    surest = np.argsort(facts.errors.column("p_value").to_numpy(), kind="stable")[:MAX_SLICES]
    shown = facts.errors.take(surest)
    out = []
    for i, (row, items, at) in enumerate(zip(shown.to_pylist(), items_of(shown), surest.tolist(), strict=True)):
        found = _error_slice(facts, row, at + 1, items)
        if i < PICTURED_SLICES:
            found = replace(found, pictures=_pictures(facts, reader, _members(facts.table, facts.offsets, items)))
        out.append(found)
    return tuple(out)


def _cover(facts: _Facts, reader: ImageReader) -> page.Cover:
    """The families that cover the errors soonest; one that adds nothing is only counted."""
    table = facts.artifacts.read_part(facts.refs.ranking, "families")
    adding = table.filter(pc.greater(table.column("cover_rank"), 0)).sort_by("cover_rank")
    share = adding.column("covered_share").to_numpy()
    reached = {s: np.flatnonzero(share >= s - 1e-12) for s in SHARES}  # sums of shares end a hair off
    scored = ~np.isnan(facts.scores)
    held = np.zeros(len(scored), dtype=bool)
    families = []
    for family in adding.slice(0, MAX_FAMILIES).to_pylist():
        rank = family["representative"]
        line = facts.errors.slice(rank - 1, 1)
        items = items_of(line)[0]
        members = _members(facts.table, facts.offsets, items)
        found = _error_slice(facts, line.to_pylist()[0], rank, items)
        pictures = _pictures(facts, reader, members & ~held)
        held |= members
        families.append(
            page.Family(
                told_by=replace(found, pictures=pictures),
                member_count=len(family["members"]),
                error_share=family["covered_share"],
                instance_share=float(held[scored].mean()),
            )
        )
    return page.Cover(
        families=tuple(families),
        family_total=table.num_rows,
        needed=tuple((s, int(at[0]) + 1) for s, at in reached.items() if at.size),
        error_share=float(share[-1]) if share.size else 0.0,
    )


def _pictures(facts: _Facts, reader: ImageReader, members: Mask) -> tuple[page.Picture, ...]:
    """Of `members` those that score lowest, at most PICTURES; one whose image cannot be read is left out."""
    rows = np.flatnonzero(members & (np.nan_to_num(facts.scores, nan=1.0) < 1.0))
    rows = rows[np.argsort(facts.scores[rows], kind="stable")][:PICTURES]
    out: list[page.Picture] = []
    for position, row in zip(rows.tolist(), facts.rows.take(pa.array(rows)).to_pylist(), strict=True):
        try:
            image = reader.open(row["image_uri"])
            if row["left_px"] is not None:
                box = Box(row["left_px"], row["top_px"], row["width_px"], row["height_px"])
                image = crop(image, box, _CROP_MARGIN)
        except HiBug2Error:
            continue  # tagging has already said which images cannot be read
        out.append(page.Picture(thumbnail(image, PICTURE_PX), _caption(facts, row["label"], position)))
    return tuple(out)


def _caption(facts: _Facts, label: str | None, row: int) -> str:
    said = facts.predicted[row]
    if said is not None and label:
        return f"{label} → {said}"
    return f"{label or 'no label'}, score {facts.scores[row]:.2f}"


def _tag_scores(facts: _Facts) -> tuple[page.TagScore, ...]:
    out: list[page.TagScore] = []
    scored = ~np.isnan(facts.scores)
    for j, attribute in enumerate(facts.schema.attributes):
        codes = facts.table.codes[:, j]
        held = scored & (codes < len(attribute.tags))
        count = np.bincount(codes[held], minlength=len(attribute.tags))
        total = np.bincount(codes[held], weights=facts.scores[held], minlength=len(attribute.tags))
        out += [
            page.TagScore(attribute.name, tag, int(count[t]), float(total[t] / count[t]))
            for t, tag in enumerate(attribute.tags)
            if count[t]
        ]
    return tuple(out)


def _heatmaps(facts: _Facts, min_count: int) -> tuple[page.Heatmap, ...]:
    counts = facts.table.tag_counts.tolist()
    out = []
    for i, j in widest_pairs(facts.table.codes, facts.scores, counts, min_count, HEATMAPS):
        mean, count = cross(facts.table.codes, facts.scores, (i, counts[i]), (j, counts[j]))
        first, second = facts.schema.attributes[i], facts.schema.attributes[j]
        out.append(
            page.Heatmap(
                row_attribute=first.name,
                row_tags=first.tags,
                column_attribute=second.name,
                column_tags=second.tags,
                mean=tuple(tuple(None if np.isnan(m) else float(m) for m in row) for row in mean),
                count=tuple(tuple(int(c) for c in row) for row in count),
            )
        )
    return tuple(out)


def _predicted(facts: _Facts) -> tuple[tuple[page.PredictedSlice, ...], int]:
    if facts.refs.prediction is None:
        return (), 0
    table = facts.artifacts.read_part(facts.refs.prediction, "predicted")
    shown = table.slice(0, MAX_PREDICTED)
    out = []
    for i, (row, items) in enumerate(zip(shown.to_pylist(), items_of(shown), strict=True)):
        replaced = facts.schema.pairs[row["from_item"]]
        more = len(row["origin_ranks"]) - 1
        _, put_in = facts.schema.pairs[row["to_item"]]
        origin = f"error slice {row['origin_ranks'][0]}, {replaced[0]}: {replaced[1]} → {put_in}"
        out.append(
            page.PredictedSlice(
                rank=i + 1,
                pairs=facts.words(items),
                score=row["score"],
                origin=origin + (f" (and from {more} more)" if more else ""),
                replaced=replaced,
                doubtful=facts.doubtful_of(facts.words(items)),
            )
        )
    return tuple(out), table.num_rows


def _repair(facts: _Facts, outcomes: Outcomes) -> page.Repair | None:
    if facts.refs.selection is None:
        return None
    manifest = facts.artifacts.manifest(facts.refs.selection)
    picks = facts.artifacts.read_part(facts.refs.selection, "picks")
    ranks = picks.column("slice_rank").to_numpy()
    per_rank = np.bincount(ranks, minlength=facts.errors.num_rows + 1)
    asked = np.flatnonzero(per_rank[1:])
    items, means = items_of(facts.errors), facts.errors.column("mean").to_numpy()
    return page.Repair(
        budget=int(manifest.provenance.parameters["budget"]),
        picked=int(manifest.summary["pick_count"]),
        pool_count=int(manifest.summary["pool_count"]),
        unmatched_slices=int(manifest.summary["unmatched_slice_count"]),
        by_slice=tuple(
            page.SlicePicks(int(i) + 1, facts.words(items[i]), float(means[i]), int(per_rank[i + 1]))
            for i in asked[:MAX_PICK_SLICES]
        ),
        by_slice_total=int(asked.size),
        outcomes=outcomes.rows,
        test_count=outcomes.test_count,
        failing_test_count=outcomes.failing_test_count,
    )
