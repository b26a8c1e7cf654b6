"""A prediction as an artifact: from a ranking to predicted slices in Parquet, by one of the methods."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from services.prediction.instruction import Confusion, Instructed, confusions
from services.prediction.prior import Cancelled, OnProgress, missing_slices
from services.prediction.ranked import Ranked
from services.prediction.substitution import embed_tags, substitute_tags
from shared.errors import Precondition
from shared.names import Name
from shared.store.artifacts import Manifest, Provenance, item_columns, items_of
from shared.text import TextEncoder

TAG_SUBSTITUTION, INSTRUCTION, PRIOR = "tag_substitution", "instruction", "prior"


def predict_by_substitution(
    ranked: Ranked,
    name: Name,
    encoder: TextEncoder,
    *,
    neighbours: int,
    max_per_class: int,
    max_origins: int,
    weights: str = "",
) -> None:
    """Vary the worst `max_origins` error slices by tag substitution (paper 4.2) and store what comes out as `name`.

    `weights` tells the encoder's weights from others of the same name, where it was given any.
    Precondition when the ranking has no error slices.
    """
    errors = ranked.error_slices.slice(0, max_origins)
    if not errors.num_rows:
        raise Precondition(
            f"{ranked.name} has no error slices to vary; rank with a lower margin or minimum count, or predict by "
            "prior or instruction"
        )
    found = substitute_tags(
        ranked.schema,
        items_of(errors),
        errors.column("drop").to_numpy(),
        ranked.enumerated,
        lambda main_object: embed_tags(ranked.schema, encoder, main_object),
        neighbours=neighbours,
        max_per_class=max_per_class,
    )
    origins = pa.ListArray.from_arrays(
        pa.array(found.origin_offsets.astype(np.int32)), pa.array(found.origin_indices + 1)
    )
    columns = {
        "origin_ranks": origins,
        "from_item": pa.array(found.from_item),
        "to_item": pa.array(found.to_item),
        "similarity": pa.array(found.similarity),
    }
    _store(
        ranked,
        name,
        TAG_SUBSTITUTION,
        _table(ranked, found.items, found.score, columns),
        inputs={"encoder": encoder.name} | ({"encoder_weights": weights} if weights else {}),
        parameters={"neighbours": neighbours, "max_per_class": max_per_class, "max_origins": max_origins},
    )


def predict_by_prior(
    ranked: Ranked,
    name: Name,
    *,
    pair_count: int | None,
    max_per_class: int,
    on_progress: OnProgress,
    cancelled: Cancelled,
) -> None:
    """Rank the unseen combinations by the missing-slice prior and store them as `name`; nothing when cancelled."""
    found = missing_slices(
        ranked.schema,
        ranked.table.codes,
        ranked.scores,
        min_count=ranked.min_count,
        max_depth=ranked.max_depth,
        pair_count=pair_count,
        max_per_class=max_per_class,
        on_progress=on_progress,
        cancelled=cancelled,
    )
    if cancelled():
        return
    _store(
        ranked,
        name,
        PRIOR,
        _table(ranked, found.items, found.score, {"expected_mean": pa.array(found.mean)}),
        parameters={"pair_count": pair_count, "max_per_class": max_per_class},
    )


def store_instructed(
    ranked: Ranked,
    name: Name,
    found: Instructed,
    *,
    pair_count: int,
    max_per_class: int,
    prompt_digests: Mapping[str, str],
    model: str,
) -> None:
    """Store what the language model `model` named as `name`."""
    _store(
        ranked,
        name,
        INSTRUCTION,
        _table(ranked, found.items, found.score, {"target": pa.array(found.target, pa.string())}),
        parameters={"pair_count": pair_count, "max_per_class": max_per_class},
        summary={"question_count": found.question_count, "dropped": dict(found.dropped)},
        prompt_digests=prompt_digests,
        model_snapshot=model,
    )


def confusions_of(ranked: Ranked, per_class: int) -> list[Confusion]:
    """What the ranked model takes each class for, at most `per_class` each; none where no labels were predicted."""
    return confusions(*ranked.classes(), per_class)


def _table(
    ranked: Ranked, items: npt.NDArray[np.int32], score: npt.NDArray[np.float64], columns: Mapping[str, pa.Array]
) -> pa.Table:
    """Predicted slices in rank order; the columns of other methods are null, origin_ranks empty.

    `known_count`: instances of the ranked split that hold all pairs; fewer than M.
    """
    n = len(score)
    padded = np.full((n, ranked.max_depth), -1, np.int32)
    padded[:, : items.shape[1]] = items
    known = [ranked.extents.count([i for i in row if i >= 0]) for row in items.tolist()]
    return pa.table(
        {
            **item_columns(padded),
            "score": pa.array(score),
            "known_count": pa.array(known, pa.int64()),
            "origin_ranks": pa.array([[]] * n, pa.list_(pa.int64())),
            "from_item": pa.nulls(n, pa.int32()),
            "to_item": pa.nulls(n, pa.int32()),
            "similarity": pa.nulls(n, pa.float64()),
            "target": pa.nulls(n, pa.string()),
            "expected_mean": pa.nulls(n, pa.float64()),
            **columns,
        }
    )


def _store(
    ranked: Ranked,
    name: Name,
    method: str,
    table: pa.Table,
    *,
    parameters: Mapping[str, Any],
    inputs: Mapping[str, str] | None = None,
    summary: Mapping[str, Any] | None = None,
    prompt_digests: Mapping[str, str] | None = None,
    model_snapshot: str = "",
) -> None:
    ranked.artifacts.write_part(name, "predicted", table)
    ranked.artifacts.complete(
        name,
        Manifest(
            Provenance(
                inputs={"ranking": str(ranked.name), **(inputs or {})},
                parameters={
                    "method": method,
                    "schema": ranked.schema.schema_id,
                    "ranking": str(ranked.name),
                    **parameters,
                },
                prompt_digests=dict(prompt_digests or {}),
                model_snapshot=model_snapshot,
            ),
            {"predicted_slice_count": table.num_rows, **(summary or {})},
        ),
    )
