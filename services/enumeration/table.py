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

_BYTES = (
    pa.types.is_binary,
    pa.types.is_large_binary,
    pa.types.is_fixed_size_binary,
    pa.types.is_binary_view,
)


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
    kinds = (pa.types.is_floating, pa.types.is_integer, pa.types.is_boolean, pa.types.is_null)
    if not any(is_kind(column.type) for is_kind in kinds):
        raise invalid(name, f"is a score column and holds {column.type}, not numbers")
    values = np.asarray(pc.fill_null(column.cast(pa.float64(), safe=False), float("nan")).to_numpy(), dtype=np.float64)
    wrong = np.flatnonzero((values < 0) | (values > 1))
    if wrong.size:
        raise invalid(name, f"row {int(wrong[0])} holds {values[wrong[0]]:g}; scores lie in [0, 1]")
    return values


def _codes(column: pa.ChunkedArray, name: str) -> tuple[npt.NDArray[np.uint16], tuple[str, ...]]:
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    try:
        if pa.types.is_nested(kind) or any(is_bytes(kind) for is_bytes in _BYTES):
            raise pa.ArrowTypeError(f"no text in {kind}")
        column = column.cast(kind)
        if pa.types.is_boolean(kind):
            column = pc.if_else(column, "True", "False")  # as Python and pandas write them
        text = column.cast(pa.string()).combine_chunks()
    except pa.ArrowException as error:
        text_of = "an attribute column holds text, numbers or booleans"
        raise invalid(name, f"holds {column.type}; {text_of}") from error
    text = pc.if_else(pc.equal(text, ""), pa.scalar(None, pa.string()), text)
    tags = pc.drop_null(pc.unique(text))
    if len(tags) > UNKNOWN:
        raise invalid(name, f"has {len(tags)} distinct values; an attribute has at most {UNKNOWN}")
    tags = tags.take(pc.sort_indices(tags))
    codes = pc.fill_null(pc.index_in(text, value_set=tags), UNKNOWN)
    return codes.to_numpy(zero_copy_only=False).astype(np.uint16), tuple(tags.to_pylist())
