from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path

import fsspec
import numpy as np
import pytest
from fsspec.spec import AbstractFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from shared.errors import InvalidInput, NotFound, PermissionDenied, Precondition, Unavailable
from shared.images.box import Box
from shared.images.reader import ImageReader, crop, resized_jpeg, thumbnail

ANY = ImageReader(())


def picture(height: int = 12, width: int = 20) -> np.ndarray:
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows * 20 % 256, columns * 12 % 256, (rows + columns) * 7 % 256], axis=2).astype(np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


PNG = encoded(Image.fromarray(picture()))
JPEG = encoded(Image.fromarray(picture(64, 64)), "JPEG")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.png").write_bytes(PNG)
    (folder / "sub" / "b #1%20?.png").write_bytes(PNG)
    (tmp_path / "database").mkdir()
    (tmp_path / "database" / "secret.png").write_bytes(PNG)
    return folder


# --- where it may read ---


def test_reads_inside_the_prefix_by_path_and_by_uri(data):
    odd = data / "sub" / "b #1%20?.png"
    for prefix in (str(data), data.as_uri(), data.as_uri() + "/", str(data.parent), "/"):
        reader = ImageReader((prefix,))
        for uri in (
            str(data / "a.png"),
            (data / "a.png").as_uri(),
            f"file://localhost{data}/a.png",
            str(odd),
            odd.as_uri(),
        ):
            np.testing.assert_array_equal(reader.open(uri), picture())


def test_the_normal_form_is_one_file_uri(data):
    reader = ImageReader((str(data),))
    uri = (data / "a.png").as_uri()
    assert {
        reader.check_uri(u)
        for u in (uri, str(data / "a.png"), f"{data}/sub/../a.png", f"{data}//./a.png", f"/{data}/a.png")
    } == {uri}


def test_a_prefix_may_be_a_link(data):
    (data.parent / "link").symlink_to(data)
    assert ImageReader((str(data.parent / "link"),)).read(str(data / "a.png")) == PNG
    assert ImageReader((str(data),)).read(str(data.parent / "link" / "a.png")) == PNG


@pytest.mark.parametrize(
    "escape",
    [
        "{data}/../database/secret.png",
        "{data}base/secret.png",
        "file://{data}/../database/secret.png",
        "file://{data}/%2e%2e/database/secret.png",
        "file://{data}/%2E%2E%2Fdatabase/secret.png",
        "file://localhost{data}/sub/../../database/secret.png",
        "{data}/link.png",
        "{data}/linked/secret.png",
        "{data}/sub/link.png/../../../database/secret.png",
        "/etc/passwd",
        "FILE:///etc/passwd",
        "s3://bucket/a.png",
        "memory://x/a.png",
    ],
)
def test_nothing_outside_the_prefix(data, escape):
    (data / "link.png").symlink_to(data.parent / "database" / "secret.png")
    (data / "linked").symlink_to(data.parent / "database")
    reader = ImageReader((data.as_uri(), "s3://bucket/images", "memory://bucket"))
    uri = escape.format(data=data)
    for call in (reader.check_uri, reader.read, reader.open):
        with pytest.raises(PermissionDenied, match="HIBUG2_IMAGE_PREFIXES") as refused:
            call(uri)
        assert uri in str(refused.value)


@pytest.mark.parametrize(
    "uri",
    [
        "",
        "a.png",
        "../a.png",
        "~/a.png",
        "file:a.png",
        "data:image/png;base64,AAAA",
        "file://elsewhere/data/a.png",
        "/data/a\0.png",
        "file:///data/a%00.png",
        "/data/a\n.png",
        "simplecache::file:///data/a.png",
        "zip://a.png::file:///data/a.zip",
        "memory://bucket/images/../secret.png",
        "memory://bucket/images/%2e%2e/secret.png",
        "memory://bucket/images/..%2Fsecret.png",
        "memory://bucket/images/..\\secret.png",
        "memory://[bucket/a.png",
        "memory://bucket/images/a.png::file:///etc/passwd",
        "file://",
        "file://localhost",
        pytest.param("/" + "a" * 300, id="long name"),
        pytest.param("/a" * 3000, id="long path"),
    ],
)
def test_what_is_no_direct_uri_is_refused(uri):
    with pytest.raises(InvalidInput):
        ImageReader(("/", "memory://bucket/images")).read(uri)


def test_no_prefix_means_nothing(data):
    with pytest.raises(PermissionDenied, match="nothing"):
        ImageReader(()).read(str(data / "a.png"))


def test_a_prefix_that_is_no_uri_is_refused_when_the_reader_is_made():
    with pytest.raises(InvalidInput, match="HIBUG2_IMAGE_PREFIXES"):
        ImageReader(("data/images",))


@given(st.lists(st.sampled_from(["..", ".", "", "data", "database", "sub", "x"]), max_size=8))
def test_only_paths_that_resolve_inside_are_allowed(steps):
    path = "/nowhere/data/" + "/".join(steps)
    inside = os.path.normpath(path).startswith("/nowhere/data/") or os.path.normpath(path) == "/nowhere/data"
    reader = ImageReader(("/nowhere/data",))
    if inside:
        assert reader.check_uri(path) == Path(os.path.normpath(path)).as_uri()
    else:
        with pytest.raises(PermissionDenied):
            reader.check_uri(path)


def test_other_storages_compare_whole_components(data):
    store = fsspec.filesystem("memory")
    store.pipe({"/reader-test/images/a.png": PNG, "/reader-test/images2/a.png": PNG})
    reader = ImageReader(("memory://reader-test/images/",))
    assert reader.read("memory://reader-test/images/a.png") == PNG
    for uri in ("memory://reader-test/images2/a.png", "memory://reader-test/a.png", "memory://other/images/a.png"):
        with pytest.raises(PermissionDenied):
            reader.read(uri)
    store.rm("/reader-test", recursive=True)


# --- what the storage answers ---


def test_missing_empty_folder_and_pipe(data):
    reader = ImageReader((str(data),))
    (data / "empty.png").touch()
    os.mkfifo(data / "pipe.png")
    with pytest.raises(NotFound, match=r"none\.png"):
        reader.read(str(data / "none.png"))
    with pytest.raises(NotFound, match=r"a\.png/b"):
        reader.read(str(data / "a.png" / "b"))
    for name, text in (("empty.png", "empty"), ("sub", "not a file"), ("pipe.png", "not a file")):
        with pytest.raises(InvalidInput, match=text) as refused:
            reader.read(str(data / name))
        assert name in str(refused.value)


def test_bytes_are_bounded(data):
    uri = str(data / "a.png")
    assert ImageReader((str(data),), max_bytes=len(PNG)).read(uri) == PNG
    with pytest.raises(InvalidInput, match="more than"):
        ImageReader((str(data),), max_bytes=len(PNG) - 1).read(uri)


class _Endless(io.RawIOBase):
    """A file without an end, as a storage may show one; asked for all of it, it fails."""

    def read(self, size: int = -1) -> bytes:
        assert 0 <= size <= 11
        return b"x" * size


class _EndlessStorage(AbstractFileSystem):
    protocol = "endless"

    def _open(self, path, *args, **kwargs):
        return _Endless()


def test_no_more_is_read_than_the_limit():
    fsspec.register_implementation("endless", _EndlessStorage, clobber=True)
    with pytest.raises(InvalidInput, match="more than 10 bytes"):
        ImageReader(("endless://bucket",), max_bytes=10).read("endless://bucket/a.png")


class _Failing(AbstractFileSystem):
    protocol = "failing"
    failure: Exception = ConnectionResetError("gone")

    def _open(self, path, *args, **kwargs):
        raise PermissionError(path) if "locked" in path else self.failure


def test_failures_of_the_storage_say_what_to_do():
    fsspec.register_implementation("failing", _Failing, clobber=True)
    fsspec.register_implementation("driverless", "no_such_driver.Storage", clobber=True, errtxt="no driver")
    reader = ImageReader(("failing://bucket", "driverless://bucket", "nosuch://bucket"))
    with pytest.raises(PermissionDenied, match="grant"):
        reader.read("failing://bucket/locked.png")
    for failure in (ConnectionResetError("gone"), TimeoutError(), RuntimeError("an error of the driver's own")):
        _Failing.failure = failure
        with pytest.raises(Unavailable, match="try again"):
            reader.read("failing://bucket/a.png")
    with pytest.raises(Precondition, match="install"):
        reader.read("driverless://bucket/a.png")
    with pytest.raises(InvalidInput, match="no storage"):
        reader.read("nosuch://bucket/a.png")


# --- what it decodes ---


@pytest.mark.parametrize("kind", ["PNG", "BMP", "PPM", "TIFF", "WEBP"])
def test_lossless_formats_come_back_as_they_are(kind):
    got = ANY.decode(encoded(Image.fromarray(picture()), kind, lossless=True), "x")
    assert got.dtype == np.uint8
    assert got.flags.writeable
    np.testing.assert_array_equal(got, picture())


def test_gray_palette_bilevel_cmyk_and_animation():
    gray = picture()[:, :, 0]
    three = np.repeat(gray[:, :, None], 3, axis=2)
    np.testing.assert_array_equal(ANY.decode(encoded(Image.fromarray(gray)), "x"), three)
    two = Image.fromarray(gray > 100)
    np.testing.assert_array_equal(ANY.decode(encoded(two), "x")[:, :, 0], (gray > 100) * np.uint8(255))
    blocks = np.zeros((8, 8, 3), np.uint8)
    blocks[:4] = (200, 10, 10)
    palette = Image.fromarray(blocks).convert("P", palette=Image.Palette.ADAPTIVE, colors=2)
    np.testing.assert_array_equal(ANY.decode(encoded(palette), "x"), np.asarray(palette.convert("RGB")))
    frames = [Image.fromarray(blocks), Image.fromarray(blocks[::-1].copy())]
    gif = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(ANY.decode(gif, "x"), blocks)
    cmyk = encoded(Image.fromarray(blocks).convert("CMYK"), "JPEG")
    assert np.abs(ANY.decode(cmyk, "x").astype(int) - blocks).mean() < 20


def test_sixteen_bits_keep_the_high_byte():
    deep = (np.arange(240, dtype=np.uint16) * 273).reshape(12, 20)
    for kind in ("PNG", "TIFF", "PPM"):
        got = ANY.decode(encoded(Image.fromarray(deep), kind), "x")
        np.testing.assert_array_equal(got, np.repeat((deep >> 8).astype(np.uint8)[:, :, None], 3, axis=2))


def test_pixels_without_a_known_range_are_refused():
    for values in (np.full((4, 4), 0.5, np.float32), np.full((4, 4), 70_000, np.int32)):
        with pytest.raises(InvalidInput, match="8 or 16 bits"):
            ANY.decode(encoded(Image.fromarray(values), "TIFF"), "x")


def test_transparency_shows_white():
    rgba = np.dstack([picture(), np.full(picture().shape[:2], 255, np.uint8)])
    rgba[:6, :, 3] = 0
    got = ANY.decode(encoded(Image.fromarray(rgba)), "x")
    assert (got[:6] == 255).all()
    np.testing.assert_array_equal(got[6:], picture()[6:])
    masked = encoded(Image.fromarray(np.array([[0, 9]], np.uint8)), transparency=0)  # one grey level is see-through
    np.testing.assert_array_equal(ANY.decode(masked, "x")[0], [[255] * 3, [9] * 3])


@pytest.mark.parametrize(
    ("orientation", "turned"),
    [
        (1, lambda a: a),
        (2, lambda a: a[:, ::-1]),
        (3, lambda a: a[::-1, ::-1]),
        (4, lambda a: a[::-1]),
        (5, lambda a: a.transpose(1, 0, 2)),
        (6, lambda a: np.rot90(a, -1)),
        (7, lambda a: a[::-1, ::-1].transpose(1, 0, 2)),
        (8, lambda a: np.rot90(a, 1)),
    ],
)
def test_exif_orientation_is_applied(orientation, turned):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(picture()), "PNG", exif=exif)
    np.testing.assert_array_equal(ANY.decode(data, "x"), turned(picture()))


def test_one_pixel():
    assert ANY.decode(encoded(Image.new("RGB", (1, 1), (1, 2, 3))), "x").tolist() == [[[1, 2, 3]]]


@pytest.mark.parametrize(
    "data", [b"", b"\x89PNG", b"hello, this is text", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"]
)
def test_what_is_no_image_is_refused_by_name(data):
    with pytest.raises(InvalidInput, match=r"file:///d/x\.png"):
        ANY.decode(data, "file:///d/x.png")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_cut_file_is_an_error(kind, share):
    grain = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    whole = encoded(Image.fromarray(grain), kind)
    with pytest.raises(InvalidInput, match="cut off"):
        ANY.decode(whole[: int(len(whole) * share)], "x.png")


def _png_of_claimed_size(width: int, height: int) -> bytes:
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [header, b"IDAT" + zlib.compress(b"\0" * 1000), b"IEND"]
    body = b"".join(struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks)
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [8_001, 12_000, 60_000, 2**31 - 1])
def test_a_bomb_is_refused_before_it_is_decoded(side):
    with pytest.raises(InvalidInput, match=r"over the limit of 64,000,000"):
        ANY.decode(_png_of_claimed_size(side, side), "bomb.png")


def test_the_limit_of_pixels_is_the_setting():
    assert ImageReader((), max_pixels=240).decode(PNG, "x").shape == (12, 20, 3)
    with pytest.raises(InvalidInput, match="20 x 12"):
        ImageReader((), max_pixels=239).decode(PNG, "x")


@settings(deadline=None, max_examples=150)
@pytest.mark.filterwarnings("ignore")  # of the decoders, about the broken bytes
@given(st.sampled_from([PNG, JPEG]), st.data())
def test_broken_bytes_give_an_image_or_a_clear_error(whole, data):
    broken = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 6))):
        broken[data.draw(st.integers(0, len(broken) - 1))] = data.draw(st.integers(0, 255))
    try:
        image = ANY.decode(bytes(broken), "x.png")
    except InvalidInput as error:
        refused = str(error)
        assert "x.png" in refused
    else:
        assert image.dtype == np.uint8
        assert image.ndim == 3
        assert image.shape[2] == 3


# --- cutting and shrinking ---


@given(st.floats(-10, 19), st.floats(-10, 11), st.floats(0.1, 40), st.floats(0.1, 40), st.floats(0, 3))
def test_crop_holds_the_box_and_a_margin_only_adds(left, top, width, height, margin):
    image, box = picture(), Box(left, top, width, height)
    if box.pixels(20, 12) is None:
        with pytest.raises(InvalidInput, match="outside"):
            crop(image, box, margin)
        return
    plain, wide = crop(image, box), crop(image, box, margin)
    x0, y0, x1, y1 = box.pixels(20, 12)
    np.testing.assert_array_equal(plain, image[y0:y1, x0:x1])
    assert plain.size > 0
    assert wide.shape[0] >= plain.shape[0]
    assert wide.shape[1] >= plain.shape[1]


def test_crop_refuses_a_negative_margin():
    with pytest.raises(InvalidInput, match="margin"):
        crop(picture(), Box(0, 0, 5, 5), -0.1)


@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 120))
@settings(deadline=None, max_examples=40)
def test_small_copies_fit_and_are_never_enlarged(height, width, side):
    image = picture(height, width)
    for kind, data in (("WEBP", thumbnail(image, side)), ("JPEG", resized_jpeg(image, side))):
        opened = Image.open(io.BytesIO(data))
        assert opened.format == kind
        assert max(opened.size) == min(side, max(height, width))
        assert min(opened.size) >= 1


def test_a_tiny_thumbnail_is_exact():
    np.testing.assert_array_equal(ANY.decode(thumbnail(picture(28, 28), 64), "x"), picture(28, 28))


def test_a_crop_can_be_shrunk():
    assert ANY.decode(resized_jpeg(crop(picture(), Box(3, 2, 9, 5)), 4), "x").shape == (2, 4, 3)
