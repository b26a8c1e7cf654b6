"""Enumerations and rankings as artifacts: from tag tables and scores to Parquet, and back for readers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from services.enumeration import lattice
from services.enumeration.error_slices import ErrorSlices, find_error_slices
from services.enumeration.read import TAGS, Vocabulary, schema_vocabulary, tags_column
from shared.errors import Precondition, invalid
from shared.names import Name
from shared.schema import Schema
from shared.store.artifacts import (
    Artifacts,
    Manifest,
    ModelRecord,
    Provenance,
    TagTable,
    column_by_id,
    item_columns,
    items_of,
    scores_in_order,
)

OnProgress = Callable[[int, int], None]
Cancelled = Callable[[], bool]


def rows_of_split(artifacts: Artifacts, tagging: Name, split: str) -> TagTable:
    """The tag table of the instances of `split`; InvalidInput when there are none."""
    table = artifacts.tag_table(tagging)
    instances = artifacts.instances(artifacts.dataset(tagging.dataset))
    splits = column_by_id(instances, table.instance_ids, "split")
    rows = np.flatnonzero(pc.equal(splits, split).to_numpy(zero_copy_only=False))
    if rows.size == 0:
        raise invalid("split", f"no tagged instance is in '{split}'; there are {sorted(set(splits.to_pylist()))}")
    return table.take(rows)


def enumerate_artifact(
    artifacts: Artifacts,
    name: Name,
    tagging: Name,
    split: str,
    min_count: int,
    max_depth: int,
    max_slices: int,
    on_progress: OnProgress,
    cancelled: Cancelled,
) -> None:
    """Enumerate the slices of a tagging's `split` and store them as `name`."""
    table = rows_of_split(artifacts, tagging, split)
    found = lattice.enumerate_slices(
        table.codes,
        table.tag_counts,
        None,
        min_count=min_count,
        max_depth=max_depth,
        max_slices=max_slices,
        on_progress=on_progress,
        cancelled=cancelled,
    )
    artifacts.write_part(name, "slices", pa.table({**item_columns(found.items), "count": pa.array(found.count)}))
    artifacts.complete(
        name,
        Manifest(
            Provenance(
                inputs={"tagging": str(tagging)},
                parameters={
                    "tagging": str(tagging),
                    "schema": table.schema.schema_id,
                    "split": split,
                    "min_count": min_count,
                    "max_depth": max_depth,
                },
            ),
            {"slice_count": len(found), "instance_count": len(table.codes)},
        ),
    )


def rank_artifact(
    artifacts: Artifacts,
    name: Name,
    enumeration: Name,
    model: ModelRecord,
    margin: float,
    on_progress: OnProgress,
    cancelled: Cancelled,
) -> None:
    """Score the slices of an enumeration for one model and store its error slices as `name`."""
    parameters = artifacts.manifest(enumeration).provenance.parameters
    tagging = Name(enumeration.dataset, "taggings", str(parameters["tagging"]).rpartition("/")[2])
    table = rows_of_split(artifacts, tagging, str(parameters["split"]))
    stored = artifacts.read_part(enumeration, "slices")
    items, count = items_of(stored), stored.column("count").to_numpy()
    scores = scores_in_order(artifacts.scores(model), table.instance_ids)
    scored = ~np.isnan(scores)
    if not scored.any():
        raise Precondition(
            f"model '{model.model}' has no score for any of the {len(scores)} {parameters['split']} instances; add them"
        )
    overall, loss = float(scores[scored].mean()), float((1.0 - scores[scored]).sum())
    per_slice, total = lattice.score_slices(
        table.codes, table.tag_counts, items, scores[:, None], on_progress=on_progress, cancelled=cancelled
    )
    slices = lattice.Slices(items, count, per_slice, total)
    found = find_error_slices(slices, 0, overall, loss, margin=margin)
    artifacts.write_part(name, "error_slices", _ranking_table(slices, found))
    artifacts.complete(
        name,
        Manifest(
            Provenance(
                inputs={"enumeration": str(enumeration), "scores": model.digest},
                parameters={
                    "enumeration": str(enumeration),
                    "tagging": str(tagging),
                    "schema": parameters["schema"],
                    "split": parameters["split"],
                    "min_count": parameters["min_count"],
                    "max_depth": parameters["max_depth"],
                    "model": model.model,
                    "margin": margin,
                },
            ),
            {
                "overall_mean": overall,
                "scored_count": int(scored.sum()),
                "slice_count": len(slices),
                "error_slice_count": int(found.index.size),
            },
        ),
    )


def _ranking_table(slices: lattice.Slices, found: ErrorSlices) -> pa.Table:
    return pa.table(
        {
            **item_columns(slices.items[found.index]),
            "count": pa.array(slices.count[found.index]),
            "scored_count": pa.array(slices.scored[found.index, 0]),
            "mean": pa.array(found.mean),
            "drop": pa.array(found.drop),
            "parent_drop": pa.array(found.parent_drop),
            "error_share": pa.array(found.error_share),
            "interval_low": pa.array(found.interval_low),
            "interval_high": pa.array(found.interval_high),
        }
    )


@dataclass(frozen=True)
class StoredSlices:
    """A stored enumeration or ranking, opened for reading. Rankings are in rank order."""

    items: npt.NDArray[np.int32]
    columns: dict[str, npt.NDArray[np.float64] | npt.NDArray[np.int64]]  # numbers by name, (S,)
    words: Vocabulary
    schema: Schema
    tagging: Name
    split: str
    is_ranking: bool

    def arrow(self, positions: npt.NDArray[np.int64]) -> pa.Table:
        """The slices at `positions`: tags (list of struct attribute, tag), rank for rankings, and every number."""
        columns = {"tags": tags_column(self.items[positions], self.words)}
        if self.is_ranking:
            columns["rank"] = pa.array(positions + 1)
        columns |= {k: pa.array(v[positions]) for k, v in self.columns.items() if k != "depth"}
        return pa.table(columns)


def open_slices(artifacts: Artifacts, name: Name) -> StoredSlices:
    """Read an enumeration or a ranking; NotFound when it is absent or unfinished."""
    parameters = artifacts.manifest(name).provenance.parameters
    schema, _ = artifacts.schema(name.dataset, str(parameters["schema"]))
    is_ranking = name.collection == "rankings"
    table = artifacts.read_part(name, "error_slices" if is_ranking else "slices")
    items = items_of(table)
    numbers = [c for c in table.column_names if not c.startswith("item_")]
    columns = {"depth": (items >= 0).sum(axis=1), **{c: table.column(c).to_numpy() for c in numbers}}
    tagging = Name(name.dataset, "taggings", str(parameters["tagging"]).rpartition("/")[2])
    return StoredSlices(
        items, columns, schema_vocabulary(schema), schema, tagging, str(parameters["split"]), is_ranking
    )


def slice_instances(artifacts: Artifacts, stored: StoredSlices, pairs: list[tuple[str, str]]) -> list[str]:
    """Ids of the instances that hold all `pairs` (attribute, tag); InvalidInput for what the schema lacks."""
    if len({a for a, _ in pairs}) != len(pairs):
        raise invalid("tags", "name each attribute once")
    table = rows_of_split(artifacts, stored.tagging, stored.split)
    keep = np.ones(len(table.codes), dtype=bool)
    for i, (attribute, tag) in enumerate(pairs):
        if attribute not in table.schema.names():
            raise invalid(f"tags[{i}].attribute", f"'{attribute[:80]}' is not in the schema")
        column = table.schema.names().index(attribute)
        if tag not in table.schema.attributes[column].tags:
            raise invalid(f"tags[{i}].tag", f"'{tag[:80]}' is no tag of '{attribute}'")
        keep &= table.codes[:, column] == table.schema.attributes[column].code(tag)
    ids: list[str] = table.instance_ids.filter(pa.array(keep)).to_pylist()
    return ids


def enumerated_table(found: lattice.Slices, words: Vocabulary, score_columns: tuple[str, ...]) -> pa.Table:
    """Slices of a table that was sent along: tags, count, and <score>_count and <score>_mean a score column."""
    columns: dict[str, pa.Array] = {"tags": tags_column(found.items, words), "count": pa.array(found.count)}
    fields = [pa.field("tags", TAGS), pa.field("count", pa.int64())]
    for k, name in enumerate(score_columns):
        scored, total = found.scored[:, k], found.total[:, k]
        mean = np.divide(total, scored, out=np.full(len(total), np.nan), where=scored > 0)
        columns[f"{name}_count"] = pa.array(scored)
        columns[f"{name}_mean"] = pa.array(mean, from_pandas=True)  # no scored row: null
        fields += [pa.field(f"{name}_count", pa.int64()), pa.field(f"{name}_mean", pa.float64())]
    return pa.table(list(columns.values()), schema=pa.schema(fields))
