"""What can be measured from pixels and boxes: the measures behind measured attributes (paper 3.2.1).

Each measure is one number of one image, or the position of a tag for categorical ones; NaN where it cannot be
measured, which becomes "unknown". They are chosen so that one planted fault moves one measure: where light or
contrast would shift another measure too, that measure is a ratio.

Two scales. Images with a side over 640 pixels are first reduced to 640 (each pixel the mean of those it covers), for
models see them about that size and values stay comparable between large and small files. Resolution and orientation
are of the image itself, and noise is read at full resolution, for reducing averages it away.

The object. Given a box, the object is what lies in it. Without one, it is the pixels that differ from the colour of
the border, which holds for product shots, scans and cut-outs; where the border has no plain colour there is no such
mask, and the object's measures are NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from shared.errors import invalid
from shared.images.box import Box
from shared.schema import Category

COLORS = ("black", "gray", "white", "red", "orange", "brown", "yellow", "green", "cyan", "blue", "purple", "pink")
ORIENTATIONS = ("portrait", "square", "landscape")
NO_YES = ("no", "yes")

WORKING_SIDE = 640
NOISE_PATCH = 128  # of images over the working size, noise is read on 4 x 4 such patches
MIN_MASK = 0.005  # a smaller mask is a few stray pixels, not an object
DARK = 16.0  # luma below which ratios to the mean luma would blow up the last bit

Luma = NDArray[np.float32]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class MeasureKind:
    """One measure: its name, its category, its tags when it is categorical, and whether only a box gives it."""

    name: str
    category: Category
    tags: tuple[str, ...] = ()  # in the order of the positions that the measure returns; none when numeric
    needs_box: bool = False

    @property
    def numeric(self) -> bool:
        return not self.tags


@dataclass(frozen=True)
class _Region:
    """Where the object is in the working copy: its rectangle (right and bottom exclusive) and, without a box, mask."""

    left: int
    top: int
    right: int
    bottom: int
    mask: Mask | None

    def core(self) -> tuple[slice, slice]:
        """Rows and columns of the middle of a box: its rim shows what is behind the object."""
        dx, dy = int((self.right - self.left) * 0.15), int((self.bottom - self.top) * 0.15)
        return slice(self.top + dy, self.bottom - dy), slice(self.left + dx, self.right - dx)


class _Picture:
    """One image with what several measures need, each worked out once and only when asked for."""

    def __init__(self, image: NDArray[np.uint8], box: Box | None) -> None:
        self.full = image
        self.box = box
        self.height, self.width = image.shape[:2]

    @cached_property
    def planes(self) -> NDArray[np.uint8]:
        """The working copy as (3, h, w)."""
        image, longest = self.full, max(self.height, self.width)
        if longest > WORKING_SIDE:
            scale = WORKING_SIDE / longest
            size = max(1, round(self.width * scale)), max(1, round(self.height * scale))
            image = np.asarray(Image.fromarray(np.ascontiguousarray(image)).resize(size, Image.Resampling.BOX))
        return np.ascontiguousarray(image.transpose(2, 0, 1))

    @cached_property
    def luma(self) -> Luma:
        """(h, w) in 0..255."""
        return _luma(*self.planes)

    @cached_property
    def luma_levels(self) -> NDArray[np.float64]:
        """Luma at the 5th, 50th and 95th percentile, from the histogram of whole levels."""
        counts = np.bincount(self.luma.astype(np.uint8).ravel(), minlength=256).cumsum()
        levels: NDArray[np.float64] = np.searchsorted(counts, counts[-1] * np.array([0.05, 0.5, 0.95])) * 1.0
        return levels

    @cached_property
    def grain(self) -> float:
        """Deviation of the working copy's noise, in luma levels."""
        return _grain(self.luma)

    @cached_property
    def slopes(self) -> tuple[Luma, Luma]:
        """Absolute differences of neighbours along x (h, w-1) and along y (h-1, w)."""
        luma = self.luma
        return np.abs(luma[:, 1:] - luma[:, :-1]), np.abs(luma[1:] - luma[:-1])

    @cached_property
    def colors(self) -> NDArray[np.uint8]:
        """(h, w) position in COLORS of each pixel."""
        red, green, blue = self.planes >> 3
        cell = (red.astype(np.uint16) << 10) | (green.astype(np.uint16) << 5) | blue
        names: NDArray[np.uint8] = _color_table().take(cell)
        return names

    @cached_property
    def region(self) -> _Region | None:
        """The object: the box where one is given, else the mask; None where neither shows one."""
        if self.box is None:
            return self._masked_region()
        inside = self.box.pixels(self.width, self.height)
        if inside is None:
            return None
        _, height, width = self.planes.shape
        x, y = width / self.width, height / self.height
        left, top = int(inside[0] * x), int(inside[1] * y)
        right, bottom = max(left + 1, round(inside[2] * x)), max(top + 1, round(inside[3] * y))
        return _Region(left, top, min(right, width), min(bottom, height), None)

    def _masked_region(self) -> _Region | None:
        planes = self.planes
        _, height, width = planes.shape
        rim = max(1, round(0.02 * min(height, width)))
        sides = (planes[:, :rim], planes[:, -rim:], planes[:, :, :rim], planes[:, :, -rim:])
        border = np.concatenate([side.reshape(3, -1) for side in sides], axis=1)
        middle = np.sort(border, axis=1)[:, border.shape[1] // 2]
        apart = _apart(planes, middle)
        spread = np.sort(_apart(border, middle))[border.shape[1] // 2]
        # 8 % of the largest difference follows the light; 4 spreads keep the border's own noise out
        limit = max(4.0, 0.08 * float(apart.max()), 4.0 * float(spread))
        if limit > 80:
            return None
        mask: Mask = apart > limit
        if np.count_nonzero(mask) < MIN_MASK * mask.size:
            return None
        top, bottom = _span(np.count_nonzero(mask, axis=1))
        left, right = _span(np.count_nonzero(mask, axis=0))
        return _Region(left, top, right, bottom, mask)

    def object_pixels(self, values: NDArray[np.generic], region: _Region) -> NDArray[np.generic]:
        """`values` (h, w) on the object, flat: in the mask, or in the middle of the box."""
        return values[region.core()].ravel() if region.mask is None else values[region.mask]


def _luma(red: NDArray[np.uint8], green: NDArray[np.uint8], blue: NDArray[np.uint8]) -> Luma:
    """Rec. 601 weights, in 256ths so that sixteen bits hold the sum exactly."""
    total = red * np.uint16(77)
    total += green * np.uint16(150)
    total += blue * np.uint16(29)
    out: Luma = total.astype(np.float32)
    out *= np.float32(1 / 256)
    return out


def _bend_x(values: Luma) -> Luma:
    """Second difference along the last axis, two shorter."""
    out: Luma = values[..., 1:-1] * np.float32(-2)
    out += values[..., :-2]
    out += values[..., 2:]
    return out


def _bend_y(values: Luma) -> Luma:
    """Second difference along the last axis but one, two shorter."""
    out: Luma = values[..., 1:-1, :] * np.float32(-2)
    out += values[..., :-2, :]
    out += values[..., 2:, :]
    return out


def _apart(planes: NDArray[np.uint8], color: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The largest difference to `color` over the three channels."""
    red, green, blue = (np.maximum(p, c) - np.minimum(p, c) for p, c in zip(planes, color, strict=True))
    apart: NDArray[np.uint8] = np.maximum(np.maximum(red, green), blue)
    return apart


def _span(counts: NDArray[np.int64]) -> tuple[int, int]:
    """First and last+1 line that holds the mask, a hundredth of its pixels left out at each end (stray ones)."""
    below = counts.cumsum()
    first = int(below.searchsorted(0.01 * below[-1], side="right"))
    return first, int(below.searchsorted(0.99 * below[-1])) + 1


@cache
def _color_table() -> NDArray[np.uint8]:
    """The colour name of each of the 32 x 32 x 32 cells of the RGB cube, by hue, saturation and value."""
    cells = np.arange(32768)
    rgb = np.stack([cells >> 10, (cells >> 5) & 31, cells & 31]) / 31.0
    value, low = rgb.max(axis=0), rgb.min(axis=0)
    chroma = value - low
    saturation = chroma / np.maximum(value, 1e-9)
    red, green, blue = rgb
    safe = np.maximum(chroma, 1e-9)
    sixth = np.select(
        [value == red, value == green], [(green - blue) / safe % 6, (blue - red) / safe + 2], (red - green) / safe + 4
    )
    hue = sixth * 60
    # ends of the hues, in degrees; red goes on past 345
    ends = np.array([15, 42, 70, 165, 195, 255, 295, 345])
    named = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink", "red")
    codes = np.array([COLORS.index(name) for name in named], dtype=np.uint8)
    table: NDArray[np.uint8] = codes[np.searchsorted(ends, hue, side="right")]
    table[((hue < 15) | (hue >= 345)) & (value > 0.75) & (saturation < 0.5)] = COLORS.index("pink")
    table[(hue >= 10) & (hue < 42) & (value < 0.65)] = COLORS.index("brown")
    plain = (saturation < 0.15) | (chroma < 0.08)
    table[plain] = COLORS.index("gray")
    table[plain & (value > 0.85)] = COLORS.index("white")
    table[value < 0.2] = COLORS.index("black")
    return table


# --- the whole image ---


def _brightness(p: _Picture) -> float:
    """Mean of the 5th, 50th and 95th percentile of luma, 0..1.

    The high one tells dark images best, the low one washed-out ones, and a loss of contrast moves them evenly together.
    """
    return float(p.luma_levels.mean()) / 255


def _contrast(p: _Picture) -> float:
    """(high - low) / (high + low) of the 95th and 5th percentile of luma, 0..1 (Michelson): light cancels."""
    low, _, high = p.luma_levels
    return float((high - low) / (high + low + 8))  # 8 levels, so that the last bits of a black image are no contrast


def _saturation(p: _Picture) -> float:
    """Sum of max-min over sum of max of the channels, 0..1: HSV saturation weighted by value.

    The weight keeps near-black pixels out, whose saturation is chance, and a change of light cancels.
    """
    red, green, blue = p.planes
    high = np.maximum(np.maximum(red, green), blue)
    low = np.minimum(np.minimum(red, green), blue)
    total = float(high.sum(dtype=np.int64))
    return 1 - float(low.sum(dtype=np.int64)) / total if total else 0.0


def _sharpness(p: _Picture) -> float:
    """Standard deviation of the Laplacian over that of luma, the noise's part taken from both; 0 for a flat image.

    Over luma, so that light and contrast cancel; white noise of deviation s adds 20 s² to the Laplacian's variance.
    """
    if min(p.luma.shape) < 3:
        return np.nan
    laplacian = _bend_x(p.luma[1:-1])
    laplacian += _bend_y(p.luma[:, 1:-1])
    fine = float(laplacian.var()) - 20 * p.grain**2
    coarse = float(p.luma.var())
    return float(np.sqrt(max(fine, 0.0) / coarse)) if coarse > 0 else 0.0


def _grain(luma: Luma) -> float:
    """Deviation of white noise in luma levels, after Immerkaer (1996); `luma` is (…, h, w), h and w of 3 and more.

    His two crossed second differences leave lines and slopes at zero and have 6 times the noise's deviation. The
    median of their size takes the place of his mean, so that texture on less than half of the image does not count.
    """
    crossed = _bend_y(_bend_x(luma))
    if crossed.size > 100_000:
        crossed = crossed[..., ::2, ::2]  # a quarter is plenty for a median, which is slow
    return float(np.median(np.abs(crossed))) / (6 * 0.6745)


def _noise(p: _Picture) -> float:
    """Deviation of the noise over 255 (see `_grain`), at full resolution."""
    if min(p.height, p.width) < 3:
        return np.nan
    if max(p.height, p.width) <= WORKING_SIDE:
        return p.grain / 255
    high, wide = min(NOISE_PATCH, p.height), min(NOISE_PATCH, p.width)
    tops = np.linspace(0, p.height - high, 4).astype(int)
    lefts = np.linspace(0, p.width - wide, 4).astype(int)
    patches = np.stack([p.full[y : y + high, x : x + wide] for y in tops for x in lefts])
    return _grain(_luma(patches[..., 0], patches[..., 1], patches[..., 2])) / 255


def _color_temperature(p: _Picture) -> float:
    """log2 of mean red over mean blue, in octaves: above 0 warm, below 0 cool (grey world)."""
    red, _, blue = p.planes
    return float(np.log2((red.mean() + 1) / (blue.mean() + 1)))


def _dominant_color(p: _Picture) -> float:
    """The colour name that most pixels have."""
    return float(np.bincount(p.colors.ravel(), minlength=len(COLORS)).argmax())


def _resolution(p: _Picture) -> float:
    """Square root of the number of pixels: the side of the square with as many."""
    return float(np.sqrt(p.width * p.height))


def _orientation(p: _Picture) -> float:
    """Portrait, square (sides within 5 %) or landscape."""
    if max(p.width, p.height) <= 1.05 * min(p.width, p.height):
        return 1.0
    return 0.0 if p.height > p.width else 2.0


# --- what is behind the object ---


def _background_clutter(p: _Picture) -> float:
    """`object_texture`'s formula outside the object; on the whole image where no object is known."""
    region = p.region
    if region is None:
        return _texture(p, None)
    if region.mask is not None:
        return _texture(p, ~region.mask)
    outside: Mask = np.ones(p.luma.shape, dtype=np.bool_)
    outside[region.top : region.bottom, region.left : region.right] = False
    return _texture(p, outside)


def _texture(p: _Picture, where: Mask | None) -> float:
    """Mean step between neighbours that both lie in `where` (None: anywhere), over the mean luma there."""
    along_x, along_y = p.slopes
    if where is None:
        total, pairs = float(along_x.sum() + along_y.sum()), along_x.size + along_y.size
        level = float(p.luma.mean())
    else:
        inside = where.astype(np.float32)
        both_x, both_y = inside[:, 1:] * inside[:, :-1], inside[1:] * inside[:-1]
        total = float(np.vdot(along_x, both_x) + np.vdot(along_y, both_y))
        pairs = int(np.count_nonzero(both_x)) + int(np.count_nonzero(both_y))
        level = float(np.vdot(p.luma, inside)) / max(int(np.count_nonzero(where)), 1)
    return total / pairs / max(level, DARK) if pairs else np.nan


# --- the object ---


def _of_object(of: Callable[[_Picture, _Region], float]) -> Callable[[_Picture], float]:
    """`of` where there is an object, NaN where there is none."""

    def measured(p: _Picture) -> float:
        return np.nan if p.region is None else of(p, p.region)

    measured.__doc__ = of.__doc__
    return measured


@_of_object
def _object_color(p: _Picture, region: _Region) -> float:
    """The colour name that most pixels of the object have."""
    return float(np.bincount(p.object_pixels(p.colors, region), minlength=len(COLORS)).argmax())


@_of_object
def _object_brightness(p: _Picture, region: _Region) -> float:
    """Mean luma of the object, 0..1."""
    return float(p.object_pixels(p.luma, region).mean()) / 255


@_of_object
def _object_extent(p: _Picture, region: _Region) -> float:
    """Share of the image that the object takes."""
    if region.mask is None:
        return (region.right - region.left) * (region.bottom - region.top) / p.luma.size
    return float(region.mask.mean())


@_of_object
def _object_resolution(p: _Picture, region: _Region) -> float:
    """Side of the square with as many pixels of the image as the box; NaN without a box."""
    inside = p.box.pixels(p.width, p.height) if p.box is not None else None
    if inside is None:
        return np.nan
    return float(np.sqrt((inside[2] - inside[0]) * (inside[3] - inside[1])))


@_of_object
def _object_aspect(p: _Picture, region: _Region) -> float:
    """Width over height of the object's rectangle."""
    return (region.right - region.left) / (region.bottom - region.top)


@_of_object
def _object_horizontal_position(p: _Picture, region: _Region) -> float:
    """Centre of the box or of the mask's mass, 0 at the left border, 1 at the right."""
    return _position(region.left, region.right, p.luma.shape[1], region.mask, 0)


@_of_object
def _object_vertical_position(p: _Picture, region: _Region) -> float:
    """Centre of the box or of the mask's mass, 0 at the top border, 1 at the bottom."""
    return _position(region.top, region.bottom, p.luma.shape[0], region.mask, 1)


def _position(start: int, end: int, size: int, mask: Mask | None, across: int) -> float:
    if mask is None:
        return (start + end) / 2 / size
    mass = np.count_nonzero(mask, axis=across)
    return float((mass * (np.arange(size) + 0.5)).sum() / mass.sum()) / size


@_of_object
def _object_symmetry(p: _Picture, region: _Region) -> float:
    """Correlation of the object's rectangle with its mirror image, left to right: 1 is symmetric; NaN when flat."""
    part = p.luma[region.top : region.bottom, region.left : region.right]
    centred = part - part.mean()
    power = float(np.square(centred).sum())
    if power < 1e-3 * part.size:
        return np.nan
    return float((centred * centred[:, ::-1]).sum()) / power


@_of_object
def _object_texture(p: _Picture, region: _Region) -> float:
    """Mean step of luma between neighbours on the object over its mean luma: smooth is 0; light cancels."""
    if region.mask is not None:
        return _texture(p, region.mask)
    core: Mask = np.zeros(p.luma.shape, dtype=np.bool_)
    core[region.core()] = True
    return _texture(p, core)


@_of_object
def _object_truncation(p: _Picture, region: _Region) -> float:
    """1 when the box ends within a pixel of the border, or the mask covers a twentieth of one side; else 0."""
    if p.box is not None:
        box = p.box
        return float(box.left < 1 or box.top < 1 or box.right > p.width - 1 or box.bottom > p.height - 1)
    mask = region.mask
    assert mask is not None  # noqa: S101 - without a box the region comes from a mask
    sides = (mask[0], mask[-1], mask[:, 0], mask[:, -1])
    return float(any(side.mean() >= 0.05 for side in sides))


_WHOLE, _BEHIND, _MAIN = Category.GLOBAL, Category.BACKGROUND, Category.MAIN_OBJECT
_ALL: tuple[tuple[MeasureKind, Callable[[_Picture], float]], ...] = (
    (MeasureKind("brightness", _WHOLE), _brightness),
    (MeasureKind("contrast", _WHOLE), _contrast),
    (MeasureKind("saturation", _WHOLE), _saturation),
    (MeasureKind("sharpness", _WHOLE), _sharpness),
    (MeasureKind("noise", _WHOLE), _noise),
    (MeasureKind("color_temperature", _WHOLE), _color_temperature),
    (MeasureKind("dominant_color", _WHOLE, COLORS), _dominant_color),
    (MeasureKind("resolution", _WHOLE), _resolution),
    (MeasureKind("orientation", _WHOLE, ORIENTATIONS), _orientation),
    (MeasureKind("background_clutter", _BEHIND), _background_clutter),
    (MeasureKind("object_color", _MAIN, COLORS), _object_color),
    (MeasureKind("object_brightness", _MAIN), _object_brightness),
    (MeasureKind("object_extent", _MAIN), _object_extent),
    (MeasureKind("object_resolution", _MAIN, needs_box=True), _object_resolution),
    (MeasureKind("object_aspect", _MAIN), _object_aspect),
    (MeasureKind("object_horizontal_position", _MAIN), _object_horizontal_position),
    (MeasureKind("object_vertical_position", _MAIN), _object_vertical_position),
    (MeasureKind("object_symmetry", _MAIN), _object_symmetry),
    (MeasureKind("object_texture", _MAIN), _object_texture),
    (MeasureKind("object_truncation", _MAIN, NO_YES), _object_truncation),
)

MEASURES: Mapping[str, MeasureKind] = MappingProxyType({kind.name: kind for kind, _ in _ALL})
_FUNCTIONS = {kind.name: function for kind, function in _ALL}


def measure(image: NDArray[np.uint8], box: Box | None, names: Sequence[str]) -> NDArray[np.float64]:
    """The measures `names` (keys of MEASURES) of one image, (len(names),) float64.

    `image` is (H, W, 3) uint8 RGB, upright; `box` the object in its pixels. A categorical measure gives the position
    of its tag. NaN where a measure does not exist: no object can be told, the box lies outside the image, or the
    image is too small. Raises InvalidInput for another array or name.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
        raise invalid("image", f"is {image.dtype} of shape {image.shape}; give (height, width, 3) uint8 RGB")
    for name in names:
        if name not in MEASURES:
            raise invalid("measures", f"'{name}' is not a measure; choose from {', '.join(MEASURES)}")
    picture = _Picture(image, box)
    return np.array([_FUNCTIONS[name](picture) for name in names], dtype=np.float64)
