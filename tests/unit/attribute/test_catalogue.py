from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.attribute.catalogue import catalogue, catalogue_measures, measured_attributes
from shared.errors import InvalidInput
from shared.images.measures import MEASURES
from shared.schema import Category, Schema, Tagger, Task, check_schema, schema_from_json, schema_to_json

NAMES = tuple(MEASURES)
ENTRIES = {entry.name: entry for entry in catalogue()}


def attributes(values: dict[str, np.ndarray], task: Task = Task.CLASSIFICATION, has_boxes: bool = True):
    found = measured_attributes(np.column_stack(list(values.values())), list(values), task, has_boxes)
    return {attribute.name: attribute for attribute in found}


def codes(values: np.ndarray, attribute) -> np.ndarray:
    return np.searchsorted(attribute.measure.edges, values, side="right")


def test_the_catalogue_is_sound():
    assert len(ENTRIES) == len(catalogue())
    assert {entry.measure for entry in catalogue()} == set(MEASURES)
    for entry in catalogue():
        kind = MEASURES[entry.measure]
        assert entry.category is kind.category
        assert entry.description
        if kind.numeric:
            assert bool(entry.edges) != bool(entry.quantiles)
            cuts = entry.edges or entry.quantiles
            assert list(cuts) == sorted(set(cuts))
            assert len(cuts) + 1 == len(entry.tags)
            assert bool(entry.quantiles) == (entry.least > 0)
        else:
            assert entry.tags == kind.tags
            assert not entry.edges
            assert not entry.quantiles


def column(name: str, rows: int) -> st.SearchStrategy[list[float]]:
    kind = MEASURES[name]
    if kind.tags:
        cell = st.integers(0, len(kind.tags) - 1).map(float)
    else:
        anything = st.floats(allow_nan=False, allow_infinity=False)
        cell = st.floats(0, 1) | anything | st.sampled_from([0.0, 1.0, 0.1, 1e-300, 5e-324])
    cell = cell | st.just(float("nan"))
    constant = cell.map(lambda value: [value] * rows)
    return constant | st.lists(cell, min_size=rows, max_size=rows)


@st.composite
def matrices(draw) -> tuple[np.ndarray, list[str]]:
    rows = draw(st.integers(0, 30))
    names = draw(st.lists(st.sampled_from(NAMES), unique=True, max_size=len(NAMES)))
    return np.array([draw(column(name, rows)) for name in names], dtype=float).reshape(len(names), rows).T, names


@given(matrices(), st.sampled_from([1, 40]), st.sampled_from(Task), st.booleans())
@settings(max_examples=300, deadline=None)
def test_whatever_the_values_the_schema_obeys_the_rules(matrix, copies, task, has_boxes):
    values, names = np.repeat(matrix[0], copies, axis=0), matrix[1]
    found = measured_attributes(values, names, task, has_boxes)
    if not found:
        return
    schema = check_schema(Schema(task, ("shoe",), found))
    assert schema_from_json(schema_to_json(schema)).schema_id == schema.schema_id
    for attribute in found:
        entry = ENTRIES[attribute.name]
        assert attribute.tagger is Tagger.MEASURED
        assert attribute.sources == ("catalogue",)
        assert attribute.measure.name in names
        order = [entry.tags.index(tag) for tag in attribute.tags]
        assert order == sorted(order)
        known = values[:, names.index(entry.measure)]
        known = known[np.isfinite(known)]
        if entry.quantiles:  # every tag that is left is the tag of some instance
            assert set(codes(known, attribute)) == set(range(len(attribute.tags)))
        elif entry.edges:
            assert attribute.measure.edges == entry.edges
            assert len(set(codes(known, attribute))) > 1
        else:
            assert attribute.tags == tuple(entry.tags[i] for i in np.unique(known).astype(int))


@given(st.integers(0, 2**32 - 1), st.integers(400, 3000))
@settings(max_examples=40, deadline=None)
def test_quantile_tags_share_the_instances_out_and_read_well(seed, rows):
    values = np.random.default_rng(seed).lognormal(size=rows)
    attribute = attributes({"brightness": values})["brightness"]
    assert attribute.tags == ("very dark", "dark", "bright", "very bright")
    shares = np.bincount(codes(values, attribute)) / rows
    np.testing.assert_allclose(shares, 0.25, atol=0.02 + 1 / rows)
    assert all(edge == float(f"{edge:.4g}") for edge in attribute.measure.edges)


def test_equal_values_stay_together_and_the_smallest_get_the_first_tag():
    rng = np.random.default_rng(0)
    mostly_zero = np.where(rng.random(1000) < 0.6, 0.0, rng.uniform(0.2, 1, 1000))
    attribute = attributes({"saturation": mostly_zero})["color saturation"]
    assert attribute.tags[0] == "very dull"
    assert set(codes(mostly_zero[mostly_zero == 0], attribute)) == {0}
    mostly_one = 1 - mostly_zero
    attribute = attributes({"saturation": mostly_one})["color saturation"]
    assert set(codes(mostly_one[mostly_one == 1], attribute)) == {len(attribute.tags) - 1}
    assert attribute.tags[-1] == "very vivid"


def test_two_values_give_two_tags():
    attribute = attributes({"object_extent": np.repeat([0.2, 0.7], 50)})["object size"]
    assert len(attribute.tags) == 2
    assert 0.2 < attribute.measure.edges[0] <= 0.7


def test_what_tells_nothing_is_left_out():
    rng = np.random.default_rng(0)
    rows = 200
    unknown = np.full(rows, np.nan)
    rarely = unknown.copy()
    rarely[:10] = rng.random(10)
    found = attributes(
        {
            "brightness": np.full(rows, 0.5),
            "contrast": 0.5 + rng.random(rows) * 1e-3,  # differences that nobody sees
            "orientation": np.ones(rows),  # all square
            "sharpness": unknown,
            "object_texture": rarely,
            "color_temperature": rng.uniform(-0.05, 0.05, rows),  # all neutral
            "dominant_color": np.repeat([0.0, 9.0], rows // 2),
        }
    )
    assert list(found) == ["dominant color"]
    assert found["dominant color"].tags == ("black", "blue")


def test_unknown_values_do_not_move_the_edges():
    values = np.random.default_rng(0).random(500)
    with_unknown = np.concatenate([values, np.full(300, np.nan), [np.inf, -np.inf]])
    plain, mixed = attributes({"sharpness": values}), attributes({"sharpness": with_unknown})
    assert plain["sharpness"].measure.edges == mixed["sharpness"].measure.edges


def test_the_object_needs_a_box_or_an_image_of_its_own():
    values = {name: np.linspace(0, 1, 50) for name in ("brightness", "object_extent", "background_clutter")}
    values |= {"object_resolution": np.linspace(10, 200, 50)}
    has = {}
    for task in Task:
        for boxed in (False, True):
            found = attributes(values, task, boxed)
            has[task, boxed] = {"object size", "object resolution"} & set(found)
            assert {a.measure.name for a in found.values()} == set(values) & set(catalogue_measures(task, boxed))
            assert {"brightness", "background clutter"} <= set(found)
    assert has[Task.CLASSIFICATION, False] == {"object size"}
    assert has[Task.DETECTION, False] == has[Task.POSE, False] == set()
    assert all(has[task, True] == {"object size", "object resolution"} for task in Task)


def test_all_three_categories_are_covered():
    values = {name: np.linspace(0, 1, 50) for name in NAMES if MEASURES[name].numeric}
    assert {attribute.category for attribute in attributes(values).values()} == set(Category)


def test_no_rows_no_attributes_and_columns_must_fit():
    assert measured_attributes(np.empty((0, 2)), ("brightness", "noise"), Task.POSE, False) == ()
    with pytest.raises(InvalidInput, match="column"):
        measured_attributes(np.empty((3, 2)), ("brightness",), Task.POSE, False)


def test_the_order_of_rows_and_columns_does_not_matter():
    rng = np.random.default_rng(3)
    values = rng.random((300, 3))
    names = ["noise", "brightness", "object_extent"]
    found = measured_attributes(values, names, Task.CLASSIFICATION, False)
    again = measured_attributes(rng.permutation(values)[:, ::-1], names[::-1], Task.CLASSIFICATION, False)
    assert found == again
