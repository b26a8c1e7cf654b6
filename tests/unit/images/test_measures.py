"""Measures against planted truth: what is planted moves its measure the right way, and leaves the others alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter

from shared.errors import InvalidInput
from shared.images.box import Box
from shared.images.measures import COLORS, MEASURES, measure
from shared.images.reader import ImageReader

NAMES = tuple(MEASURES)


def value(image: np.ndarray, name: str, box: Box | None = None) -> float:
    return float(measure(image, box, [name])[0])


def tag(image: np.ndarray, name: str, box: Box | None = None) -> str:
    return MEASURES[name].tags[int(value(image, name, box))]


def as_image(values: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def scene(seed: int, side: int = 96) -> np.ndarray:
    """Something like a photo: soft light, patches of colour with sharp edges, fine texture on some, a little noise."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:side, :side] / side
    image = 90 + 50 * np.dstack([rows, columns, (rows + columns) / 2])
    for _ in range(12):
        y, x = rng.integers(0, side - 20, 2)
        h, w = rng.integers(8, 40, 2)
        patch = rng.uniform(50, 205, 3) + 15 * rng.random() * np.sin(np.arange(side) * rng.uniform(0.3, 1))[:, None]
        image[y : y + h, x : x + w] = patch[x : x + w]
    return as_image(np.clip(image, 40, 215) + rng.normal(0, 1, image.shape))


def blurred(image: np.ndarray, radius: float) -> np.ndarray:
    return np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(radius)))


def noisy(image: np.ndarray, deviation: float) -> np.ndarray:
    return as_image(image + np.random.default_rng(1).normal(0, deviation, image.shape))


def darkened(image: np.ndarray, factor: float) -> np.ndarray:
    return as_image(image * factor)


def brightened(image: np.ndarray, factor: float) -> np.ndarray:
    return as_image(255 - (255.0 - image) * factor)


def flattened(image: np.ndarray, factor: float) -> np.ndarray:
    return as_image(image.mean() + (image - image.mean()) * factor)


def grayed(image: np.ndarray, share: float) -> np.ndarray:
    return as_image(image * (1 - share) + image.mean(axis=2, keepdims=True) * share)


def warmed(image: np.ndarray, factor: float) -> np.ndarray:
    return as_image(image * [factor, 1, 1 / factor])


SCENES = [scene(seed) for seed in range(8)]

# measure, what is planted, settings in the order in which the measure must rise
ORDERS = [
    ("brightness", darkened, (0.3, 0.6, 1.0)),
    ("brightness", brightened, (1.0, 0.7, 0.4)),
    ("contrast", flattened, (0.2, 0.5, 1.0)),
    ("saturation", grayed, (1.0, 0.6, 0.0)),
    ("sharpness", blurred, (3.0, 1.5, 0.7, 0.0)),
    ("noise", noisy, (0.0, 5.0, 12.0, 25.0)),
    ("color_temperature", warmed, (0.8, 0.9, 1.0, 1.1, 1.2)),
    ("background_clutter", blurred, (3.0, 1.0, 0.0)),
]


@pytest.mark.parametrize(("name", "plant", "steps"), ORDERS, ids=lambda v: getattr(v, "__name__", str(v)))
def test_what_is_planted_orders_its_measure(name, plant, steps):
    for image in SCENES:
        values = [value(plant(image, step), name) for step in steps]
        assert values == sorted(values)
        assert values[-1] > values[0] + 1e-3


# measure, what is planted, how far it may move as a share of the measure's spread over planted truth
STILL = [
    ("brightness", noisy, 10.0, 0.05),
    ("brightness", blurred, 1.5, 0.1),
    ("brightness", grayed, 0.8, 0.1),
    ("contrast", darkened, 0.5, 0.25),
    ("contrast", grayed, 0.5, 0.25),
    ("saturation", darkened, 0.5, 0.05),
    ("saturation", blurred, 1.5, 0.1),
    ("sharpness", darkened, 0.5, 0.1),
    ("sharpness", flattened, 0.5, 0.1),
    ("sharpness", noisy, 8.0, 0.25),
    ("noise", darkened, 0.5, 0.1),
    ("noise", grayed, 1.0, 0.1),
    ("color_temperature", darkened, 0.5, 0.05),
    ("color_temperature", noisy, 10.0, 0.05),
    ("background_clutter", darkened, 0.5, 0.1),
]


@pytest.mark.parametrize(("name", "plant", "step", "share"), STILL, ids=lambda v: getattr(v, "__name__", str(v)))
def test_a_measure_stays_when_something_else_is_planted(name, plant, step, share):
    moves, spreads = [], []
    for image in SCENES:
        planted = [value(p(image, s), n) for n, p, steps in ORDERS if n == name for s in steps]
        spreads.append(max(planted) - min(planted))
        moves.append(abs(value(plant(image, step), name) - value(image, name)))
    assert np.median(moves) <= share * np.median(spreads)


def test_noise_is_its_deviation():
    flat = np.full((120, 120, 3), 128, np.uint8)
    for deviation in (3, 10, 20):
        grain = np.random.default_rng(0).normal(0, deviation, (120, 120, 1)) * np.ones(3)
        assert value(as_image(flat + grain), "noise") * 255 == pytest.approx(deviation, rel=0.1)
    assert value(flat, "noise") == 0


NAMED = {
    "black": (10, 10, 10),
    "gray": (128, 128, 128),
    "white": (250, 250, 250),
    "red": (200, 20, 30),
    "orange": (250, 140, 20),
    "brown": (110, 65, 25),
    "yellow": (240, 220, 30),
    "green": (30, 150, 50),
    "cyan": (30, 200, 210),
    "blue": (30, 60, 200),
    "purple": (130, 40, 170),
    "pink": (250, 140, 180),
}


@pytest.mark.parametrize("name", COLORS)
def test_colors_are_called_by_name(name):
    behind = (250, 250, 250) if name != "white" else (10, 10, 10)
    image = np.full((40, 40, 3), behind, np.uint8)
    image[10:30, 12:28] = NAMED[name]
    assert tag(image, "object_color") == name
    assert tag(image, "dominant_color") == ("black" if name == "white" else "white")
    image[4:36, 4:36] = NAMED[name]
    assert tag(image, "dominant_color") == name
    assert tag(image, "object_color", Box(4, 4, 32, 32)) == name


def test_size_and_orientation():
    for shape, orientation in (
        ((40, 20), "portrait"),
        ((20, 20), "square"),
        ((20, 21), "square"),
        ((20, 40), "landscape"),
    ):
        image = np.zeros((*shape, 3), np.uint8)
        assert tag(image, "orientation") == orientation
        assert value(image, "resolution") == pytest.approx(np.sqrt(shape[0] * shape[1]))


def on_plain(
    top: int, left: int, height: int, width: int, side: int = 100, behind: int = 230, ink: int = 60
) -> np.ndarray:
    image = np.full((side, side, 3), behind, np.uint8)
    image[top : top + height, left : left + width] = ink
    return image


@given(st.integers(1, 60), st.integers(1, 60), st.integers(8, 39), st.integers(8, 39), st.booleans())
@settings(max_examples=40, deadline=None)
def test_a_plain_object_is_found_where_it_is_with_or_without_a_box(top, left, height, width, boxed):
    image = on_plain(top, left, height, width)
    box = Box(left, top, width, height) if boxed else None
    assert value(image, "object_extent", box) == pytest.approx(height * width / 1e4)
    assert value(image, "object_aspect", box) == pytest.approx(width / height)
    assert value(image, "object_horizontal_position", box) == pytest.approx((left + width / 2) / 100)
    assert value(image, "object_vertical_position", box) == pytest.approx((top + height / 2) / 100)
    assert value(image, "object_brightness", box) == pytest.approx(60 / 255, abs=0.01)
    assert value(image, "object_texture", box) == pytest.approx(0, abs=1e-6)
    assert value(image, "background_clutter", box) == pytest.approx(0, abs=1e-6)
    assert tag(image, "object_truncation", box) == "no"


def test_light_and_noise_leave_the_object_where_it_is():
    image = on_plain(20, 30, 40, 25)
    names = ["object_extent", "object_aspect", "object_horizontal_position", "object_vertical_position"]
    plain = measure(image, None, names)
    for planted in (darkened(image, 0.4), brightened(image, 0.4), noisy(image, 12), flattened(image, 0.4)):
        np.testing.assert_allclose(measure(planted, None, names), plain, rtol=0.05)


def test_the_faint_parts_of_an_object_stay_part_of_it_in_bad_light():
    image = on_plain(20, 20, 50, 50, behind=0, ink=250)
    image[40:70, 20:70] = 40
    for planted in (image, darkened(image, 0.5), darkened(image, 0.25)):
        assert value(planted, "object_extent") == pytest.approx(0.25)


def test_the_rim_of_a_box_is_not_the_object():
    image = np.full((60, 60, 3), 255, np.uint8)
    image[16:44, 16:44] = (200, 20, 30)
    assert tag(image, "object_color", Box(10, 10, 40, 40)) == "red"


def test_truncation():
    for top, left in ((0, 30), (60, 30), (30, 0), (30, 60)):
        assert tag(on_plain(top, left, 40, 40), "object_truncation") == "yes"
        assert tag(SCENES[0], "object_truncation", Box(left, top, 40, 40)) == (
            "yes" if 0 in (top, left) or 60 in (top, left) else "no"
        )
    assert tag(on_plain(30, 30, 40, 40), "object_truncation") == "no"
    assert tag(SCENES[0], "object_truncation", Box(30, 30, 40, 40)) == "no"
    assert tag(SCENES[0], "object_truncation", Box(-5, 30, 40, 40)) == "yes"


def test_symmetry():
    rng = np.random.default_rng(0)
    half = rng.integers(0, 256, (60, 30, 1)) * np.ones(3)
    mirror = as_image(np.concatenate([half, half[:, ::-1]], axis=1))
    chance = as_image(rng.integers(0, 256, (60, 60, 1)) * np.ones(3))
    whole = Box(0, 0, 60, 60)
    assert value(mirror, "object_symmetry", whole) == pytest.approx(1, abs=1e-5)
    assert abs(value(chance, "object_symmetry", whole)) < 0.1
    assert value(np.maximum(mirror, 1) // 2, "object_symmetry", whole) == pytest.approx(1, abs=1e-4)
    slope = as_image(np.linspace(0, 255, 60)[None, :, None] * np.ones((60, 1, 3)))
    assert value(slope, "object_symmetry", whole) == pytest.approx(-1, abs=1e-3)
    assert np.isnan(value(np.full((60, 60, 3), 9, np.uint8), "object_symmetry", whole))


def test_texture_and_clutter_tell_object_from_background():
    stripes = as_image(120 + 60 * (np.arange(100)[None, :, None] % 4 < 2) * np.ones((100, 1, 3)))
    box = Box(30, 30, 40, 40)
    busy_behind, busy_object = stripes.copy(), np.full_like(stripes, 120)
    busy_behind[30:70, 30:70] = 120
    busy_object[30:70, 30:70] = stripes[30:70, 30:70]
    assert value(busy_behind, "background_clutter", box) > 0.05
    assert value(busy_behind, "object_texture", box) == pytest.approx(0, abs=1e-6)
    assert value(busy_object, "object_texture", box) > 0.05
    assert value(busy_object, "background_clutter", box) == pytest.approx(0, abs=1e-6)
    assert value(darkened(busy_object, 0.5), "object_texture", box) == pytest.approx(
        value(busy_object, "object_texture", box), rel=0.02
    )


def test_object_resolution_counts_pixels_inside_the_image():
    big = np.zeros((900, 1200, 3), np.uint8)
    assert value(big, "object_resolution", Box(100, 100, 64, 64)) == pytest.approx(64)
    assert value(big, "object_resolution", Box(-32, 0, 64, 128)) == pytest.approx(64)
    assert np.isnan(value(big, "object_resolution"))


OBJECT = [name for name in NAMES if name.startswith("object_")]


def test_without_a_plain_border_or_inside_the_box_there_is_no_object():
    checks = np.kron(np.indices((12, 12)).sum(axis=0) % 2, np.ones((8, 8)))[:, :, None] * np.full(3, 255)
    assert np.isnan(measure(as_image(checks), None, OBJECT)).all()
    assert np.isnan(measure(np.full((30, 30, 3), 77, np.uint8), None, OBJECT)).all()
    assert np.isnan(measure(SCENES[0], Box(96, 0, 10, 10), OBJECT)).all()
    assert np.isfinite(measure(as_image(checks), None, ["background_clutter"])).all()


def test_large_images_are_measured_like_their_reduced_copies_except_for_noise():
    small = scene(3, side=320)
    large = np.asarray(Image.fromarray(small).resize((1280, 1280), Image.Resampling.BICUBIC))
    medium = np.asarray(Image.fromarray(small).resize((640, 640), Image.Resampling.BICUBIC))
    names = ["brightness", "contrast", "saturation", "color_temperature", "background_clutter"]
    np.testing.assert_allclose(measure(large, None, names), measure(medium, None, names), rtol=0.1, atol=0.01)
    grainy = noisy(large, 15)
    assert value(grainy, "noise") == pytest.approx(15 / 255 * np.sqrt(0.299**2 + 0.587**2 + 0.114**2), rel=0.15)
    box, quarter = Box(400, 400, 300, 600), Box(200, 200, 150, 300)
    names = ["object_extent", "object_aspect", "object_horizontal_position", "object_vertical_position"]
    np.testing.assert_allclose(measure(large, box, names), measure(medium, quarter, names), rtol=0.02)


images = st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**32 - 1), st.sampled_from([0, 1, 255])).map(
    lambda t: np.random.default_rng(t[2]).integers(0, t[3], (t[0], t[1], 3), dtype=np.uint8, endpoint=True)
)
boxes = st.none() | st.builds(Box, st.floats(-9, 12), st.floats(-9, 12), st.floats(0.01, 20), st.floats(0.01, 20))


@given(images, boxes)
@settings(max_examples=200, deadline=None)
def test_any_image_gives_numbers_in_range_or_nan_and_the_same_again(image, box):
    before = image.copy()
    got = measure(image, box, NAMES)
    assert got.dtype == np.float64
    np.testing.assert_array_equal(image, before)
    np.testing.assert_array_equal(got, measure(image.copy(), box, NAMES))
    np.testing.assert_array_equal(got[::-1], measure(image, box, NAMES[::-1]))  # no measure leans on one before it
    assert not np.isinf(got).any()
    for name, number in zip(NAMES, got, strict=True):
        if np.isnan(number):
            assert name in ("sharpness", "noise", "background_clutter") or name.startswith("object_")
        elif MEASURES[name].tags:
            assert number in range(len(MEASURES[name].tags))
        elif name in ("brightness", "contrast", "saturation", "object_extent") or name.endswith("_position"):
            assert 0 <= number <= 1


def test_one_pixel_and_one_line():
    for shape in ((1, 1), (1, 50), (50, 1), (2, 2), (1, 3000)):
        got = dict(zip(NAMES, measure(np.full((*shape, 3), 200, np.uint8), None, NAMES), strict=True))
        assert got["brightness"] == pytest.approx(200 / 255)
        assert np.isnan(got["sharpness"])


def test_planes_of_other_memory_order_are_the_same():
    image = SCENES[0]
    turned = np.asfortranarray(image)
    np.testing.assert_array_equal(measure(image, None, NAMES), measure(turned, None, NAMES))
    view = np.concatenate([image, image], axis=1)[:, :96]
    np.testing.assert_array_equal(measure(image, None, NAMES), measure(view, None, NAMES))


def test_wrong_arrays_and_names_are_refused():
    for wrong in (
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((4, 4, 3)),
        np.zeros((0, 4, 3), np.uint8),
    ):
        with pytest.raises(InvalidInput, match="RGB"):
            measure(wrong, None, NAMES)
    with pytest.raises(InvalidInput, match="'beauty' is not a measure"):
        measure(SCENES[0], None, ["beauty"])


def test_a_file_is_measured_as_its_array(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(SCENES[1]).save(path)
    read = ImageReader((str(tmp_path),)).open(str(path))
    np.testing.assert_array_equal(measure(read, None, NAMES), measure(SCENES[1], None, NAMES))
