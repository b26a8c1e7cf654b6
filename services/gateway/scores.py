"""Scores at the door: checked against the instances they speak about, or refused as a whole."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from shared.errors import Violation, invalid, refuse
from shared.store.artifacts import SCORES, column_by_id

_SHOWN = 20
_TEXT = (
    pa.types.is_string,
    pa.types.is_large_string,
    pa.types.is_string_view,
    pa.types.is_integer,
    pa.types.is_boolean,
    pa.types.is_floating,
    pa.types.is_null,
)
ACCURACY, CUSTOM = "accuracy", "custom"


def check_scores(table: pa.Table, instances: pa.Table) -> tuple[pa.Table, str]:
    """`table` as scores (columns and types as SCORES) of `instances`, and the metric that it holds.

    With a `score` column the scores are taken as they are (null: not scored); with `predicted_label` alone the score
    is 1 where it equals the label, 0 where it does not, null where the label is not known. Raises InvalidInput with a
    violation per fault: unknown or repeated id, NaN, a score outside [0, 1], nothing scored.
    """
    if "instance_id" not in table.column_names:
        raise invalid("scores.instance_id", "this column is missing")
    if table.num_rows == 0:
        raise invalid("scores", "there are none")
    if len(set(table.column_names)) != table.num_columns:
        raise invalid("scores", "two columns have the same name")
    has_score, has_label = "score" in table.column_names, "predicted_label" in table.column_names
    if not (has_score or has_label):
        raise invalid("scores", "neither a column score nor a column predicted_label is there")
    ids = _text(table, "instance_id")
    predicted = _text(table, "predicted_label") if has_label else pa.nulls(len(ids), pa.string())
    predicted = pc.if_else(pc.equal(predicted, ""), pa.scalar(None, pa.string()), predicted)
    found = list(_id_faults(ids, instances))
    if has_score:
        score = _numbers(table, "score")
        found += _range_faults(score, "score")
    refuse(found)
    if not has_score:
        label = column_by_id(instances, ids, "label")
        score = pc.cast(pc.equal(predicted, label), pa.float64())
    confidence = (
        _numbers(table, "confidence") if "confidence" in table.column_names else pa.nulls(len(ids), pa.float64())
    )
    refuse(_range_faults(confidence, "confidence"))
    out = pa.table([ids, score, predicted, confidence, _probabilities(table)], schema=SCORES)
    if pc.count(score).as_py() == 0:
        why = "every score is null" if has_score else "predicted labels were given for instances without a label"
        raise invalid("scores", f"no instance is scored: {why}")
    return out, CUSTOM if has_score else ACCURACY


def _text(table: pa.Table, name: str) -> pa.Array:
    column = table.column(name)
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if not any(is_text(kind) for is_text in _TEXT):
        raise invalid(f"scores.{name}", f"holds {column.type}, not text")
    return column.cast(kind).cast(pa.string()).combine_chunks()


def _numbers(table: pa.Table, name: str) -> pa.Array:
    column = table.column(name)
    if not (
        pa.types.is_floating(column.type)
        or pa.types.is_integer(column.type)
        or pa.types.is_boolean(column.type)
        or pa.types.is_null(column.type)
    ):
        raise invalid(f"scores.{name}", f"holds {column.type}, not numbers")
    return column.cast(pa.float64(), safe=False).combine_chunks()


def _probabilities(table: pa.Table) -> pa.Array:
    kind = pa.list_(pa.float32())
    if "probabilities" not in table.column_names:
        return pa.nulls(table.num_rows, kind)
    try:
        return table.column("probabilities").cast(kind).combine_chunks()
    except pa.ArrowException as error:
        raise invalid("scores.probabilities", f"is no list of numbers: {error}") from error


def _id_faults(ids: pa.Array, instances: pa.Table) -> Iterator[Violation]:
    known = pc.is_in(ids, value_set=instances.column("instance_id").combine_chunks()).to_numpy(zero_copy_only=False)
    for row in np.flatnonzero(~known)[:_SHOWN].tolist():
        yield Violation(f"scores[{row}].instance_id", f"'{ids[row]}' is no instance of the dataset")
    first = pc.index_in(ids, value_set=ids).to_numpy(zero_copy_only=False)
    for row in np.flatnonzero(first != np.arange(len(ids)))[:_SHOWN].tolist():
        yield Violation(f"scores[{row}].instance_id", f"'{ids[row]}' also has row {int(first[row])}")


def _range_faults(values: pa.Array, name: str) -> Iterator[Violation]:
    numbers = pc.fill_null(values, 0.0).to_numpy(zero_copy_only=False)
    wrong = ~((numbers >= 0) & (numbers <= 1))  # NaN compares false
    for row in np.flatnonzero(wrong)[:_SHOWN].tolist():
        yield Violation(f"scores[{row}].{name}", f"is {numbers[row]:g}; a score lies in [0, 1], null is not scored")
