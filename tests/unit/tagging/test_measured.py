from __future__ import annotations

import numpy as np
import pytest

from services.tagging.measured import measured_codes
from shared.errors import InvalidInput
from shared.images.box import Box
from shared.images.measures import COLORS, measure
from shared.schema import UNKNOWN, Attribute, Category, Measure, Tagger


def attribute(measure_name: str, tags: tuple[str, ...], edges: tuple[float, ...] = (), name: str = "") -> Attribute:
    return Attribute(name or measure_name, Category.GLOBAL, tags, Tagger.MEASURED, measure=Measure(measure_name, edges))


def plain(level: int, height: int = 20, width: int = 20) -> np.ndarray:
    return np.full((height, width, 3), level, np.uint8)


BRIGHTNESS = attribute("brightness", ("dark", "middle", "bright"), (0.25, 0.75))
ORIENTATION = attribute("orientation", ("portrait", "square", "landscape"))
TEXTURE = attribute("object_texture", ("smooth", "textured"), (0.1,))


def test_each_image_gets_the_tag_of_its_value():
    images = [plain(10), plain(120, 40), plain(250, 20, 40)]
    got = measured_codes(images, [None] * 3, [ORIENTATION, BRIGHTNESS, TEXTURE])
    assert got.dtype == np.uint16
    assert got.tolist() == [[1, 0, UNKNOWN], [0, 1, UNKNOWN], [2, 2, UNKNOWN]]


def test_a_value_on_an_edge_belongs_to_the_tag_above():
    value = float(measure(plain(100), None, ["brightness"])[0])
    on_edge = attribute("brightness", ("below", "above"), (value,))
    assert measured_codes([plain(100)], [None], [on_edge]).tolist() == [[1]]
    above = attribute("brightness", ("below", "above"), (float(np.nextafter(value, 1)),))
    assert measured_codes([plain(100)], [None], [above]).tolist() == [[0]]


def test_the_box_says_which_object():
    image = plain(200)
    image[:, :10] = (200, 20, 20)
    image[:, 10:] = (20, 20, 200)
    color = attribute("object_color", ("blue", "red"))
    images, boxes = [image] * 3, [Box(0, 0, 10, 20), Box(10, 0, 10, 20), Box(40, 40, 5, 5)]
    assert measured_codes(images, boxes, [color]).tolist() == [[1], [0], [UNKNOWN]]


def test_a_tag_that_the_attribute_lacks_is_unknown():
    color = attribute("dominant_color", ("black", "white"))
    assert measured_codes([plain(0), plain(128), plain(255)], [None] * 3, [color])[:, 0].tolist() == [0, UNKNOWN, 1]
    every = attribute("dominant_color", COLORS)
    assert measured_codes([plain(128)], [None], [every]).tolist() == [[COLORS.index("gray")]]


def test_two_attributes_may_share_a_measure():
    fine = attribute("brightness", ("a", "b", "c", "d"), (0.1, 0.2, 0.3), name="fine brightness")
    assert measured_codes([plain(60)], [None], [BRIGHTNESS, fine]).tolist() == [[0, 2]]


def test_nothing_to_do():
    assert measured_codes([], [], [BRIGHTNESS]).shape == (0, 1)
    assert measured_codes([plain(1)], [None], []).shape == (1, 0)


def test_images_may_come_one_by_one_but_boxes_must_match():
    assert measured_codes((plain(v) for v in (0, 255)), (None for _ in range(2)), [BRIGHTNESS]).tolist() == [[0], [2]]
    with pytest.raises(ValueError, match="shorter"):
        measured_codes([plain(1), plain(2)], [None], [BRIGHTNESS])


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        (Attribute("pose", Category.MAIN_OBJECT, ("a", "b"), Tagger.VLM), "no measure"),
        (attribute("beauty", ("a", "b"), (1.0,)), "not a measure"),
        (attribute("brightness", ("a", "b")), "edges"),
        (attribute("brightness", ("a", "b", "c"), (1.0,)), "do not cut"),
        (attribute("orientation", ("portrait", "square", "landscape"), (0.5, 1.5)), "no edges"),
        (attribute("orientation", ("portrait", "round")), "'round'"),
    ],
)
def test_an_attribute_that_cannot_be_measured_is_refused_by_name(wrong, text):
    with pytest.raises(InvalidInput, match=text) as refused:
        measured_codes([], [], [BRIGHTNESS, wrong])
    assert wrong.name in str(refused.value)
