"""The CLIP tagger on a model that sees colours, and on a tiny real one where open_clip is installed."""

from __future__ import annotations

import asyncio
import importlib.util

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.tagging.clip import ClipTagger, clip_id, phrases
from services.tagging.reuse import attribute_key
from shared.clip import Clip, squared, weights_digest
from shared.errors import InvalidInput, Precondition
from shared.images.box import Box
from shared.schema import Attribute, Category, Tagger

COLORS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
ENDS = {**COLORS, "shiny": (255, 0, 0), "not shiny": (0, 0, 255)}
sides = st.integers(1, 40)


class Colours:
    """Knows a phrase by the colour it ends with, and an image by its mean colour."""

    side_px = 8

    def __init__(self) -> None:
        self.asked: list[list[str]] = []
        self.seen = 0

    def texts(self, texts):
        self.asked.append(list(texts))
        ends = [ENDS[text.rpartition(", ")[2].rpartition(": ")[2]] for text in texts]
        return unit(np.array(ends, np.float32))

    def images(self, images):
        self.seen += len(images)
        return unit(np.stack(images).mean(axis=(1, 2)).astype(np.float32) + np.float32(1e-3))


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def attribute(name: str, category: Category, tags=tuple(COLORS)) -> Attribute:
    return Attribute(name, category, tags, Tagger.CLIP)


SCHEMA = [
    attribute("object color", Category.MAIN_OBJECT),
    attribute("surroundings", Category.BACKGROUND),
    attribute("is shiny", Category.MAIN_OBJECT, ("yes", "no")),
]
BOX = Box(40, 40, 20, 20)


def scene(inside: str, around: str) -> np.ndarray:
    image = np.empty((100, 100, 3), np.uint8)
    image[:] = COLORS[around]
    image[40:60, 40:60] = COLORS[inside]
    return image


def tags_of(tagger: ClipTagger, images, boxes, labels, attributes=SCHEMA):
    looks = [tagger.look(image, box, attributes) for image, box in zip(images, boxes, strict=True)]
    answer = asyncio.run(tagger.tag(looks, labels, attributes))
    assert (answer.asked, answer.invalid, answer.usage.calls) == (0, 0, 0)
    assert answer.codes.dtype == np.uint16
    return [[a.tags[code] for a, code in zip(attributes, row, strict=True)] for row in answer.codes]


def test_the_object_is_told_by_its_box_and_the_rest_by_what_is_around_it():
    tagger = ClipTagger(Colours())
    images = [scene("red", "blue"), scene("green", "red"), scene("blue", "green")]
    found = tags_of(tagger, images, [BOX, BOX, None], ["bear", "", "cat"])
    # Without a box the whole image is the object, and it is mostly green.
    assert found[0][:2] == ["red", "blue"]
    assert found[1][:2] == ["green", "red"]
    assert found[2][:2] == ["green", "green"]
    assert (found[0][2], found[2][2]) == ("yes", "no")


def test_an_image_without_a_box_is_looked_at_once_and_one_with_a_box_as_its_attributes_ask():
    model = Colours()
    tagger = ClipTagger(model)
    tags_of(tagger, [scene("red", "blue")] * 2, [BOX, None], ["", ""])
    assert model.seen == 2 + 1
    for only in (SCHEMA[:1], SCHEMA[1:2]):
        model.seen = 0
        tags_of(tagger, [scene("red", "blue")], [BOX], [""], only)
        assert model.seen == 1


def test_phrases_are_embedded_once_for_an_attribute_and_where_it_speaks_of_the_object_a_class():
    model = Colours()
    tagger = ClipTagger(model)
    for _ in range(2):
        tags_of(tagger, [scene("red", "blue")] * 3, [BOX] * 3, ["bear", "cat", "bear"])
    assert sorted(model.asked) == sorted(
        [
            [f"a photo of a bear, object color: {c}" for c in COLORS],
            [f"a photo of a cat, object color: {c}" for c in COLORS],
            [f"a photo, surroundings: {c}" for c in COLORS],
            ["a photo of a bear, shiny", "a photo of a bear, not shiny"],
            ["a photo of a cat, shiny", "a photo of a cat, not shiny"],
        ]
    )


def test_a_box_that_is_none_of_the_image_is_refused():
    with pytest.raises(InvalidInput):
        ClipTagger(Colours()).look(scene("red", "blue"), Box(200, 200, 5, 5), SCHEMA)


words = st.text("abc xyz", min_size=1, max_size=8).map(str.strip).filter(bool)


@given(words, st.lists(words, min_size=2, max_size=5, unique=True), st.sampled_from(["", "bear"]))
def test_each_tag_has_a_phrase_of_its_own_that_names_attribute_and_class(name, tags, label):
    for said in (phrases(name, tags, label), phrases(f"is {name}", ["yes", "no", "not visible"], label)):
        assert len(set(said)) == len(said)
        assert all(name in phrase and label in phrase for phrase in said)
    assert all(phrase.endswith(tag) for phrase, tag in zip(phrases(name, tags, label), tags, strict=True))


@given(sides, sides, st.integers(4, 32))
def test_a_squared_image_shows_all_of_it_unbent(height, width, side):
    image = np.zeros((height, width, 3), np.uint8)
    image[..., 0] = 255
    shown = squared(image, side)
    assert shown.shape == (side, side, 3)
    # What is not filled up is the image: red without any green.
    inside = shown[..., 1] < 40
    rows, columns = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
    fitted = side / max(height, width)
    assert abs(len(rows) - max(1, height * fitted)) <= 1
    assert abs(len(columns) - max(1, width * fitted)) <= 1


def test_tags_are_taken_over_only_from_the_same_model_weights_and_phrases(tmp_path):
    weights = tmp_path / "w.pt"
    weights.write_bytes(b"one")
    one = clip_id("tiny", str(weights))
    weights.write_bytes(b"other")
    ids = {one, clip_id("tiny", str(weights)), clip_id("large", str(weights)), clip_id("tiny", "laion2b")}
    assert len(ids) == 4
    copy = tmp_path / "elsewhere.pt"
    copy.write_bytes(b"one")
    assert clip_id("tiny", str(copy)) == one
    assert clip_id("", "") == ""
    keys = {attribute_key(SCHEMA[0], "p", "m", id_) for id_ in ids}
    assert len(keys) == 4
    vlm = Attribute("a", Category.GLOBAL, ("x", "y"), Tagger.VLM)
    assert len({attribute_key(vlm, "p", "m", id_) for id_ in ids}) == 1


def test_weights_that_are_not_here_are_named_and_a_tag_of_the_hub_is_none(tmp_path):
    with pytest.raises(Precondition, match=r"gone\.pt"):
        weights_digest(str(tmp_path / "gone.pt"))
    assert weights_digest("laion2b_s34b_b79k") == "laion2b_s34b_b79k"


@pytest.fixture(scope="module")
def model(tiny_clip):
    return Clip("tiny-clip", tiny_clip)


HAS_CLIP = importlib.util.find_spec("open_clip") is not None


@pytest.mark.skipif(not HAS_CLIP, reason="open_clip is not installed (the extra `clip`)")
class TestRealModel:
    def test_rows_are_unit_and_an_image_has_the_same_row_in_any_company(self, model):
        rng = np.random.default_rng(0)
        images = list(rng.integers(0, 256, (70, model.side_px, model.side_px, 3), dtype=np.uint8))
        rows = model.images(images)
        assert rows.shape == (70, 16)
        np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
        np.testing.assert_allclose(model.images(images[66:67]), rows[66:67], atol=1e-5)

    def test_the_picture_is_given_as_the_model_wants_it(self, model):
        """Against open_clip's own preprocessing of an image that needs no resizing."""
        import open_clip
        import torch
        from PIL import Image

        side = model.side_px
        image = np.random.default_rng(1).integers(0, 256, (side, side, 3), dtype=np.uint8)
        np.testing.assert_array_equal(squared(image, side), image)
        own = open_clip.image_transform(side, is_train=False)(Image.fromarray(image))
        with torch.inference_mode():
            row = model._model.encode_image(own[None]).numpy()
        np.testing.assert_allclose(model.images([image]), row / np.linalg.norm(row), atol=1e-5)

    @settings(deadline=None)
    @given(st.integers(0, 2**32 - 1))
    def test_each_tag_is_that_of_the_nearest_phrase(self, model, seed):
        image = np.random.default_rng(seed).integers(0, 256, (30, 50, 3), dtype=np.uint8)
        box = Box(5, 5, 20, 10)
        codes = asyncio.run(
            (tagger := ClipTagger(model)).tag([tagger.look(image, box, SCHEMA)], ["bear"], SCHEMA)
        ).codes[0]
        for code, one in zip(codes, SCHEMA, strict=True):
            near = one.category is Category.MAIN_OBJECT
            shown = image[5:15, 5:25] if near else image[:20, :35]
            likeness = (
                model.texts(phrases(one.name, one.tags, "bear" if near else ""))
                @ model.images([squared(shown, model.side_px)]).ravel()
            )
            assert likeness[code] >= likeness.max() - 1e-5

    def test_a_device_that_is_not_here_is_named(self, tiny_clip):
        with pytest.raises(Precondition, match="cuda:9"):
            Clip("tiny-clip", tiny_clip, "cuda:9")
