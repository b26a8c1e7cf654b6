"""Any table as tags and scores: each column that is no score is an attribute, each distinct value a tag."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from shared.errors import Violation, invalid, refuse
from shared.schema import UNKNOWN


@dataclass(frozen=True)
class Table:
    """Codes (N, A) uint16 with UNKNOWN for null and empty, tag sets sorted by text, scores (N, K) float64."""

    names: tuple[str, ...]
    tag_sets: tuple[tuple[str, ...], ...]
    codes: npt.NDArray[np.uint16]
    scores: npt.NDArray[np.float64]

    @property
    def tag_counts(self) -> npt.NDArray[np.int64]:
        return np.array([len(t) for t in self.tag_sets], dtype=np.int64)


def read_table(table: pa.Table, score_columns: Sequence[str]) -> Table:
    """`table` with `score_columns` taken as scores in [0, 1]; null and NaN scores are "not scored".

    Raises InvalidInput naming the column: absent, twice there, no numbers, a score outside [0, 1], a column type
    that has no text, more than 65,535 distinct values.
    """
    missing = [c for c in score_columns if c not in table.column_names]
    refuse(Violation("score_columns", f"the table has no column '{c}'") for c in missing)
    if len(set(score_columns)) != len(score_columns):
        raise invalid("score_columns", "name each column once")
    if len(set(table.column_names)) != table.num_columns:
        raise invalid("table", "two columns have the same name")
    names = [c for c in table.column_names if c not in set(score_columns)]
    if not names:
        raise invalid("table", "every column is a score; at least one must be an attribute")
    if table.num_rows == 0:
        raise invalid("table", "holds no rows")
    scores = [_scores(table.column(c), c) for c in score_columns]
    coded = [_codes(table.column(c), c) for c in names]
    return Table(
        tuple(names),
        tuple(tags for _, tags in coded),
        np.column_stack([codes for codes, _ in coded]),
        np.column_stack(scores) if scores else np.empty((table.num_rows, 0)),
    )


def _scores(column: pa.ChunkedArray, name: str) -> npt.NDArray[np.float64]:
    if not (pa.types.is_floating(column.type) or pa.types.is_integer(column.type) or pa.types.is_boolean(column.type)):
        raise invalid(name, f"is a score column and holds {column.type}, not numbers")
    values = np.asarray(pc.fill_null(column.cast(pa.float64()), float("nan")).to_numpy(), dtype=np.float64)
    wrong = np.flatnonzero((values < 0) | (values > 1))
    if wrong.size:
        raise invalid(name, f"row {int(wrong[0])} holds {values[wrong[0]]:g}; scores lie in [0, 1]")
    return values


def _codes(column: pa.ChunkedArray, name: str) -> tuple[npt.NDArray[np.uint16], tuple[str, ...]]:
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pa.types.is_nested(column.type) or pa.types.is_binary(column.type):
        raise invalid(name, f"holds {column.type}; an attribute column holds text, numbers or booleans")
    text = column.cast(pa.string()).combine_chunks()
    text = pc.if_else(pc.equal(text, ""), pa.scalar(None, pa.string()), text)
    tags = pc.drop_null(pc.unique(text))
    if len(tags) > UNKNOWN:
        raise invalid(name, f"has {len(tags)} distinct values; an attribute has at most {UNKNOWN}")
    tags = tags.take(pc.sort_indices(tags))
    codes = pc.fill_null(pc.index_in(text, value_set=tags), UNKNOWN)
    return codes.to_numpy(zero_copy_only=False).astype(np.uint16), tuple(tags.to_pylist())
