"""Tag substitution against a plain reference that follows the paper's words."""

from __future__ import annotations

import dataclasses
import functools
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.prediction.substitution import OBJECT, embed_tags, main_object_of, substitute_tags, tag_phrases
from shared.errors import InvalidInput, Precondition
from shared.schema import MAIN_OBJECT, NOT_VISIBLE, Attribute, Category, Schema, Tagger, Task
from shared.text import StaticEncoder


def schema_of(tags: dict[str, list[str]], main_objects=("bear",)) -> Schema:
    attributes = tuple(
        Attribute(name, Category.MAIN_OBJECT, tuple(values), Tagger.GIVEN if name == MAIN_OBJECT else Tagger.VLM)
        for name, values in tags.items()
    )
    return Schema(Task.CLASSIFICATION, tuple(main_objects), attributes)


def numbered(counts, with_class: bool, not_visible) -> Schema:
    tags = {}
    for a, n in enumerate(counts):
        name = MAIN_OBJECT if with_class and a == 0 else f"attribute {a}"
        tags[name] = [f"tag {i}" for i in range(n)]
        if name != MAIN_OBJECT and not_visible[a]:
            tags[name][-1] = NOT_VISIBLE
    return schema_of(tags)


@st.composite
def cases(draw):
    counts = draw(st.lists(st.integers(2, 5), min_size=1, max_size=4))
    flags = draw(st.lists(st.booleans(), min_size=len(counts), max_size=len(counts)))
    schema = numbered(counts, draw(st.booleans()), flags)
    offsets = np.concatenate([[0], np.cumsum(counts)])
    depth = draw(st.integers(1, 3))

    def row():
        size = draw(st.integers(1, min(depth, len(counts))))
        chosen = sorted(draw(st.permutations(range(len(counts))))[:size])
        items = [int(offsets[a]) + draw(st.integers(0, counts[a] - 1)) for a in chosen]
        return tuple(items + [-1] * (depth - size))

    errors = list(dict.fromkeys(row() for _ in range(draw(st.integers(1, 6)))))
    others = list(dict.fromkeys(row() for _ in range(draw(st.integers(0, 12)))))
    # Few different values, so that ties happen.
    drop = draw(st.lists(st.sampled_from([0.25, 0.5, 0.75]), min_size=len(errors), max_size=len(errors)))
    # Tags lie otherwise when they are said of one of the first two classes.
    vectors = st.lists(st.integers(0, 3), min_size=int(offsets[-1]), max_size=int(offsets[-1]))
    rows = np.array([[1, 0], [1, 1], [0, 1], [-1, 2]], np.float32)
    said = {main_object: rows[draw(vectors)] for main_object in ("tag 0", "tag 1", "")}
    return (
        schema,
        np.array(errors, np.int32),
        np.array(sorted(drop, reverse=True)),
        np.array(errors + others, np.int32).reshape(-1, depth),
        lambda main_object: said.get(main_object, said[""]),
        {
            "neighbours": draw(st.integers(1, 4)),
            "max_per_class": draw(st.integers(1, 5)),
            "max_predictions": draw(st.integers(1, 30)),
        },
    )


def reference(schema, errors, drop, enumerated, embed, options):
    """One dict lookup at a time: slice -> (score, origin, from, to, similarity, all origins)."""
    attribute_of, tag_of = [], []
    for a, attribute in enumerate(schema.attributes):
        attribute_of += [a] * len(attribute.tags)
        tag_of += attribute.tags
    known = {tuple(row) for row in enumerated.tolist()}
    reached: dict[tuple, list] = {}
    for origin, row in enumerate(errors.tolist()):
        named = [tag_of[i] for i in row if i >= 0 and schema.attributes[attribute_of[i]].name == MAIN_OBJECT]
        unit = embed(named[0] if named else schema.main_objects[0]).astype(np.float64)
        unit /= np.linalg.norm(unit, axis=1, keepdims=True)
        for place, item in enumerate(row):
            if item < 0:
                continue
            attribute = schema.attributes[attribute_of[item]]
            if attribute.name == MAIN_OBJECT:
                continue
            rivals = [
                other
                for other in range(len(tag_of))
                if attribute_of[other] == attribute_of[item] and other != item and tag_of[other] != NOT_VISIBLE
            ]
            near = sorted(rivals, key=lambda other: (-round(float(unit[item] @ unit[other]), 6), other))
            for other in near[: options["neighbours"]]:
                changed = (*row[:place], other, *row[place + 1 :])
                similarity = round(float(unit[item] @ unit[other]), 6)
                if changed not in known:
                    reached.setdefault(changed, []).append(
                        (-drop[origin] * similarity, origin, item, other, similarity)
                    )
    ranked = sorted((min(ways)[:2], changed) for changed, ways in reached.items())
    kept, of_class = [], {}
    for _, changed in ranked:
        named = [i for i in changed if i >= 0 and schema.attributes[attribute_of[i]].name == MAIN_OBJECT]
        of_it = named[0] if named else None
        of_class[of_it] = of_class.get(of_it, 0) + 1
        if of_class[of_it] > options["max_per_class"]:
            continue
        kept.append((changed, sorted(reached[changed])))
    return kept[: options["max_predictions"]]


@given(cases())
@settings(max_examples=120, deadline=None)
def test_equals_the_reference(case):
    schema, errors, drop, enumerated, embed, options = case
    found = substitute_tags(schema, errors, drop, enumerated, embed, **options)
    expected = reference(schema, errors, drop, enumerated, embed, options)
    assert [tuple(row) for row in found.items.tolist()] == [changed for changed, _ in expected]
    for i, (_, ways) in enumerate(expected):
        score, origin, old, new, similarity = ways[0]
        assert found.score[i] == pytest.approx(-score)
        assert (found.origin[i], found.from_item[i], found.to_item[i]) == (origin, old, new)
        assert found.similarity[i] == pytest.approx(similarity)
        span = found.origin_indices[found.origin_offsets[i] : found.origin_offsets[i + 1]]
        assert span.tolist() == [way[1] for way in ways]


@given(cases())
@settings(max_examples=80, deadline=None)
def test_what_every_prediction_obeys(case):
    schema, errors, drop, enumerated, embed, options = case
    found = substitute_tags(schema, errors, drop, enumerated, embed, **options)
    attribute_of = [a for a, attribute in enumerate(schema.attributes) for _ in attribute.tags]
    tags = [tag for attribute in schema.attributes for tag in attribute.tags]
    rows = [tuple(row) for row in found.items.tolist()]
    assert len(found) == len(rows) == len(set(rows)) <= options["max_predictions"]
    assert not set(rows) & {tuple(row) for row in enumerated.tolist()}
    assert all(a >= b for a, b in pairwise(found.score.tolist()))
    for i, row in enumerate(rows):
        for origin in found.origin_indices[found.origin_offsets[i] : found.origin_offsets[i + 1]]:
            changed = [(a, b) for a, b in zip(errors[origin].tolist(), row, strict=True) if a != b]
            assert len(changed) == 1
            old, new = changed[0]
            assert attribute_of[old] == attribute_of[new]
            assert tags[new] != NOT_VISIBLE
            assert schema.attributes[attribute_of[old]].name != MAIN_OBJECT
        assert found.origin_indices[found.origin_offsets[i]] == found.origin[i]
        assert found.attribute[i] == attribute_of[found.to_item[i]]
        assert found.score[i] == pytest.approx(drop[found.origin[i]] * found.similarity[i])


@given(cases(), st.randoms(use_true_random=False))
@settings(max_examples=50, deadline=None)
def test_the_order_of_the_enumerated_slices_does_not_matter(case, random):
    schema, errors, drop, enumerated, embed, options = case
    shuffled = enumerated.copy()
    order = list(range(len(shuffled)))
    random.shuffle(order)
    one = substitute_tags(schema, errors, drop, enumerated, embed, **options)
    two = substitute_tags(schema, errors, drop, shuffled[order], embed, **options)
    for column in dataclasses.fields(one):
        np.testing.assert_array_equal(getattr(one, column.name), getattr(two, column.name))


def test_phrases_name_the_attribute_and_the_main_object():
    schema = schema_of({MAIN_OBJECT: ["bear", "cat"], "fur color": ["brown", "black"]}, ["bear", "cat"])
    assert tag_phrases(schema, "cat") == [
        "photo of bear",
        "photo of cat",
        "photo of cat, fur color: brown",
        "photo of cat, fur color: black",
    ]


def test_a_slice_speaks_of_the_class_that_it_names_or_of_the_only_one():
    tags = {MAIN_OBJECT: ["bear", "cat"], "fur color": ["brown", "black"]}
    several, one = schema_of(tags, ["bear", "cat"]), schema_of({"fur color": ["brown", "black"]}, ["bear"])
    assert [main_object_of(several, item) for item in (0, 1, -1)] == ["bear", "cat", OBJECT]
    assert main_object_of(one, -1) == "bear"


def test_embeddings_are_in_item_order():
    class ByLength:
        name = "by length"

        def encode(self, texts):
            return np.array([[len(text), 1] for text in texts], np.float32)

    schema = schema_of({"size": ["s", "mid", "large"], "pose": ["up", "lying"]})
    rows = embed_tags(schema, ByLength(), "bear")
    tags = ["s", "mid", "large", "up", "lying"]
    lengths = [len(tag) + len(phrase) for tag, phrase in zip(tags, tag_phrases(schema, "bear"), strict=True)]
    np.testing.assert_allclose(rows[:, 0] / rows[:, 1], np.array(lengths) / 2, rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)


def test_the_embedded_encoder_finds_the_tag_that_means_the_same():
    colors = ["red", "blue", "green", "crimson", NOT_VISIBLE]
    settings = ["forest", "indoors", "street", "living room"]
    schema = schema_of({"object color": colors, "setting": settings})
    error = np.array([[0, 6]], np.int32)  # red, indoors
    encoder = StaticEncoder()
    embed = functools.partial(embed_tags, schema, encoder)
    found = substitute_tags(schema, error, np.array([0.4]), error, embed, neighbours=1)
    # crimson for red, living room for indoors
    assert {tuple(row) for row in found.items.tolist()} == {(3, 6), (0, 8)}


WELL = schema_of({MAIN_OBJECT: ["bear", "cat"], "color": ["red", "blue", "green"]})
ERRORS = np.array([[0, 2]], np.int32)
DROP = np.array([0.5])
KNOWN = np.array([[0, -1], [0, 2]], np.int32)
UNIT = np.eye(5, dtype=np.float32)


def embed_well(_):
    return UNIT


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"neighbours": 0}, "neighbours"),
        ({"max_per_class": 0}, "max_per_class"),
        ({"max_predictions": 0}, "max_predictions"),
        ({"error_items": np.array([[0, 5]], np.int32)}, "error_items[0]"),
        ({"error_items": np.array([[2, 0]], np.int32)}, "error_items[0]"),
        ({"error_items": np.array([[2, 3]], np.int32)}, "error_items[0]"),
        ({"error_items": np.array([[-1, 2]], np.int32)}, "error_items[0]"),
        ({"error_items": np.array([[0.0, 2.0]])}, "error_items"),
        ({"error_items": np.array([[2]], np.int32)}, "enumerated_items"),
        ({"enumerated_items": np.array([[0, -1], [-2, -1]], np.int32)}, "enumerated_items[1]"),
        ({"error_drop": np.array([0.5, 0.5])}, "error_drop"),
        ({"error_drop": np.array([np.nan])}, "error_drop"),
        ({"embed": lambda _: UNIT[:4]}, "embeddings"),
        ({"embed": lambda _: np.zeros((5, 3), np.float32)}, "embeddings"),
        ({"embed": lambda _: np.full((5, 3), np.nan, np.float32)}, "embeddings"),
    ],
)
def test_bad_input_names_the_field(change, field):
    given = {"error_items": ERRORS, "error_drop": DROP, "enumerated_items": KNOWN, "embed": embed_well} | change
    with pytest.raises(InvalidInput) as caught:
        substitute_tags(WELL, **given)
    assert caught.value.violations[0].field == field


def test_no_error_slices_is_a_missing_step():
    with pytest.raises(Precondition, match="no error slices"):
        substitute_tags(WELL, np.empty((0, 2), np.int32), np.empty(0), KNOWN, embed_well)


def test_nothing_left_to_predict_is_an_empty_result():
    every = np.array([[0, 2], [0, 3], [0, 4]], np.int32)
    found = substitute_tags(WELL, ERRORS, DROP, every, embed_well)
    assert len(found) == 0
    assert found.items.shape == (0, 2)
    assert found.origin_offsets.tolist() == [0]
