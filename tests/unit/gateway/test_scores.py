from __future__ import annotations

import math

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.gateway.datasets import check_instances
from services.gateway.scores import check_scores
from shared.errors import InvalidInput
from shared.schema import Task
from shared.store.artifacts import SCORES

INSTANCES = check_instances(
    pa.table({"instance_id": ["1", "2", "3", "4"], "image_uri": ["x"] * 4, "label": ["cat", "dog", None, "true"]}),
    Task.CLASSIFICATION,
)
IDS = pa.array(["3", "1", "2"])


def test_scores_are_taken_as_they_are():
    got, metric = check_scores(
        pa.table({"instance_id": IDS, "score": [0.25, None, 1.0], "note": ["x", "y", "z"]}), INSTANCES
    )
    assert got.schema.equals(SCORES)
    assert metric == "custom"
    assert got.column("instance_id").to_pylist() == ["3", "1", "2"]
    assert got.column("score").to_pylist() == [0.25, None, 1.0]
    assert got.column("predicted_label").null_count == 3


def test_a_predicted_label_scores_where_the_label_is_known():
    got, metric = check_scores(pa.table({"instance_id": IDS, "predicted_label": ["cat", "cat", "cat"]}), INSTANCES)
    assert metric == "accuracy"
    assert got.column("score").to_pylist() == [None, 1.0, 0.0]
    assert got.column("predicted_label").to_pylist() == ["cat"] * 3


def test_what_was_not_predicted_is_not_scored():
    got, _ = check_scores(pa.table({"instance_id": IDS, "predicted_label": ["", None, "dog"]}), INSTANCES)
    assert got.column("score").to_pylist() == [None, None, 1.0]
    assert got.column("predicted_label").to_pylist() == [None, None, "dog"]


@pytest.mark.parametrize(
    "ids",
    [
        pa.array([3, 1, 2]),
        IDS.dictionary_encode(),
        pa.array(["3", "1", "2"], pa.large_string()),
        pa.chunked_array([["3"], ["1", "2"]]),
    ],
)
@pytest.mark.parametrize(
    "score",
    [
        pa.array([1, 0, 1]),
        pa.array([True, False, True]),
        pa.array([1.0, 0.0, 1.0], pa.float32()),
        pa.array([1, 0, 1], pa.uint8()),
    ],
)
def test_columns_of_other_types_are_understood(ids, score):
    got, _ = check_scores(pa.table({"instance_id": ids, "score": score}), INSTANCES)
    assert got.column("instance_id").to_pylist() == ["3", "1", "2"]
    assert got.column("score").to_pylist() == [1.0, 0.0, 1.0]


def test_labels_of_other_types_are_understood():
    labels = pa.array(["cat", "cat", "dog"])
    for column in (labels.dictionary_encode(), labels.cast(pa.large_string())):
        got, _ = check_scores(pa.table({"instance_id": IDS, "predicted_label": column}), INSTANCES)
        assert got.column("score").to_pylist() == [None, 1.0, 1.0]
    got, _ = check_scores(pa.table({"instance_id": ["4"], "predicted_label": [True]}), INSTANCES)
    assert got.column("score").to_pylist() == [1.0]


def test_confidence_and_probabilities_are_kept():
    table = pa.table(
        {
            "instance_id": IDS,
            "score": [1, 1, 1],
            "confidence": [0.5, None, 1.0],
            "probabilities": [[0.5, 0.5], None, [1.0]],
        }
    )
    got, _ = check_scores(table, INSTANCES)
    assert got.column("confidence").to_pylist() == [0.5, None, 1.0]
    assert got.column("probabilities").to_pylist() == [[0.5, 0.5], None, [1.0]]


@pytest.mark.parametrize(
    ("columns", "field"),
    [
        ({"score": [1]}, "scores.instance_id"),
        ({"instance_id": pa.array([], pa.string()), "score": pa.array([], pa.float64())}, "scores"),
        ({"instance_id": ["1"]}, "scores"),
        ({"instance_id": ["9"], "score": [1]}, "scores[0].instance_id"),
        ({"instance_id": ["1", None], "score": [1, 1]}, "scores[1].instance_id"),
        ({"instance_id": ["1", "1"], "score": [1, 1]}, "scores[1].instance_id"),
        ({"instance_id": [["1"]], "score": [1]}, "scores.instance_id"),
        ({"instance_id": [b"1"], "score": [1]}, "scores.instance_id"),
        ({"instance_id": ["1"], "score": [1.5]}, "scores[0].score"),
        ({"instance_id": ["1"], "score": [-0.1]}, "scores[0].score"),
        ({"instance_id": ["1"], "score": [math.nan]}, "scores[0].score"),
        ({"instance_id": ["1"], "score": [math.inf]}, "scores[0].score"),
        ({"instance_id": ["1"], "score": [2**62]}, "scores[0].score"),
        ({"instance_id": ["1"], "score": ["1"]}, "scores.score"),
        ({"instance_id": ["1"], "score": pa.array([None], pa.float64())}, "scores"),
        ({"instance_id": ["3"], "predicted_label": ["cat"]}, "scores"),
        ({"instance_id": ["1"], "predicted_label": [["cat"]]}, "scores.predicted_label"),
        ({"instance_id": ["1"], "score": [1], "confidence": [2]}, "scores[0].confidence"),
        ({"instance_id": ["1"], "score": [1], "confidence": ["x"]}, "scores.confidence"),
        ({"instance_id": ["1"], "score": [1], "probabilities": [0.5]}, "scores.probabilities"),
        ({"instance_id": ["1"], "score": [1], "probabilities": [["x"]]}, "scores.probabilities"),
    ],
)
def test_every_fault_is_refused_by_field(columns, field):
    with pytest.raises(InvalidInput) as refused:
        check_scores(pa.table(columns), INSTANCES)
    assert field in {violation.field for violation in refused.value.violations}


def test_one_name_twice_is_refused():
    twice = pa.table([["1"], [1], [0]], names=["instance_id", "score", "score"])
    with pytest.raises(InvalidInput, match="same name"):
        check_scores(twice, INSTANCES)


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["1", "2", "3", "4", "5", None]), st.none() | st.floats(-1, 2) | st.just(math.nan)),
        min_size=1,
        max_size=4,
    )
)
def test_a_table_is_refused_exactly_when_a_row_breaks_a_rule(rows):
    ids, scores = [i for i, _ in rows], [s for _, s in rows]
    good = (
        len(set(ids)) == len(ids)
        and {"1", "2", "3", "4"} >= set(ids)
        and all(s is None or 0 <= s <= 1 for s in scores)
        and any(s is not None for s in scores)
    )
    table = pa.table({"instance_id": pa.array(ids, pa.string()), "score": pa.array(scores, pa.float64())})
    if good:
        assert check_scores(table, INSTANCES)[0].column("score").to_pylist() == scores
    else:
        with pytest.raises(InvalidInput):
            check_scores(table, INSTANCES)
