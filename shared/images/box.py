"""The box of one object in an image, in pixels from the top left corner."""

from __future__ import annotations

import math
from dataclasses import dataclass

from shared.errors import Violation, refuse


@dataclass(frozen=True)
class Box:
    """A rectangle in pixels; `left` and `top` may lie outside the image, fractions are kept."""

    left: float
    top: float
    width: float
    height: float

    @property
    def right(self) -> float:
        return self.left + self.width

    @property
    def bottom(self) -> float:
        return self.top + self.height

    def pixels(self, image_width: int, image_height: int) -> tuple[int, int, int, int] | None:
        """Whole pixels (left, top, right, bottom) of the part inside the image, right and bottom exclusive.

        A pixel that the box touches belongs to it, so what is left has at least one pixel each way; None when the
        box lies outside the image altogether.
        """
        # clamped before rounding, so that huge but finite numbers stay harmless
        left, right = max(self.left, 0.0), min(self.right, float(image_width))
        top, bottom = max(self.top, 0.0), min(self.bottom, float(image_height))
        if not (left < right and top < bottom):
            return None
        return math.floor(left), math.floor(top), math.ceil(right), math.ceil(bottom)

    def expanded(self, margin: float) -> Box:
        """The box grown on each side by `margin` times its own width and height."""
        dx, dy = self.width * margin, self.height * margin
        return Box(self.left - dx, self.top - dy, self.width + 2 * dx, self.height + 2 * dy)


def check_box(box: Box, field: str, image_size: tuple[int, int] | None = None) -> Box:
    """Return `box` when it is finite, has an area and, given (width, height), overlaps the image.

    Raises InvalidInput naming `field` and the part of the box that is wrong. A box that reaches over the border
    is fine: annotations do, and the part inside the image is used.
    """
    found: list[Violation] = []
    for name in ("left", "top", "width", "height"):
        value = getattr(box, name)
        if not math.isfinite(value):
            found.append(Violation(f"{field}.{name}", f"is {value}; give a finite number of pixels"))
        elif name in ("width", "height") and value <= 0:
            found.append(Violation(f"{field}.{name}", f"is {value:g}; a box has a width and a height above 0"))
    if not found and image_size is not None and box.pixels(*image_size) is None:
        width, height = image_size
        text = (
            f"left={box.left:g} top={box.top:g} width={box.width:g} height={box.height:g} lies outside the "
            f"image of {width} x {height}; give pixels of this image, from its top left corner"
        )
        found.append(Violation(field, text))
    refuse(found)
    return box
