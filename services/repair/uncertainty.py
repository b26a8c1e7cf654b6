"""How unsure the model is of each pool instance: the rivals that look at its probabilities alone (paper 5.5)."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from shared.errors import Precondition, invalid

Floats = NDArray[np.float64]


def probability_rows(column: pa.Array) -> Floats:
    """(N, K) float64 from a list column with K numbers in each row; a null row becomes NaN.

    Precondition when every row is null; InvalidInput when rows hold different numbers of classes, or one class only.
    """
    known = column.is_valid().to_numpy(zero_copy_only=False)
    if not known.any():
        raise Precondition(
            "the model gave no probabilities for the pool; add its scores with a column of them and run again, or pick "
            "by least confidence, which needs the column confidence alone"
        )
    lengths = np.unique(pc.list_value_length(column.drop_null()).to_numpy(zero_copy_only=False))
    if len(lengths) > 1 or lengths[0] < 2:
        raise invalid(
            "scores.probabilities",
            f"hold {lengths[0]} to {lengths[-1]} numbers for an instance of the pool; give one for each class, "
            "of two classes or more",
        )
    rows = np.full((len(column), int(lengths[0])), np.nan)
    rows[known] = np.asarray(column.drop_null().flatten().to_numpy(zero_copy_only=False)).reshape(-1, lengths[0])
    return rows


def confidence(confidences: pa.Array, probabilities: pa.Array) -> Floats:
    """(N,) how sure the model is: the confidence that was given, else the largest probability, else NaN.

    Precondition when neither is there for any instance.
    """
    given = np.asarray(pc.fill_null(confidences, float("nan")).to_numpy(zero_copy_only=False), dtype=np.float64)
    missing = np.isnan(given)
    if missing.any() and probabilities.null_count < len(probabilities):
        given = np.where(missing, _largest(probability_rows(probabilities), 1)[:, 0], given)
    if np.isnan(given).all():
        raise Precondition(
            "the model gave no confidence for the pool; add its scores with a column confidence or probabilities, and "
            "run again"
        )
    return given


def margin(probabilities: Floats) -> Floats:
    """(N,) the largest probability less the second largest, NaN where unknown: the smaller, the less sure."""
    top = _largest(probabilities, 2)
    return np.asarray(top[:, 0] - top[:, 1])


def negative_entropy(probabilities: Floats) -> Floats:
    """(N,) sum of p log p, at most 0, NaN where unknown: the smaller, the less sure."""
    logs = np.log(probabilities, out=np.zeros_like(probabilities), where=probabilities > 0)
    return np.asarray(np.where(np.isnan(probabilities).any(axis=1), np.nan, (probabilities * logs).sum(axis=1)))


def _largest(probabilities: Floats, n: int) -> Floats:
    """(N, n) the largest probabilities of each row, descending."""
    return np.asarray(-np.sort(-probabilities, axis=1)[:, :n])
