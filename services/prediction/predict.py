"""A prediction as an artifact: from a ranking to predicted slices in Parquet, and back."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from services.prediction.encoder import TextEncoder
from services.prediction.substitution import Predictions, embed_tags, substitute_tags
from shared.names import Name
from shared.store.artifacts import Artifacts, Manifest, Provenance, item_columns, items_of

TAG_SUBSTITUTION = "tag_substitution"


def predict_artifact(
    artifacts: Artifacts,
    name: Name,
    ranking: Name,
    encoder: TextEncoder,
    *,
    neighbours: int,
    max_per_class: int,
    max_origins: int,
) -> None:
    """Vary the error slices of `ranking` by tag substitution (paper 4.2) and store what comes out as `name`.

    A ranking without error slices gives a prediction without slices.
    """
    parameters = artifacts.manifest(ranking).provenance.parameters
    schema, _ = artifacts.schema(name.dataset, str(parameters["schema"]))
    enumeration = Name(name.dataset, "enumerations", str(parameters["enumeration"]).rpartition("/")[2])
    errors = artifacts.read_part(ranking, "error_slices").slice(0, max_origins)
    if errors.num_rows:
        found = substitute_tags(
            schema,
            items_of(errors),
            errors.column("drop").to_numpy(),
            items_of(artifacts.read_part(enumeration, "slices")),
            embed_tags(schema, encoder),
            neighbours=neighbours,
            max_per_class=max_per_class,
        )
    else:
        found = _no_predictions(items_of(errors).shape[1])
    table = _predicted_table(found)
    artifacts.write_part(name, "predicted", table)
    artifacts.complete(
        name,
        Manifest(
            Provenance(
                inputs={"ranking": str(ranking), "encoder": encoder.name},
                parameters={
                    "method": TAG_SUBSTITUTION,
                    "schema": schema.schema_id,
                    "ranking": str(ranking),
                    "neighbours": neighbours,
                    "max_per_class": max_per_class,
                },
            ),
            {"predicted_slice_count": table.num_rows},
        ),
    )


def _predicted_table(found: Predictions) -> pa.Table:
    origins = pa.ListArray.from_arrays(
        pa.array(found.origin_offsets.astype(np.int32)), pa.array(found.origin_indices + 1)
    )
    return pa.table(
        {
            **item_columns(found.items),
            "score": pa.array(found.score),
            "origin_ranks": origins,
            "from_item": pa.array(found.from_item),
            "to_item": pa.array(found.to_item),
            "similarity": pa.array(found.similarity),
        }
    )


def _no_predictions(depth: int) -> Predictions:
    integers, numbers = np.empty(0, np.int32), np.empty(0, np.float64)
    return Predictions(
        items=np.empty((0, depth), np.int32),
        score=numbers,
        origin=integers.astype(np.int64),
        attribute=integers,
        from_item=integers,
        to_item=integers,
        similarity=numbers,
        origin_offsets=np.zeros(1, np.int64),
        origin_indices=integers.astype(np.int64),
    )
