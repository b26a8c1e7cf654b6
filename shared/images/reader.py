"""Images by URI: opened only inside the allowed prefixes, bounded before they are decoded, always upright RGB.

Images stay in the user's storage. Whatever lies there may be missing, huge, cut off or hostile, so every way in
goes through `ImageReader`, and each refusal names the URI and what to do.
"""

from __future__ import annotations

import errno
import io
import math
import re
import stat
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from urllib.parse import unquote, urlsplit

import fsspec
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from shared.errors import (
    HiBug2Error,
    InvalidInput,
    NotFound,
    PermissionDenied,
    Precondition,
    Unavailable,
    invalid,
)
from shared.images.box import Box, check_box

PREFIXES_SETTING = "HIBUG2_IMAGE_PREFIXES"
MAX_BYTES = 64 * 1024 * 1024
MAX_PIXELS = 64_000_000
MAX_URI = 4096

# Decoders in common use only: others (EPS, for one) start programs or are rarely looked after.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
_SCHEME = re.compile(r"^[a-zA-Z][a-zA-Z0-9+.-]*://")

RGB = NDArray[np.uint8]


@dataclass(frozen=True)
class ImageReader:
    """Reads images whose URI lies under one of `prefixes`.

    `prefixes` are URIs of folders ("file:///data", "s3://bucket/images") or absolute paths; none means that nothing
    may be read. `max_bytes` bounds the file, `max_pixels` the decoded image (a small file can hold a huge one).
    """

    prefixes: tuple[str, ...]
    max_bytes: int = MAX_BYTES
    max_pixels: int = MAX_PIXELS

    def __post_init__(self) -> None:
        _ = self._places  # a prefix that is none is refused here, not at the first image

    @cached_property
    def _places(self) -> tuple[_Place, ...]:
        return tuple(_locate(prefix, PREFIXES_SETTING) for prefix in self.prefixes)

    def check_uri(self, uri: str) -> str:
        """The normal form of `uri` (symlinks and `..` resolved for files) when it may be read.

        Raises InvalidInput when it is no URI, PermissionDenied when it lies outside the prefixes. Touches no file's
        content and says nothing about whether the image exists.
        """
        return self._allowed(uri).uri

    def read(self, uri: str) -> bytes:
        """The bytes at `uri`, at most `max_bytes` of them.

        Raises what `check_uri` raises; NotFound; InvalidInput for a folder, an empty or too large file; Unavailable
        when the storage fails and may work again; Precondition when the driver of the storage is not installed.
        """
        place = self._allowed(uri)
        try:
            data = _fetch(place, self.max_bytes + 1)
        except HiBug2Error:
            raise
        except (FileNotFoundError, NotADirectoryError):
            raise NotFound(f"{uri}: there is no such file; check the path, or leave the image out") from None
        except PermissionError:
            text = f"{uri}: the storage refuses to let this service read it; grant it read access"
            raise PermissionDenied(text) from None
        except ImportError as error:
            text = f"{uri}: cannot read '{place.scheme}://' here: {error}; install the driver for it"
            raise Precondition(text) from None
        except Exception as error:  # the drivers of storages have errors of their own
            if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
                raise invalid("uri", f"{uri}: no file can have so long a name; check the path") from None
            raise Unavailable(f"{uri}: could not be read ({type(error).__name__}: {error}); try again") from error
        if not data:
            raise invalid("uri", f"{uri} is empty (0 bytes); write the file again, or leave the image out")
        if len(data) > self.max_bytes:
            raise invalid("uri", f"{uri} holds more than {self.max_bytes:,} bytes; store a smaller file")
        return data

    def decode(self, data: bytes, where: str) -> RGB:
        """The image in `data` as (H, W, 3) uint8 RGB, upright by its EXIF orientation; `where` names it in errors.

        16-bit grey is scaled to 8 bits, transparency laid over white, of an animation the first frame taken.
        Raises InvalidInput when it is empty, no image, too large, or cannot be decoded to its end.
        """
        if not data:
            raise invalid("image", f"{where} is empty (0 bytes); write the file again, or leave the image out")
        try:
            with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
                width, height = opened.size
                if width * height > self.max_pixels:
                    raise self._too_many_pixels(where, f"{width} x {height} pixels")
                opened.load()
                return _upright_rgb(opened)
        except UnidentifiedImageError:
            kinds = ", ".join(FORMATS)
            text = f"{where} is not an image, or it is cut off at its start; give one of {kinds}"
            raise invalid("image", text) from None
        except Image.DecompressionBombError:
            raise self._too_many_pixels(where, "far too many pixels") from None
        except (HiBug2Error, MemoryError):
            raise
        except Exception as error:  # decoders given broken bytes raise nearly anything, and all of it means this
            text = f"{where} is corrupt or cut off ({type(error).__name__}: {error}); write the file again"
            raise invalid("image", text) from error

    def open(self, uri: str) -> RGB:
        """`decode(read(uri))`: the image at `uri` as (H, W, 3) uint8 RGB."""
        return self.decode(self.read(uri), uri)

    def _too_many_pixels(self, where: str, what: str) -> InvalidInput:
        return invalid("image", f"{where} has {what}, over the limit of {self.max_pixels:,}; store it smaller")

    def _allowed(self, uri: str) -> _Place:
        place = _locate(uri, "uri")
        if any(place.is_inside(prefix) for prefix in self._places):
            return place
        allowed = ", ".join(self.prefixes) if self.prefixes else "nothing"
        raise PermissionDenied(
            f"{uri}: outside the places images may be read from ({allowed}); "
            f"move the image there, or add its folder to the setting {PREFIXES_SETTING}",
            metadata={"uri": uri, "setting": PREFIXES_SETTING},
        )


@dataclass(frozen=True)
class _Place:
    """Where a URI leads: storage, host or bucket, and the folders on the way, compared one by one."""

    scheme: str
    host: str
    parts: tuple[str, ...]
    uri: str
    path: str  # what the storage is asked for

    def is_inside(self, prefix: _Place) -> bool:
        same_store = (self.scheme, self.host) == (prefix.scheme, prefix.host)
        return same_store and self.parts[: len(prefix.parts)] == prefix.parts


def _locate(uri: str, field: str) -> _Place:
    """Where `uri` leads; InvalidInput naming `field` when it is neither a URI nor an absolute path."""
    if not uri or any(ord(c) < 32 for c in uri):
        raise invalid(field, f"{uri!r} is not a URI: it is empty or holds control characters")
    if len(uri) > MAX_URI:
        raise invalid(field, f"{uri[:100]}… is {len(uri):,} characters long; a URI has at most {MAX_URI:,}")
    if uri.startswith("/"):
        return _local(uri, field)
    if not _SCHEME.match(uri):
        raise invalid(field, f"{uri} is not absolute; give a URI (file:///…, s3://…) or a path that starts with /")
    try:
        split = urlsplit(uri)
    except ValueError as error:
        raise invalid(field, f"{uri} is not a URI: {error}") from None
    if split.scheme == "file":
        if split.netloc not in ("", "localhost"):
            raise invalid(field, f"{uri} names the machine '{split.netloc}'; a file URI starts with file:///")
        # everything after the host, for '?' and '#' are common in file names
        return _local(unquote(uri[len("file://") + len(split.netloc) :]), field)
    if "::" in uri:
        raise invalid(field, f"{uri} chains storages with '::'; give the URI of the image itself")
    rest = uri.split("://", 1)[1]
    host, _, path = rest.partition("/")
    parts = tuple(part for part in path.split("/") if part)
    if any(unquote(step) in (".", "..") for part in parts for step in re.split(r"[\\]|%5[cC]|%2[fF]", part)):
        raise invalid(field, f"{uri} holds '.' or '..' as a folder; give the direct URI")
    return _Place(split.scheme, host, parts, f"{split.scheme}://{rest}", f"{split.scheme}://{rest}")


def _local(path: str, field: str) -> _Place:
    if not path.startswith("/") or "\0" in path:
        raise invalid(field, f"{path!r} is not the absolute path of a file; give file:///… with the whole path")
    try:
        real = Path("/" + path.lstrip("/")).resolve()  # two slashes at the start would stay apart from one
    except (OSError, RuntimeError) as error:  # a loop of symlinks, for one
        raise invalid(field, f"{path} cannot be resolved: {error}") from None
    return _Place("file", "", real.parts[1:], real.as_uri(), str(real))


def _fetch(place: _Place, limit: int) -> bytes:
    """At most `limit` bytes of what lies there."""
    if place.scheme == "file":
        found = Path(place.path)
        if not stat.S_ISREG(found.stat().st_mode):  # a folder, or a pipe that would never end
            raise invalid("uri", f"{place.uri} is not a file; give the URI of one image")
        with found.open("rb") as local:
            return local.read(limit)
    try:
        storage = fsspec.filesystem(place.scheme)
    except ValueError:
        raise invalid(
            "uri", f"'{place.scheme}://' is no storage that can be read; use file://, s3:// or gs://"
        ) from None
    with storage.open(place.path, "rb") as file:
        return bytes(file.read(limit))


def _upright_rgb(image: Image.Image) -> RGB:
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I"):
        deep = np.asarray(image)
        if deep.size and (deep.min() < 0 or deep.max() > 65535):
            raise ValueError("its pixels go beyond 16 bits; save it with 8 or 16 bits a channel")
        grey = (deep.astype(np.int64) >> 8).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.mode == "F":
        raise ValueError("its pixels are fractions without a known range; save it with 8 or 16 bits a channel")
    if image.has_transparency_data:
        layered = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layered.size, "white"), layered)
    return np.array(image if image.mode == "RGB" else image.convert("RGB"), dtype=np.uint8)


def crop(image: RGB, box: Box, margin: float = 0.0) -> RGB:
    """The part of `image` (H, W, 3) inside `box`, grown by `margin` of its size on each side; a view, not a copy.

    What reaches over the border is cut. Raises InvalidInput when the box has no area or lies outside the image.
    """
    if not (math.isfinite(margin) and margin >= 0):
        raise invalid("margin", f"is {margin}; give 0 or more, as a share of the box")
    height, width = image.shape[:2]
    check_box(box, "box", (width, height))
    inside = box.expanded(margin).pixels(width, height)
    assert inside is not None  # noqa: S101 - a box that overlaps still does when it has grown
    left, top, right, bottom = inside
    return image[top:bottom, left:right]


def thumbnail(image: RGB, size: int) -> bytes:
    """`image` (H, W, 3) as WebP with no side over `size` pixels, never enlarged; lossless where it is tiny."""
    small = _fitted(image, size)
    out = io.BytesIO()
    small.save(out, "WEBP", quality=80, lossless=max(small.size) <= 64)
    return out.getvalue()


def resized_jpeg(image: RGB, longest_side: int) -> bytes:
    """`image` (H, W, 3) as JPEG with no side over `longest_side` pixels, never enlarged: what a VLM is shown."""
    out = io.BytesIO()
    _fitted(image, longest_side).save(out, "JPEG", quality=90)
    return out.getvalue()


def _fitted(image: RGB, longest_side: int) -> Image.Image:
    if longest_side < 1:
        raise invalid("size", f"is {longest_side}; give at least 1 pixel")
    picture = Image.fromarray(np.ascontiguousarray(image))
    scale = longest_side / max(picture.size)
    if scale >= 1:
        return picture
    width, height = (max(1, round(side * scale)) for side in picture.size)
    return picture.resize((width, height), Image.Resampling.LANCZOS)
