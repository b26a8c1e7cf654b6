from __future__ import annotations

import operator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.enumeration.read import choose, doubtful_column, doubtful_counts, tags_column, vocabulary
from shared.errors import InvalidInput

NAMES = ["color", "the mood", 'a "b" \\ c']
TAGS = [["red", "black AND white"], ["calm", "red"], ["= 3", "x"]]
WORDS = vocabulary(NAMES, TAGS)
PAIRS = [(name, tag) for name, tags in zip(NAMES, TAGS, strict=True) for tag in tags]
COMPARE = {"<": operator.lt, "<=": operator.le, "=": operator.eq, ">=": operator.ge, ">": operator.gt}


@st.composite
def stored(draw: st.DrawFn):
    """Slices of one to three pairs with their numbers, some means NaN."""
    n = draw(st.integers(0, 12))
    rows = []
    for _ in range(n):
        attributes = sorted(draw(st.sets(st.integers(0, 2), min_size=1, max_size=3)))
        row = [2 * a + draw(st.integers(0, 1)) for a in attributes]
        rows.append(row + [-1] * (3 - len(row)))
    items = np.array(rows, np.int32).reshape(n, 3)
    columns = {
        "depth": (items >= 0).sum(axis=1),
        "count": np.array(draw(st.lists(st.integers(0, 4), min_size=n, max_size=n)), np.int64),
        "mean": np.array(draw(st.lists(st.sampled_from([0.0, 0.25, 1.0, np.nan]), min_size=n, max_size=n)), np.float64),
    }
    return items, columns


def quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


number_terms = st.tuples(
    st.sampled_from(["depth", "count", "mean"]),
    st.sampled_from(list(COMPARE)),
    st.sampled_from(["0", "1", "0.25", "2.5", "-1", "inf"]),
)
word_terms = st.tuples(st.just("attribute"), st.just("="), st.sampled_from([*NAMES, "size"])) | st.tuples(
    st.just("tag"), st.just("="), st.sampled_from([tag for tags in TAGS for tag in tags])
)


def holds(terms, items, columns, row: int) -> bool:
    """The filter's rule in plain Python."""
    pairs = [PAIRS[item] for item in items[row] if item >= 0]
    attributes = [value for name, _, value in terms if name == "attribute"]
    tags = [value for name, _, value in terms if name == "tag"]
    for name, compare, value in terms:
        if name in columns and not COMPARE[compare](float(columns[name][row]), float(value)):
            return False
    if len(attributes) == 1 and len(tags) == 1:
        return (attributes[0], tags[0]) in pairs
    return all(any(a == asked for a, _ in pairs) for asked in attributes) and all(
        any(t == asked for _, t in pairs) for asked in tags
    )


@settings(max_examples=300, deadline=None)
@given(stored(), st.lists(number_terms | word_terms, max_size=4), st.sampled_from([" ", "", "  "]))
def test_a_filter_keeps_what_the_rule_keeps_in_order(slices, terms, blank):
    items, columns = slices
    text = " AND ".join(f"{n}{blank}{op}{blank}{v if n in columns else quoted(v)}" for n, op, v in terms)
    got = choose(columns, items, WORDS, text, "")
    assert got.tolist() == [i for i in range(len(items)) if holds(terms, items, columns, i)]


@given(stored(), st.sampled_from(["count", "mean", "depth"]), st.sampled_from(["", " asc", " desc", "  desc "]))
def test_the_order_is_by_the_field_and_else_as_it_was(slices, name, direction):
    items, columns = slices
    got = choose(columns, items, WORDS, "", name + direction).tolist()
    sign = -1 if "desc" in direction else 1
    values = columns[name].astype(float)
    assert got == sorted(range(len(items)), key=lambda i: (np.isnan(values[i]), sign * np.nan_to_num(values[i]), i))


def test_a_word_needs_no_quotes_where_it_has_no_blank():
    items = np.array([[0, -1], [2, -1]], np.int32)
    assert choose({}, items, WORDS, "tag=calm", "").tolist() == [1]


@pytest.mark.parametrize(
    "text",
    [
        "count",
        "count >",
        "> 3",
        "count >= x",
        "count >= nan",
        "count >= 1 OR count < 3",
        "count >= 1 AND",
        "AND",
        "count >= 1 count < 3",
        "count != 1",
        "size > 1",
        "tag < red",
        "tag = two words",
        'tag = "open',
        "mean > 0.1",
        "count >= 1,5",
        "count >= 1 and count <= 3",
        "attribute",
        '"count" > 3',
    ],
)
def test_a_filter_that_cannot_be_read_is_refused(text):
    with pytest.raises(InvalidInput) as refused:
        choose({"count": np.array([1])}, np.array([[0]], np.int32), WORDS, text, "")
    assert refused.value.violations[0].field == "filter"


@pytest.mark.parametrize("text", ["size", "count up", "count desc, mean", "desc"])
def test_an_order_that_cannot_be_read_is_refused(text):
    with pytest.raises(InvalidInput) as refused:
        choose({"count": np.array([1])}, np.array([[0]], np.int32), WORDS, "", text)
    assert refused.value.violations[0].field == "order_by"


@pytest.mark.parametrize(
    ("filter_text", "order_by", "told"),
    [
        ("", "tag", "'tag' is not one of count"),
        ("size > 1", "", "'size' is not one of count, attribute, tag, class"),
    ],
)
def test_fields_that_are_named_may_stand_there(filter_text, order_by, told):
    with pytest.raises(InvalidInput) as refused:
        choose({"count": np.array([1])}, np.array([[0]], np.int32), WORDS, filter_text, order_by)
    assert [violation.description for violation in refused.value.violations] == [told]


@given(stored())
def test_items_are_told_in_words(slices):
    items, _ = slices
    told = tags_column(items, WORDS).to_pylist()
    assert told == [[{"attribute": PAIRS[i][0], "tag": PAIRS[i][1]} for i in row if i >= 0] for row in items]


@given(stored(), st.sets(st.sampled_from([*NAMES, "size"])))
def test_doubtful_attributes_are_told_and_counted_for_each_slice(found, doubtful):
    items, _ = found
    expected = [[PAIRS[item][0] for item in row if item >= 0 and PAIRS[item][0] in doubtful] for row in items]
    assert doubtful_column(items, WORDS, doubtful).to_pylist() == expected
    counts = doubtful_counts(items, WORDS, doubtful)
    assert counts.tolist() == [len(names) for names in expected]
    kept = choose({"doubtful": counts}, items, WORDS, "doubtful = 0", "")
    assert kept.tolist() == [i for i, names in enumerate(expected) if not names]
