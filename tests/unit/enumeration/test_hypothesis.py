import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.enumeration.error_slices import find_error_slices
from services.enumeration.hypothesis import hypothesis_rows, score_hypothesis
from services.enumeration.lattice import enumerate_slices, item_offsets
from services.enumeration.statistics import p_values
from shared.errors import InvalidInput
from tests.load.shapes import paper_table
from tests.unit.enumeration.tables import tables


@st.composite
def questions(draw):
    """A table and tags of some of its attributes."""
    table = draw(tables())
    attributes = draw(st.sets(st.integers(0, len(table.tag_counts) - 1), min_size=1))
    tags = {a: draw(st.sets(st.integers(0, int(table.tag_counts[a]) - 1), min_size=1)) for a in attributes}
    return table, tags


@given(questions())
@settings(max_examples=80, deadline=None)
def test_is_what_a_look_at_every_row_says(question):
    table, tags = question
    scores = table.scores[:, 0]
    rows = [r for r, row in enumerate(table.codes) if all(row[a] in wanted for a, wanted in tags.items())]
    assert hypothesis_rows(table.codes, table.tag_counts, tags).tolist() == rows
    result = score_hypothesis(table.codes, table.tag_counts, scores, tags)
    inside = [s for s in scores[rows] if not np.isnan(s)]
    assert (result.count, result.scored) == (len(rows), len(inside))
    if not inside:
        assert np.isnan([result.mean, result.drop, result.p, result.interval_low, result.interval_high]).all()
        return
    assert result.mean == pytest.approx(np.mean(inside))
    assert result.drop == pytest.approx(np.nanmean(scores) - np.mean(inside))
    assert result.error_share == pytest.approx(np.sum(1 - np.array(inside)) / np.nansum(1 - scores))
    assert result.interval_low <= result.mean <= result.interval_high
    assert 0 <= result.p <= 1


@pytest.mark.parametrize("kind", ["zeros and ones", "in between"])
def test_a_slice_that_was_enumerated_has_the_same_statistics(kind):
    codes, tag_counts, scores = paper_table(2_000, 6)
    if kind == "in between":
        scores = np.random.default_rng(0).beta(2, 1, scores.shape) * (0.5 + scores / 2)
    slices = enumerate_slices(codes, tag_counts, scores, min_count=10, max_depth=3)
    known = scores[:, 0]
    errors = find_error_slices(slices, 0, known.mean(), (1 - known).sum(), margin=0.1)
    offsets = item_offsets(tag_counts)
    assert len(errors) > 10
    for e, position in enumerate(errors.index[:30]):
        items = slices.items[position][slices.items[position] >= 0]
        attributes = np.searchsorted(offsets, items, side="right") - 1
        tags = {int(a): [int(i - offsets[a])] for a, i in zip(attributes, items, strict=True)}
        result = score_hypothesis(codes, tag_counts, known, tags)
        assert result.count == slices.count[position]
        assert result.mean == pytest.approx(errors.mean[e])
        assert result.drop == pytest.approx(errors.drop[e])
        assert result.error_share == pytest.approx(errors.error_share[e])
        p = p_values(known, slices.scored[[position], 0], slices.total[[position], 0])
        assert result.p == pytest.approx(p[0], rel=1e-6)
        if kind == "zeros and ones":
            assert result.interval_low == pytest.approx(errors.interval_low[e])
            assert result.interval_high == pytest.approx(errors.interval_high[e])


def test_every_tag_of_an_attribute_is_every_tagged_row():
    codes = np.array([[0, 1], [2, 0], [255, 1], [1, 255]], dtype=np.uint8)
    assert hypothesis_rows(codes, [3, 2], {0: range(3)}).tolist() == [0, 1, 3]
    assert hypothesis_rows(codes, [3, 2], {0: {0, 1, 2}, 1: [1]}).tolist() == [0]


@pytest.mark.parametrize(
    ("tags", "said"),
    [
        ({}, ["at least one attribute"]),
        ({7: [0]}, ["attribute 7"]),
        ({-1: [0]}, ["attribute -1"]),
        ({0: []}, ["attribute 0 has no tag"]),
        ({0: [0, 3], 1: [-1], 5: [0]}, ["there is no 3", "there is no -1", "attribute 5"]),
    ],
)
def test_what_is_not_there_is_named(tags, said):
    with pytest.raises(InvalidInput) as caught:
        hypothesis_rows(np.zeros((4, 2), dtype=np.uint8), [3, 2], tags)
    assert len(caught.value.violations) == len(said)
    for violation, text in zip(caught.value.violations, said, strict=True):
        assert text in violation.description
