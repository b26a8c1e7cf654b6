"""A selection as an artifact: from a ranking and a pool to picks in Parquet."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from services.repair.selection import Selection, random_selection, select
from shared.errors import Precondition
from shared.names import Name
from shared.schema import MAIN_OBJECT, UNKNOWN, Schema
from shared.store.artifacts import (
    Artifacts,
    Manifest,
    ModelRecord,
    Provenance,
    TagTable,
    column_by_id,
    item_columns,
    items_of,
)

LOWEST_MEAN, RANDOM = "lowest_mean", "random"
_NOTHING = Selection(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0), np.empty(0, np.int64))


def pool_of(artifacts: Artifacts, tagging: Name, split: str) -> tuple[TagTable, pa.Table]:
    """Tags and instances (in the same order) of the pool; Precondition when the split holds no tagged instance."""
    table = artifacts.tag_table(tagging)
    instances = artifacts.instances(artifacts.dataset(tagging.dataset))
    position = pc.index_in(table.instance_ids, value_set=instances.column("instance_id").combine_chunks())
    rows = instances.take(position)
    chosen = np.flatnonzero(pc.equal(rows.column("split"), split).to_numpy())
    if chosen.size == 0:
        raise Precondition(f"there is no pool: no tagged instance is in the split '{split}'; add some and run again")
    return table.take(chosen), rows.take(pa.array(chosen))


def class_codes(schema: Schema, rows: pa.Table, scores: pa.Table) -> npt.NDArray[np.uint16]:
    """(N,) uint16 class of each pool instance: what the model says, else the label, else unknown.

    A pool has no labels as a rule; where it has, picking by label finds the ambiguous ones, which harm training.
    """
    attribute = schema.attribute(MAIN_OBJECT)
    predicted = column_by_id(scores, rows.column("instance_id").combine_chunks(), "predicted_label")
    named = pc.coalesce(predicted, rows.column("label").combine_chunks())
    codes = pc.fill_null(pc.index_in(named, value_set=pa.array(attribute.tags, pa.string())), UNKNOWN)
    return np.asarray(codes.to_numpy(zero_copy_only=False), dtype=np.uint16)


def pick_artifact(
    artifacts: Artifacts,
    name: Name,
    ranking: Name,
    model: ModelRecord,
    *,
    method: str,
    split: str,
    budget: int,
    seed: int,
) -> None:
    """Pick at most `budget` instances of the pool by `method` and store them as `name` (paper 4.1).

    A ranking without error slices asks for nothing: no picks, unless the method is random.
    """
    parameters = artifacts.manifest(ranking).provenance.parameters
    tagging = Name(name.dataset, "taggings", str(parameters["tagging"]).rpartition("/")[2])
    pool, rows = pool_of(artifacts, tagging, split)
    ids = pool.instance_ids.to_pylist()
    errors = artifacts.read_part(ranking, "error_slices")
    unmatched = 0
    if method == RANDOM:
        chosen = random_selection(ids, budget, seed)
    elif errors.num_rows == 0:
        chosen = _NOTHING
    else:
        codes = pool.codes.copy()
        if MAIN_OBJECT in pool.schema.names():
            column = pool.schema.names().index(MAIN_OBJECT)
            codes[:, column] = class_codes(pool.schema, rows, artifacts.scores(model))
        chosen = select(codes, pool.tag_counts, items_of(errors), errors.column("mean").to_numpy(), budget, ids=ids)
        unmatched = int(chosen.unmatched.size)
    artifacts.write_part(name, "picks", _picks(chosen, rows, errors))
    artifacts.complete(
        name,
        Manifest(
            Provenance(
                inputs={"ranking": str(ranking), "scores": model.digest},
                parameters={"method": method, "split": split, "budget": budget, "ranking": str(ranking)},
                seed=seed,
            ),
            {
                "method": method,
                "pick_count": int(chosen.index.size),
                "pool_count": len(ids),
                "unmatched_slice_count": unmatched,
            },
        ),
    )


def _picks(chosen: Selection, rows: pa.Table, errors: pa.Table) -> pa.Table:
    picked = rows.take(pa.array(chosen.index))
    by_slice = chosen.slice >= 0
    asked = errors.take(pa.array(np.where(by_slice, chosen.slice, 0))) if by_slice.any() else None
    columns = {
        "instance_id": picked.column("instance_id"),
        "image_uri": picked.column("image_uri"),
        "slice_rank": pa.array(np.where(by_slice, chosen.slice + 1, 0)),
        "slice_mean": pa.array(np.where(by_slice, chosen.mean, 0.0)),
    }
    if asked is not None:  # the pairs of the slice that asked, for those who read the file alone
        columns |= item_columns(items_of(asked))
    return pa.table(columns)
