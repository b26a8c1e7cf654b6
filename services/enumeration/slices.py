"""Enumerations and rankings as artifacts: from tag tables and scores to Parquet, and back for readers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from services.enumeration import engine, lattice
from services.enumeration.hypothesis import hypothesis_rows
from services.enumeration.read import (
    TAGS,
    Vocabulary,
    blame_column,
    doubtful_column,
    schema_vocabulary,
    tags_column,
    vocabulary,
)
from services.enumeration.selection import take
from services.enumeration.table import Table
from shared import metrics
from shared.errors import invalid
from shared.names import Name
from shared.schema import Schema
from shared.store.artifacts import (
    Artifacts,
    Manifest,
    Provenance,
    TagTable,
    item_columns,
    items_of,
)

OnProgress = Callable[[int, int], None]
Terms = Mapping[int, list[int]]  # attribute -> tag codes, any of which will do
Cancelled = Callable[[], bool]
_BATCH_ROWS = 8192
_JUDGED = ("drop", "parent_drop", "error_share", "interval_low", "interval_high")


def rows_of_split(artifacts: Artifacts, tagging: Name, split: str) -> TagTable:
    """The tag table of the instances of `split`; InvalidInput when there are none."""
    table, _ = artifacts.tagged(tagging, [split])
    if not len(table.codes):
        there = artifacts.tagged(tagging)[1].column("split").unique().to_pylist()
        raise invalid("split", f"no tagged instance is in '{split}'; there are {sorted(there)}")
    return table


def estimated(artifacts: Artifacts, tagging: Name, split: str, min_count: int, max_depth: int) -> float:
    """About how many slices `enumerate_artifact` would find."""
    table = rows_of_split(artifacts, tagging, split)
    return lattice.estimate_slices(table.codes, table.tag_counts, min_count=min_count, max_depth=max_depth, seed=0)


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
    chunks = engine.stream_slices(
        table.codes,
        table.tag_counts,
        None,
        min_count=min_count,
        max_depth=max_depth,
        max_slices=max_slices,
        on_progress=on_progress,
        cancelled=cancelled,
    )
    schema = pa.schema([*((f"item_{i}", pa.int32()) for i in range(max_depth)), ("count", pa.int64())])
    batches = (
        pa.record_batch([*item_columns(chunk.items).values(), pa.array(chunk.count, pa.int64())], schema=schema)
        for chunk in chunks
    )
    slice_count = artifacts.write_batches(name, "slices", schema, batches)
    metrics.SLICES.inc(slice_count)
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
            {"slice_count": slice_count, "instance_count": len(table.codes)},
        ),
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
    blame: npt.NDArray[np.float64] | None  # (S, D) each pair's share of the drop, rankings only

    def arrow(self, positions: npt.NDArray[np.int64], doubtful: Set[str]) -> pa.Table:
        """The slices at `positions`: tags (list of struct attribute, tag), rank for rankings, and every number.

        Beside them `doubtful` (list of string), the attributes of each that are not to be relied on.
        """
        columns = {"tags": tags_column(self.items[positions], self.words)}
        if self.is_ranking:
            columns["rank"] = pa.array(positions + 1)
        for name, values in self.columns.items():
            if name != "depth":  # told by the tags; NaN stands for what was not tested
                columns[name] = pa.array(values[positions], from_pandas=True)
        if self.blame is not None:
            columns["blame"] = blame_column(self.items[positions], self.blame[positions], self.words)
        columns["doubtful"] = doubtful_column(self.items[positions], self.words, doubtful)
        return pa.table(columns)


def open_slices(artifacts: Artifacts, name: Name) -> StoredSlices:
    """Read an enumeration or a ranking; NotFound when it is absent or unfinished."""
    parameters = artifacts.manifest(name).provenance.parameters
    schema, _ = artifacts.schema(name.dataset, str(parameters["schema"]))
    is_ranking = name.collection == "rankings"
    table = artifacts.read_part(name, "error_slices" if is_ranking else "slices")
    items = items_of(table)
    numbers = [c for c in table.column_names if not c.startswith(("item_", "blame_"))]
    blame = (
        np.column_stack([table.column(f"blame_{i}").to_numpy() for i in range(items.shape[1])]) if is_ranking else None
    )
    columns = {"depth": (items >= 0).sum(axis=1), **{c: table.column(c).to_numpy() for c in numbers}}
    tagging = Name(name.dataset, "taggings", str(parameters["tagging"]).rpartition("/")[2])
    return StoredSlices(
        items, columns, schema_vocabulary(schema), schema, tagging, str(parameters["split"]), is_ranking, blame
    )


def slice_instances(artifacts: Artifacts, stored: StoredSlices, terms: Terms) -> list[str]:
    """Ids of the instances that hold a tag of each of `terms`."""
    table = rows_of_split(artifacts, stored.tagging, stored.split)
    rows = hypothesis_rows(table.codes, table.tag_counts, terms) if terms else np.arange(len(table.codes))
    ids: list[str] = table.instance_ids.take(pa.array(rows)).to_pylist()
    return ids


@dataclass(frozen=True)
class TableRequest:
    """What is asked of a table that was sent along.

    error_column: position of the score column whose error slices are wanted; None for all slices.
    top: at most so many error slices, None for all.
    """

    table: Table
    score_columns: tuple[str, ...]
    min_count: int
    max_depth: int
    must_hold: int | None = None
    error_column: int | None = None
    margin: float = 0.0
    top: int | None = None


def table_batches(
    request: TableRequest, max_slices: int, cancelled: Cancelled
) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
    """The slices of a table with their words, each batch made when it is asked for: tags in words take much room.

    Columns: tags, count, and <score>_count and <score>_mean a score column. With `error_column` error slices alone, by
    rank, with drop, parent_drop, error_share, interval_low and interval_high beside. Raises as the engine does.
    """
    table = request.table
    words = vocabulary(table.names, table.tag_sets)
    asked = (table.codes, table.tag_counts, table.scores)
    limits: dict[str, Any] = {
        "min_count": request.min_count,
        "max_depth": request.max_depth,
        "must_hold": request.must_hold,
        "max_slices": max_slices,
        "cancelled": cancelled,
    }
    schema = _table_schema(request.score_columns)
    if request.error_column is None:
        return schema, (
            _table_batch(take(chunk, np.arange(start, min(start + _BATCH_ROWS, len(chunk)))), words, schema, [])
            for chunk in _counted(engine.stream_slices(*asked, **limits))
            for start in range(0, len(chunk), _BATCH_ROWS)
        )
    found = engine.error_slices(*asked, column=request.error_column, margin=request.margin, top=request.top, **limits)
    metrics.SLICES.inc(found.candidates)
    for name in _JUDGED:
        schema = schema.append(pa.field(name, pa.float64()))
    judged = ((start, found.errors(start, start + _BATCH_ROWS)) for start in range(0, len(found.slices), _BATCH_ROWS))
    return schema, (
        _table_batch(
            take(found.slices, np.arange(start, start + len(errors))),
            words,
            schema,
            [getattr(errors, name) for name in _JUDGED],
        )
        for start, errors in judged
    )


def _counted(chunks: Iterator[lattice.Slices]) -> Iterator[lattice.Slices]:
    for chunk in chunks:
        metrics.SLICES.inc(len(chunk))
        yield chunk


def _table_schema(score_columns: tuple[str, ...]) -> pa.Schema:
    fields = [pa.field("tags", TAGS), pa.field("count", pa.int64())]
    for name in score_columns:
        fields += [pa.field(f"{name}_count", pa.int64()), pa.field(f"{name}_mean", pa.float64())]
    return pa.schema(fields)


def _table_batch(
    found: lattice.Slices, words: Vocabulary, schema: pa.Schema, judged: list[npt.NDArray[np.float64]]
) -> pa.RecordBatch:
    columns = [tags_column(found.items, words), pa.array(found.count, pa.int64())]
    for k in range(found.total.shape[1]):
        scored, total = found.scored[:, k], found.total[:, k]
        mean = np.divide(total, scored, out=np.full(len(total), np.nan), where=scored > 0)
        columns += [pa.array(scored, pa.int64()), pa.array(mean, from_pandas=True)]  # no scored row: null
    return pa.record_batch([*columns, *map(pa.array, judged)], schema=schema)
