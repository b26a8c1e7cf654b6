from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.enumeration.lattice import enumerate_slices
from services.enumeration.table import read_table
from shared.errors import InvalidInput
from shared.schema import UNKNOWN

words = st.none() | st.sampled_from(["", "red", "Blue", "é", "zebra", " ", "10", "9"])


@settings(deadline=None)
@given(
    st.lists(st.tuples(words, words, st.none() | st.floats(0, 1) | st.just(math.nan)), min_size=1, max_size=20),
    st.data(),
)
def test_codes_number_the_distinct_values_in_the_order_of_their_text(rows, data):
    columns = {
        "a": pa.array([a for a, _, _ in rows], pa.string()),
        "score": pa.array([s for _, _, s in rows], pa.float64()),
        "b": pa.array([b for _, b, _ in rows], pa.string()),
    }
    if data.draw(st.booleans()):
        columns["b"] = columns["b"].dictionary_encode()
    table = pa.table(columns)
    cut = data.draw(st.integers(0, len(rows)))
    got = read_table(pa.concat_tables([table.slice(0, cut), table.slice(cut)]), ["score"])
    assert got.names == ("a", "b")
    assert got.codes.dtype == np.uint16
    for j in (0, 1):
        values = [row[j] for row in rows]
        tags = sorted({v for v in values if v})
        assert got.tag_sets[j] == tuple(tags)
        assert got.codes[:, j].tolist() == [tags.index(v) if v else UNKNOWN for v in values]
    assert got.tag_counts.tolist() == [len(t) for t in got.tag_sets]
    scores = [s for _, _, s in rows]
    assert [None if np.isnan(v) else v for v in got.scores[:, 0]] == [
        None if s is None or math.isnan(s) else s for s in scores
    ]


@pytest.mark.parametrize(
    ("column", "tags"),
    [
        (pa.array([2, 10, None]), ("10", "2")),
        (pa.array([True, False, None]), ("False", "True")),
        (pa.array([True, False, None]).dictionary_encode(), ("False", "True")),
        (pa.array([1.5, 2.0, None]), ("1.5", "2")),
        (pa.array(["b", "a", None], pa.large_string()), ("a", "b")),
        (pa.nulls(3), ()),
    ],
)
def test_columns_of_other_types_are_tags_too(column, tags):
    got = read_table(pa.table({"a": column}), [])
    assert got.tag_sets == (tags,)
    assert got.scores.shape == (3, 0)


@pytest.mark.parametrize(
    "column", [pa.array([1, 0, None]), pa.array([True, False, None]), pa.array([1, 0, None], pa.float32())]
)
def test_scores_of_other_types_are_understood(column):
    got = read_table(pa.table({"a": ["x", "y", "z"], "s": column, "t": pa.nulls(3)}), ["s", "t"])
    assert got.scores[:2, 0].tolist() == [1.0, 0.0]
    assert np.isnan(got.scores[2, 0])
    assert np.isnan(got.scores[:, 1]).all()


@pytest.mark.parametrize(
    ("columns", "scores", "field"),
    [
        ({"a": ["x"]}, ["s"], "score_columns"),
        ({"a": ["x"], "s": [1]}, ["s", "s"], "score_columns"),
        ({"s": [1]}, ["s"], "table"),
        ({"a": pa.array([], pa.string())}, [], "table"),
        ({"a": ["x"], "s": ["1"]}, ["s"], "s"),
        ({"a": ["x"], "s": [1.1]}, ["s"], "s"),
        ({"a": ["x"], "s": [-0.1]}, ["s"], "s"),
        ({"a": ["x"], "s": [math.inf]}, ["s"], "s"),
        ({"a": ["x"], "s": [2**62 + 1]}, ["s"], "s"),
        ({"a": [["x"]]}, [], "a"),
        ({"a": [b"x"]}, [], "a"),
        ({"a": pa.array([b"\xff"], pa.large_binary())}, [], "a"),
        ({"a": pa.array([(1, 1, 1)], pa.month_day_nano_interval())}, [], "a"),
        ({"a": pa.array(range(65536))}, [], "a"),
    ],
)
def test_what_cannot_be_read_is_refused_by_column(columns, scores, field):
    with pytest.raises(InvalidInput) as refused:
        read_table(pa.table(columns), scores)
    assert refused.value.violations[0].field == field


def test_one_name_twice_is_refused():
    with pytest.raises(InvalidInput, match="same name"):
        read_table(pa.table([["x"], ["y"]], names=["a", "a"]), [])


def test_65535_values_are_told_apart_from_unknown():
    got = read_table(pa.table({"a": pa.array([*range(65535), None])}), [])
    assert len(got.tag_sets[0]) == 65535
    assert sorted(got.codes[:-1, 0].tolist()) == list(range(65535))
    assert got.codes[-1, 0] == UNKNOWN


def test_an_attribute_without_any_value_adds_no_slice():
    got = read_table(pa.table({"empty": pa.nulls(20), "a": ["x"] * 20}), [])
    found = enumerate_slices(got.codes, got.tag_counts, None, min_count=1, max_depth=2)
    assert found.items[:, 0].tolist() == [0]
