"""A selection as an artifact: from a ranking and a pool to picks in Parquet."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from services.repair.diversity import tag_vectors
from services.repair.methods import BY_SLICES, ErrorSlices, Method, Picks, Question, Rules, Units, pick
from services.repair.selection import Pool
from shared.errors import InvalidInput, Precondition, invalid
from shared.images.reader import RGB
from shared.names import Name, parse
from shared.schema import MAIN_OBJECT, UNKNOWN, Schema, Task
from shared.store.artifacts import (
    Artifacts,
    Manifest,
    Provenance,
    TagTable,
    column_by_id,
    item_columns,
    items_of,
)

TRAIN = "train"
MAX_VECTOR_BYTES = 384 << 20  # of the ids and vectors of a file, as held; picking takes four times as much
_BATCH_ROWS = 1024

ReadFile = Callable[[str], bytes]
OpenImage = Callable[[str], RGB]


@dataclass(frozen=True)
class Wanted:
    """What is asked for; everything that a selection hangs on beside the ranking and the scores."""

    method: Method
    budget: int
    split: str
    seed: int = 0
    rivals: tuple[Method, ...] = ()
    class_quota: int = 0
    excluded_ids: tuple[str, ...] = ()
    without_near_copies: bool = False
    spread: bool = False
    one_per_family: bool = False
    embeddings_uri: str = ""


def pool_of(artifacts: Artifacts, tagging: Name, split: str) -> tuple[TagTable, pa.Table]:
    """Tags and instances (in the same order) of the pool; Precondition when the split holds no tagged instance."""
    table, rows = artifacts.tagged(tagging, [split])
    if not rows.num_rows:
        raise Precondition(f"there is no pool: no tagged instance is in the split '{split}'; add some and run again")
    return table, rows


def class_codes(schema: Schema, rows: pa.Table, scores: pa.Table) -> npt.NDArray[np.uint16]:
    """(N,) uint16 class of each pool instance: what the model says, else the label, else unknown.

    A pool has no labels as a rule; where it has, picking by label finds the ambiguous ones, which harm training.
    """
    predicted = column_by_id(scores, rows.column("instance_id").combine_chunks(), "predicted_label")
    labels = pc.coalesce(predicted, rows.column("label").combine_chunks())
    tags = pa.array(schema.attribute(MAIN_OBJECT).tags, pa.string())
    codes = pc.fill_null(pc.index_in(labels, value_set=tags), UNKNOWN)
    return np.asarray(codes.to_numpy(zero_copy_only=False), dtype=np.uint16)


def tagging_of(artifacts: Artifacts, ranking: Name) -> Name:
    """The tagging that a ranking stands on; Precondition when it was made anew with another schema since."""
    parameters = artifacts.manifest(ranking).provenance.parameters
    tagging = parse(str(parameters["tagging"]), "taggings", "ranking", within=ranking.dataset)
    tagged_with = str(artifacts.manifest(tagging).provenance.parameters["schema"])
    ranked_with = str(parameters["schema"])
    if tagged_with.rpartition("/")[2] != ranked_with.rpartition("/")[2]:
        raise Precondition(
            f"{tagging} has the schema {tagged_with}, and {ranking} was made with {ranked_with}: their tags do not "
            "mean the same; run again"
        )
    return tagging


def scores_digest(artifacts: Artifacts, ranking: Name) -> str:
    """Of the scores that were ranked, whatever the model has now."""
    return str(artifacts.manifest(ranking).provenance.inputs["scores"])


def ranked_scores(artifacts: Artifacts, ranking: Name) -> pa.Table:
    """The scores that were ranked; columns as SCORES."""
    return artifacts.scores_of(ranking.dataset, scores_digest(artifacts, ranking))


def check_asked(artifacts: Artifacts, ranking: Name, wanted: Wanted) -> None:
    """Precondition when the method goes by error slices, and the ranking has none that could ask for anything."""
    if wanted.method in BY_SLICES and not artifacts.read_part(ranking, "error_slices").num_rows:
        raise Precondition(
            f"{ranking} has no error slices to pick for; rank with a lower margin or minimum count, or pick by random "
            "or another method that looks at no slice"
        )


def error_slices_of(table: pa.Table) -> ErrorSlices:
    """The error slices of a ranking; a ranking of an older version may lack p-values and families."""

    def column(name: str, missing: float) -> npt.NDArray[np.float64]:
        if name not in table.column_names:
            return np.full(table.num_rows, missing)
        return np.asarray(table.column(name).to_numpy(), dtype=np.float64)

    return ErrorSlices(
        items=items_of(table),
        mean=column("mean", 0),
        drop=column("drop", 0),
        count=column("count", 0).astype(np.int64),
        p_value=column("p_value", 1),
        family=column("family", 0).astype(np.int64),
    )


def question_of(
    artifacts: Artifacts, ranking: Name, split: str, *, read_file: ReadFile, embeddings_uri: str
) -> tuple[Question, pa.Table]:
    """All that the methods look at, and the pool's instances; Precondition when the split holds no tagged instance."""
    parameters = artifacts.manifest(ranking).provenance.parameters
    tagging = tagging_of(artifacts, ranking)
    table, rows = pool_of(artifacts, tagging, split)
    ids = table.instance_ids
    scores = ranked_scores(artifacts, ranking)
    codes, column = table.codes.copy(), None
    if MAIN_OBJECT in table.schema.names():
        column = table.schema.names().index(MAIN_OBJECT)
        codes[:, column] = class_codes(table.schema, rows, scores)

    def vectors() -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        known, _ = artifacts.tagged(tagging, [TRAIN])
        if not len(known.codes):
            known, _ = artifacts.tagged(tagging, [str(parameters.get("split", "validation"))])
        if embeddings_uri:
            return _embeddings(read_file(embeddings_uri), embeddings_uri, ids, known.instance_ids)
        return tag_vectors(codes, table.tag_counts), tag_vectors(known.codes, table.tag_counts)

    question = Question(
        pool=Pool(ids.to_pylist(), codes, table.tag_counts),
        units=_units(rows, table.schema.task),
        errors=error_slices_of(artifacts.read_part(ranking, "error_slices")),
        class_column=column,
        confidences=column_by_id(scores, ids, "confidence"),
        probabilities=column_by_id(scores, ids, "probabilities"),
        vectors=vectors,
    )
    return question, rows


def pick_artifact(
    artifacts: Artifacts,
    name: Name,
    ranking: Name,
    wanted: Wanted,
    *,
    read_file: ReadFile,
    open_image: OpenImage,
    cancelled: Callable[[], bool] = lambda: False,
) -> None:
    """Pick at most `wanted.budget` of the pool and store the picks, and those of the rivals, as `name` (paper 4.1).

    Rivals pick as many as the method itself found. Raises what `pick` raises, Stopped when it is `cancelled` among it,
    and InvalidInput for a file of embeddings that does not fit the pool.
    """
    question, rows = question_of(
        artifacts, ranking, wanted.split, read_file=read_file, embeddings_uri=wanted.embeddings_uri
    )
    first_row = _first_rows(question.units)
    uris = rows.column("image_uri")

    def open_unit(unit: int) -> RGB:
        return open_image(uris[int(first_row[unit])].as_py())

    excluded = pc.is_in(rows.column("instance_id"), value_set=pa.array(wanted.excluded_ids, pa.string()))
    rules = Rules(
        quota=wanted.class_quota,
        excluded=excluded.to_numpy(),
        open_image=open_unit if wanted.without_near_copies else None,
        spread=wanted.spread,
        one_per_family=wanted.one_per_family,
        cancelled=cancelled,
    )
    own = pick(question, wanted.method, wanted.budget, rules, seed=wanted.seed)
    found = {wanted.method: own}
    for rival in wanted.rivals:
        if rival not in found and len(own):
            found[rival] = pick(question, rival, len(own), rules, seed=wanted.seed)
    matches = np.zeros(len(question.units.ids), bool)
    matches[question.units.of[question.first_slices[0] >= 0]] = True
    scores = ranked_scores(artifacts, ranking)
    for method, picks in found.items():
        part = "picks" if method is wanted.method else f"picks_{method}"
        artifacts.write_part(name, part, _table(picks, question, rows, scores))
    artifacts.complete(
        name,
        Manifest(
            Provenance(
                inputs={"ranking": str(ranking), "scores": scores_digest(artifacts, ranking)},
                parameters={**_parameters(wanted), "ranking": str(ranking)},
                seed=wanted.seed,
            ),
            {
                "method": wanted.method,
                "pick_count": len(own),
                "pool_count": len(question.units.ids),
                "unmatched_slice_count": int((question.first_slices[1] == 0).sum()),
                "methods": [
                    {
                        "method": method,
                        "pick_count": len(picks),
                        "shared_count": len(np.intersect1d(picks.unit, own.unit)),
                        "matching_count": int(matches[picks.unit].sum()),
                    }
                    for method, picks in found.items()
                ],
                "near_copies": own.copies,
                "unreadable": own.unreadable,
            },
        ),
    )


def read_picks(artifacts: Artifacts, name: Name, method: Method | None) -> tuple[pa.Table, Sequence[tuple[str, str]]]:
    """The picks of a selection by one of its methods (None: its own), and the (attribute, tag) of each item.

    NotFound when the selection is not there; InvalidInput when it has no picks by the method.
    """
    manifest = artifacts.manifest(name)
    own = manifest.summary["method"]
    if method is not None:
        pick_count(name, manifest.summary, method)
    table = artifacts.read_part(name, "picks" if method in (None, own) else f"picks_{method}")
    ranking = parse(str(manifest.provenance.parameters["ranking"]), "rankings", "parent")
    tagging = parse(str(artifacts.manifest(ranking).provenance.parameters["tagging"]), "taggings", "parent")
    schema, _ = artifacts.schema(name.dataset, str(artifacts.manifest(tagging).provenance.parameters["schema"]))
    return table, schema.pairs


def pick_count(name: Name, summary: Mapping[str, Any], method: str) -> int:
    """How many picks the selection has by one of its methods; InvalidInput when it has none."""
    counts = {str(summary["method"]): int(summary["pick_count"])}
    counts |= {m["method"]: m["pick_count"] for m in summary.get("methods", ())}
    if method not in counts:
        raise invalid("method", f"{name} has no picks by {method}; it has {', '.join(counts)}")
    return counts[method]


def _parameters(wanted: Wanted) -> dict[str, object]:
    said = asdict(wanted)
    said.pop("seed")
    excluded = said.pop("excluded_ids")
    return {**said, "rivals": list(wanted.rivals), "excluded_count": len(excluded)}


def _table(picks: Picks, question: Question, rows: pa.Table, scores: pa.Table) -> pa.Table:
    errors = question.errors
    asked = picks.slice >= 0
    at = np.where(asked, picks.slice, 0)
    instance = _reasons(picks, question)
    picked = rows.take(pa.array(instance))
    columns = {
        "instance_id": picked.column("instance_id"),
        "image_uri": picked.column("image_uri"),
        "slice_rank": pa.array(np.where(asked, picks.slice + 1, 0)),
        "slice_mean": pa.array(np.where(asked, errors.mean[at], 0.0) if len(errors) else np.zeros(len(picks))),
        "pool_index": pa.array(picks.unit),
        "predicted_label": column_by_id(scores, picked.column("instance_id").combine_chunks(), "predicted_label"),
        "value": pa.array(picks.value, from_pandas=True),
    }
    if asked.any():  # the pairs of the slice that asked, for those who read the file alone
        columns |= item_columns(np.where(asked[:, None], errors.items[at], -1).astype(np.int32))
    return pa.table(columns)


def _reasons(picks: Picks, question: Question) -> npt.NDArray[np.int64]:
    """(n,) the instance that stands for each pick: of an image the one that matches the slice, else its first."""
    if question.units.single:
        return picks.unit
    members: dict[int, list[int]] = {int(unit): [] for unit in picks.unit}
    wanted = np.isin(question.units.of, picks.unit)
    for row in np.flatnonzero(wanted).tolist():
        members[int(question.units.of[row])].append(row)
    pairs = np.cumsum(question.pool.tag_counts) - question.pool.tag_counts
    rows = []
    for unit, slice_ in zip(picks.unit.tolist(), picks.slice.tolist(), strict=True):
        items = question.errors.items[slice_] if slice_ >= 0 else np.empty(0, np.int32)
        has = [r for r in members[unit] if set(items[items >= 0]) <= set((question.pool.codes[r] + pairs).tolist())]
        rows.append((has or members[unit])[0])
    return np.array(rows, np.int64)


def _units(rows: pa.Table, task: Task) -> Units:
    """Instances in classification; else images with all their objects, in the order in which they were added."""
    if task is Task.CLASSIFICATION:
        return Units(rows.column("instance_id").to_pylist(), np.arange(rows.num_rows))
    images = rows.column("image_uri").combine_chunks().dictionary_encode()
    return Units(images.dictionary.to_pylist(), np.asarray(images.indices.to_numpy(), dtype=np.int64))


def _first_rows(units: Units) -> npt.NDArray[np.int64]:
    """(units,) the first instance of each."""
    return np.unique(units.of, return_index=True)[1].astype(np.int64)


_EMBEDDINGS = pa.schema([("instance_id", pa.string()), ("embedding", pa.list_(pa.float32()))])


def _embeddings(
    data: bytes, where: str, pool: pa.StringArray, known: pa.StringArray
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Vectors of the pool, and of those of `known` that the file has."""
    field = "options.embeddings_uri"
    text = f"{where} holds more than {MAX_VECTOR_BYTES:,} bytes of ids and vectors; give fewer or shorter vectors"
    try:
        table = _read_embeddings(data, invalid(field, text))
        ids, lists = (table.column(name).combine_chunks() for name in _EMBEDDINGS.names)
    except (pa.ArrowException, KeyError) as error:
        text = f"{where} is no Parquet file with instance_id and embedding (a list of numbers): {error}"
        raise invalid(field, text) from error
    width = pc.unique(pc.list_value_length(lists)).to_pylist()
    if len(width) != 1 or not width[0]:
        raise invalid(field, f"{where} holds embeddings of different lengths; give as many numbers for each instance")
    vectors = np.asarray(lists.flatten().to_numpy(zero_copy_only=False)).reshape(-1, width[0])
    if not np.isfinite(vectors).all():
        raise invalid(field, f"{where} holds numbers that are not finite")
    at = pc.index_in(pool, value_set=ids)
    if at.null_count:
        lacking = pool.filter(at.is_null())[0].as_py()
        raise invalid(field, f"{where} lacks {at.null_count:,} instances of the pool, '{lacking}' for one")
    return vectors[at.to_numpy()], vectors[pc.index_in(known, value_set=ids).drop_null().to_numpy()]


def _read_embeddings(data: bytes, too_large: InvalidInput) -> pa.Table:
    """Columns as _EMBEDDINGS of a Parquet file.

    Raises `too_large` before more than MAX_VECTOR_BYTES are held, KeyError for a column that is not there, and what
    pyarrow raises.
    """
    # Ids stay codes until it is known how long they get: a long one may be there a million times.
    file = pq.ParquetFile(pa.BufferReader(data), read_dictionary=["instance_id"])
    id_, vector = (file.schema_arrow.field(name).type for name in _EMBEDDINGS.names)
    is_list = pa.types.is_list(vector) or pa.types.is_large_list(vector) or pa.types.is_fixed_size_list(vector)
    if not (pa.types.is_dictionary(id_) or pa.types.is_integer(id_)):
        raise pa.ArrowTypeError(f"instance_id is {id_}")
    if not (is_list and pa.types.is_primitive(vector.value_type)):
        raise pa.ArrowTypeError(f"embedding is {vector}")
    groups = [file.metadata.row_group(g) for g in range(file.metadata.num_row_groups)]
    columns = [group.column(c) for group in groups for c in range(group.num_columns)]
    numbers = sum(c.num_values for c in columns if c.path_in_schema.partition(".")[0] == "embedding")
    if 4 * (file.metadata.num_rows + numbers) > MAX_VECTOR_BYTES:
        raise too_large
    batches, held = [], 0
    for batch in file.iter_batches(_BATCH_ROWS, columns=_EMBEDDINGS.names):
        ids, vectors = batch.column("instance_id"), batch.column("embedding").cast(_EMBEDDINGS.field("embedding").type)
        if pa.types.is_dictionary(id_):
            held += pc.sum(pc.binary_length(ids.dictionary).take(ids.indices)).as_py() or 0
        held += vectors.nbytes
        if held > MAX_VECTOR_BYTES:
            raise too_large
        batches.append(pa.record_batch([ids.cast(pa.string()), vectors], _EMBEDDINGS))
    return pa.Table.from_batches(batches, _EMBEDDINGS)
