"""What the store holds for a team, typed: datasets, scores, schemas, tag tables, slices, rankings, runs.

Artifacts below a dataset live at `teams/<team>/datasets/<dataset>/<collection>/<id>/`, are named by the hash of what
they were made from, and count as there once their `manifest.json`, written last, is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from shared.errors import DataLoss, NotFound
from shared.names import Name, parse
from shared.schema import Schema, Task, schema_from_json, schema_to_json
from shared.store.store import Store
from shared.version import VERSION

Codes = npt.NDArray[np.uint16]

KEYPOINTS = pa.list_(
    pa.struct(
        [
            ("keypoint", pa.string()),
            ("x_px", pa.float64()),
            ("y_px", pa.float64()),
            ("visibility", pa.string()),
        ]
    )
)
INSTANCES = pa.schema(
    [
        pa.field("instance_id", pa.string(), nullable=False),
        pa.field("image_uri", pa.string(), nullable=False),
        pa.field("label", pa.string()),
        pa.field("split", pa.string(), nullable=False),
        pa.field("left_px", pa.float64()),
        pa.field("top_px", pa.float64()),
        pa.field("width_px", pa.float64()),
        pa.field("height_px", pa.float64()),
        pa.field("keypoints", KEYPOINTS),
        pa.field("kind", pa.string(), nullable=False),
        pa.field("given", pa.map_(pa.string(), pa.string())),
    ]
)
SCORES = pa.schema(
    [
        pa.field("instance_id", pa.string(), nullable=False),
        pa.field("score", pa.float64()),
        pa.field("predicted_label", pa.string()),
        pa.field("confidence", pa.float64()),
        pa.field("probabilities", pa.list_(pa.float32())),
    ]
)


def now() -> str:
    """The time as it is written into artifacts: RFC 3339, UTC, whole seconds."""
    return datetime.now(UTC).replace(microsecond=0).isoformat().replace("+00:00", "Z")


@dataclass(frozen=True)
class Provenance:
    """What an artifact was made from."""

    inputs: Mapping[str, str]  # name -> digest or resource name
    parameters: Mapping[str, Any] = field(default_factory=dict)
    prompt_digests: Mapping[str, str] = field(default_factory=dict)
    model_snapshot: str = ""
    seed: int = 0
    version: str = VERSION
    create_time: str = field(default_factory=now)


@dataclass(frozen=True)
class Manifest:
    """The closing page of an artifact: how it was made, and its figures."""

    provenance: Provenance
    summary: Mapping[str, Any]


@dataclass(frozen=True)
class DatasetRecord:
    dataset: str
    task: Task
    parts: tuple[str, ...]  # files of instances, in the order they were added
    digest: str
    instance_count: int
    splits: Mapping[str, int]
    main_objects: tuple[str, ...]
    create_time: str
    request_ids: tuple[str, ...] = ()


@dataclass(frozen=True)
class ModelRecord:
    dataset: str
    model: str
    metric: str
    digest: str
    scored_count: int
    mean_score: float
    create_time: str
    request_id: str = ""


@dataclass(frozen=True)
class TagTable:
    """Instances x attributes: `codes` (N, A) uint16, row i for `instance_ids[i]`; 65535 is unknown."""

    instance_ids: pa.StringArray
    codes: Codes
    schema: Schema

    @property
    def tag_counts(self) -> npt.NDArray[np.int64]:
        return self.schema.tag_counts

    def take(self, rows: npt.NDArray[np.int64]) -> TagTable:
        """The table of `rows` only."""
        return TagTable(self.instance_ids.take(pa.array(rows)), self.codes[rows], self.schema)


def table_digest(table: pa.Table) -> str:
    """Hash of a table's content, whatever its chunking."""
    digest = hashlib.sha256()
    with pa.ipc.new_stream(_HashSink(digest), table.schema.remove_metadata()) as writer:
        for batch in table.combine_chunks().replace_schema_metadata(None).to_batches():
            writer.write_batch(batch)
    return digest.hexdigest()[:32]


class _HashSink:
    """A file that only remembers the hash of what was written."""

    def __init__(self, digest: Any) -> None:
        self._digest = digest
        self.closed = False

    def write(self, data: Any) -> int:
        self._digest.update(data)
        return len(data)

    def flush(self) -> None: ...

    def close(self) -> None:
        self.closed = True


class Artifacts:
    """One team's artifacts. Blocking: async code calls it in a thread."""

    def __init__(self, store: Store, team: str) -> None:
        self.store = store
        self.team = team
        self._base = f"teams/{team}"

    # Datasets

    def _dataset(self, dataset: str, *parts: str) -> str:
        return "/".join((self._base, "datasets", dataset, *parts))

    def datasets(self) -> list[str]:
        return [d for d in self.store.names(f"{self._base}/datasets") if self.has_dataset(d)]

    def has_dataset(self, dataset: str) -> bool:
        return self.store.exists(self._dataset(dataset, "dataset.json"))

    def dataset(self, dataset: str) -> DatasetRecord:
        """NotFound when the team has no such dataset."""
        try:
            data = self.store.read_json(self._dataset(dataset, "dataset.json"))
        except NotFound as error:
            raise NotFound(
                f"there is no dataset '{dataset}'; 'hibug2 dataset list' shows those that are there"
            ) from error
        return DatasetRecord(
            dataset=data["dataset"],
            task=Task(data["task"]),
            parts=tuple(data["parts"]),
            digest=data["digest"],
            instance_count=data["instance_count"],
            splits=data["splits"],
            main_objects=tuple(data["main_objects"]),
            create_time=data["create_time"],
            request_ids=tuple(data.get("request_ids", ())),
        )

    def write_instances(self, dataset: str, table: pa.Table) -> str:
        """Store one part of the instances and return its name; it counts once a dataset record names it."""
        part = table_digest(table)
        self.store.write_table(self._dataset(dataset, "instances", f"{part}.parquet"), table)
        return part

    def write_dataset(self, record: DatasetRecord) -> None:
        self.store.write_json(self._dataset(record.dataset, "dataset.json"), asdict(record))

    def delete_dataset(self, dataset: str) -> None:
        """Remove the dataset and all that was made from it; its images are not ours and stay."""
        self.store.delete(self._dataset(dataset, "dataset.json"))
        self.store.delete(self._dataset(dataset))

    def instances(self, record: DatasetRecord) -> pa.Table:
        """All instances, columns as INSTANCES, in the order they were added."""
        parts = [
            self.store.read_table(self._dataset(record.dataset, "instances", f"{p}.parquet")) for p in record.parts
        ]
        return pa.concat_tables(parts).cast(INSTANCES).combine_chunks()

    # Models and scores

    def models(self, dataset: str) -> list[str]:
        names = self.store.names(self._dataset(dataset, "models"))
        return [n.removesuffix(".json") for n in names if n.endswith(".json")]

    def model(self, dataset: str, model: str) -> ModelRecord:
        """NotFound when no scores of this model were added."""
        try:
            return ModelRecord(**self.store.read_json(self._dataset(dataset, "models", f"{model}.json")))
        except NotFound as error:
            raise NotFound(f"dataset '{dataset}' has no model '{model}'; add its scores first") from error

    def write_scores(self, record: ModelRecord, table: pa.Table) -> None:
        self.store.write_table(self._dataset(record.dataset, "scores", f"{record.digest}.parquet"), table)
        self.store.write_json(self._dataset(record.dataset, "models", f"{record.model}.json"), asdict(record))

    def scores(self, record: ModelRecord) -> pa.Table:
        """Columns as SCORES, one row an instance that has a score or a prediction."""
        return self.scores_of(record.dataset, record.digest)

    def scores_of(self, dataset: str, digest: str) -> pa.Table:
        """The scores with this digest, also those that a model no longer has: artifacts name what they came from."""
        return self.store.read_table(self._dataset(dataset, "scores", f"{digest}.parquet"))

    def delete_model(self, dataset: str, model: str) -> None:
        self.store.delete(self._dataset(dataset, "models", f"{model}.json"))

    # Schemas

    def schemas(self, dataset: str) -> list[str]:
        names = (n.removesuffix(".json") for n in self.store.names(self._dataset(dataset, "schemas")))
        return [n for n in names if n != "current"]

    def write_schema(self, dataset: str, schema: Schema, provenance: Provenance) -> str:
        """Store `schema`, make it the dataset's current one, and return its id."""
        body = {"schema": schema_to_json(schema), "provenance": asdict(provenance)}
        path = self._dataset(dataset, "schemas", f"{schema.schema_id}.json")
        if not self.store.exists(path):  # a schema is its content: the first provenance stands
            self.store.write_json(path, body)
        self.store.write_json(self._dataset(dataset, "schemas", "current.json"), {"schema_id": schema.schema_id})
        return schema.schema_id

    def current_schema_id(self, dataset: str) -> str | None:
        path = self._dataset(dataset, "schemas", "current.json")
        return str(self.store.read_json(path)["schema_id"]) if self.store.exists(path) else None

    def schema(self, dataset: str, schema_id: str) -> tuple[Schema, Provenance]:
        """NotFound when there is none of this id."""
        try:
            body = self.store.read_json(self._dataset(dataset, "schemas", f"{schema_id}.json"))
        except NotFound as error:
            raise NotFound(f"dataset '{dataset}' has no schema '{schema_id}'") from error
        return schema_from_json(body["schema"]), Provenance(**body["provenance"])

    # Artifacts made from others

    def path(self, name: Name, *parts: str) -> str:
        """Where a file of the artifact `name` lives in the store."""
        return self._dataset(name.dataset, name.collection, name.id, *parts)

    def is_complete(self, name: Name) -> bool:
        return self.store.exists(self.path(name, "manifest.json"))

    def complete(self, name: Name, manifest: Manifest) -> None:
        """Write the manifest: from now on the artifact is there."""
        self.store.write_json(self.path(name, "manifest.json"), asdict(manifest))

    def manifest(self, name: Name) -> Manifest:
        """NotFound when the artifact is absent or not finished."""
        try:
            body = self.store.read_json(self.path(name, "manifest.json"))
        except NotFound as error:
            raise NotFound(f"there is no {name}, or it is not finished") from error
        return Manifest(Provenance(**body["provenance"]), body["summary"])

    def write_part(self, name: Name, part: str, table: pa.Table) -> None:
        self.store.write_table(self.path(name, f"{part}.parquet"), table)

    def write_batches(self, name: Name, part: str, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> int:
        """As `write_part`, batch by batch; returns the number of rows."""
        return self.store.write_batches(self.path(name, f"{part}.parquet"), schema, batches)

    def read_part(self, name: Name, part: str) -> pa.Table:
        return self.store.read_table(self.path(name, f"{part}.parquet"))

    def tag_table(self, name: Name) -> TagTable:
        """The finished tag table of a tagging; NotFound or DataLoss otherwise."""
        manifest = self.manifest(name)
        schema, _ = self.schema(name.dataset, str(manifest.provenance.parameters["schema"]))
        return tag_table_of(self.read_part(name, "tags"), schema)

    def tagged(self, name: Name, splits: Collection[str] | None = None) -> tuple[TagTable, pa.Table]:
        """The tag table of a tagging and its instances (columns as INSTANCES), row for row; of `splits` only, if given.

        In the table's order, which is that in which the instances were added. Empty where no tagged instance is in
        `splits`. Raises as `tag_table` and `dataset` do.
        """
        table = self.tag_table(name)
        instances = self.instances(self.dataset(name.dataset))
        position = pc.index_in(table.instance_ids, value_set=instances.column("instance_id").combine_chunks())
        if splits is not None:
            split = instances.column("split").combine_chunks().take(position)
            chosen = pc.is_in(split, value_set=pa.array(list(splits), pa.string()))
            rows = np.flatnonzero(chosen.to_numpy(zero_copy_only=False))
            table, position = table.take(rows), position.take(pa.array(rows))
        return table, instances.take(position)

    # Checks of tags

    def write_quality(self, name: Name, body: Mapping[str, Any]) -> None:
        """Keep what a check says of the tags of a tagging; `name` is the tagging's, the check's or `checked_schema`."""
        self.store.write_json(self.path(name, "quality.json"), body)

    def quality(self, name: Name) -> dict[str, Any]:
        """What the last check of a tagging, or this check, says; NotFound when there was none."""
        found: dict[str, Any] = self.store.read_json(self.path(name, "quality.json"))
        return found

    def doubtful_attributes(self, tagging: Name) -> frozenset[str]:
        """Attributes whose tags the last check found not to be relied on; none where nobody has checked.

        A tagging that was not checked goes by the last check of its schema: images were added, or mended, since.
        """
        try:
            if not self.store.exists(self.path(tagging, "quality.json")):
                tagging = checked_schema(tagging.dataset, str(self.manifest(tagging).provenance.parameters["schema"]))
            return frozenset(a["attribute"] for a in self.quality(tagging)["attributes"] if a["doubt"])
        except NotFound:
            return frozenset()

    def doubtful_in(self, ranking: Name) -> frozenset[str]:
        """As `doubtful_attributes`, of the tagging whose slices `ranking` ranks."""
        tagging = str(self.manifest(ranking).provenance.parameters["tagging"])
        return self.doubtful_attributes(parse(tagging, "taggings", "tagging"))

    # Runs

    def runs(self) -> list[str]:
        return self.store.names(f"{self._base}/runs")

    def run_path(self, run: str, file: str) -> str:
        return f"{self._base}/runs/{run}/{file}"


def checked_schema(dataset: str, schema_id: str) -> Name:
    """Where the last check of all taggings by a schema is kept."""
    return Name(dataset, "checked", schema_id)


def teams(store: Store) -> list[str]:
    """Every team that has anything in the store."""
    return store.names("teams")


def tags_to_arrow(table: TagTable) -> pa.Table:
    """`instance_id`, then a uint16 column an attribute, in schema order."""
    columns = [table.instance_ids, *(pa.array(np.ascontiguousarray(c)) for c in table.codes.T)]
    return pa.table(columns, names=["instance_id", *table.schema.names()])


def tag_table_of(table: pa.Table, schema: Schema) -> TagTable:
    """The inverse of `tags_to_arrow`; DataLoss when the columns are not the schema's."""
    if table.column_names != ["instance_id", *schema.names()]:
        raise DataLoss("the tag table's columns are not the attributes of its schema")
    codes = np.empty((table.num_rows, len(schema.attributes)), dtype=np.uint16)
    for i in range(len(schema.attributes)):
        codes[:, i] = table.column(i + 1).to_numpy()
    ids = table.column(0).combine_chunks()
    return TagTable(ids if isinstance(ids, pa.StringArray) else pa.array(ids, pa.string()), codes, schema)


def column_by_id(table: pa.Table, ids: pa.StringArray, column: str) -> pa.Array:
    """`column` of a table keyed by `instance_id`, laid out in the order of `ids`; null where it has no row."""
    position = pc.index_in(ids, value_set=table.column("instance_id").combine_chunks())
    return table.column(column).combine_chunks().take(position)


def scores_in_order(scores: pa.Table, ids: pa.StringArray) -> npt.NDArray[np.float64]:
    """(N,) float64 scores in the order of `ids`; NaN where an instance is not scored."""
    values = column_by_id(scores, ids, "score")
    return np.asarray(pc.fill_null(values, float("nan")).to_numpy(zero_copy_only=False), dtype=np.float64)


def item_columns(items: npt.NDArray[np.signedinteger]) -> dict[str, pa.Array]:
    """Slice items (S, D) as int32 columns item_0 … item_{D-1}."""
    return {f"item_{i}": pa.array(items[:, i].astype(np.int32)) for i in range(items.shape[1])}


def items_of(table: pa.Table) -> npt.NDArray[np.int32]:
    """The inverse of `item_columns`: (S, D) int32, padded with -1."""
    names: Sequence[str] = [n for n in table.column_names if n.startswith("item_")]
    out = np.empty((table.num_rows, len(names)), dtype=np.int32)
    for i in range(len(names)):
        out[:, i] = table.column(f"item_{i}").to_numpy()
    return out
