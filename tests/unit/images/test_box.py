from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import InvalidInput
from shared.images.box import Box, check_box

places = st.floats(-1e6, 1e6) | st.integers(-5, 60).map(float)
sizes = st.floats(1e-3, 1e6) | st.integers(1, 60).map(float)


@given(places, places, sizes, sizes, st.integers(1, 50), st.integers(1, 50))
def test_pixels_are_those_that_the_box_touches(left, top, width, height, image_width, image_height):
    box = Box(left, top, width, height)
    got = box.pixels(image_width, image_height)
    # a pixel [i, i+1) is touched when it overlaps the box by more than an edge
    columns = [i for i in range(image_width) if i < box.right and i + 1 > left]
    rows = [i for i in range(image_height) if i < box.bottom and i + 1 > top]
    if not columns or not rows:
        assert got is None
    else:
        assert got == (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)


def test_box_expands_around_its_centre():
    assert Box(10, 20, 40, 10).expanded(0.5) == Box(-10, 15, 80, 20)


@pytest.mark.parametrize(
    ("box", "field"),
    [
        (Box(0, 0, 0, 5), "instances[3].box.width"),
        (Box(0, 0, 5, -1), "instances[3].box.height"),
        (Box(math.nan, 0, 5, 5), "instances[3].box.left"),
        (Box(0, math.inf, 5, 5), "instances[3].box.top"),
        (Box(30, 0, 5, 5), "instances[3].box"),
        (Box(-5, 0, 5, 5), "instances[3].box"),
    ],
)
def test_wrong_box_is_refused_by_field(box, field):
    with pytest.raises(InvalidInput) as refused:
        check_box(box, "instances[3].box", (30, 20))
    assert [v.field for v in refused.value.violations] == [field]


def test_box_over_the_border_is_fine():
    box = Box(-3, -3, 100, 100)
    assert check_box(box, "box", (30, 20)) is box
    assert box.pixels(30, 20) == (0, 0, 30, 20)
