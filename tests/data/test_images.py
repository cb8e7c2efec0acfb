from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from mecq_cli.data.images import MAX_PIXELS, read_image
from mecq_cli.errors import DataError

RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)
COLOUR = np.stack([RAMP, RAMP[::-1], RAMP.T], axis=-1)


def save(folder: Path, image: Image.Image, name: str, **options: Any) -> Path:
    path = folder / name
    image.save(path, **options)
    return path


def test_lossless_colour_is_read_as_it_is(tmp_path: Path) -> None:
    for name in ("a.png", "a.bmp", "a.ppm", "a.tif"):
        pixels = read_image(save(tmp_path, Image.fromarray(COLOUR), name))
        assert pixels.dtype == np.uint8
        np.testing.assert_array_equal(pixels, COLOUR, err_msg=name)
    lossless = save(tmp_path, Image.fromarray(COLOUR), "a.webp", lossless=True)
    np.testing.assert_array_equal(read_image(lossless), COLOUR)
    # ImageNet has a PNG that is called .JPEG: the content decides.
    misnamed = save(tmp_path, Image.fromarray(COLOUR), "b.JPEG", format="PNG")
    np.testing.assert_array_equal(read_image(misnamed), COLOUR)


def test_grey_palette_and_one_bit(tmp_path: Path) -> None:
    grey = np.repeat(RAMP[..., None], 3, axis=2)
    np.testing.assert_array_equal(read_image(save(tmp_path, Image.fromarray(RAMP), "g.png")), grey)
    colours = np.array([[0, 1], [2, 1]])
    palette = Image.fromarray(colours.astype(np.uint8), "P")
    palette.putpalette([255, 0, 0, 0, 255, 0, 1, 2, 3])
    expected = np.array([[255, 0, 0], [0, 255, 0], [1, 2, 3]])[colours]
    for name in ("p.png", "p.gif"):
        np.testing.assert_array_equal(read_image(save(tmp_path, palette, name)), expected)
    bits = Image.fromarray((colours > 0).astype(np.uint8) * 255).convert("1")
    expected = np.repeat((colours > 0)[..., None] * 255, 3, axis=2)
    np.testing.assert_array_equal(read_image(save(tmp_path, bits, "b.png")), expected)


def test_transparent_pixels_lie_on_white(tmp_path: Path) -> None:
    rgba = np.array([[[10, 20, 30, 255], [10, 20, 30, 0], [0, 0, 0, 51]]], dtype=np.uint8)
    expected = [[[10, 20, 30], [255, 255, 255], [204, 204, 204]]]
    assert read_image(save(tmp_path, Image.fromarray(rgba), "a.png")).tolist() == expected
    grey = Image.merge("LA", (Image.new("L", (1, 1), 7), Image.new("L", (1, 1), 0)))
    assert read_image(save(tmp_path, grey, "la.png")).tolist() == [[[255, 255, 255]]]
    palette = Image.fromarray(np.array([[0, 1]], dtype=np.uint8), "P")
    palette.putpalette([9, 9, 9, 8, 8, 8])
    path = save(tmp_path, palette, "p.png", transparency=0)
    assert read_image(path).tolist() == [[[255, 255, 255], [8, 8, 8]]]
    key = save(tmp_path, Image.fromarray(rgba[..., :3]), "key.png", transparency=(10, 20, 30))
    assert read_image(key).tolist() == [[[255] * 3, [255] * 3, [0] * 3]]


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.pgm"])
def test_16_bit_grey_is_scaled_not_clipped(tmp_path: Path, name: str) -> None:
    wide = np.array([[0, 128, 129, 257, 32768, 65535]], dtype=np.uint16)
    path = save(tmp_path, Image.fromarray(wide), name)
    expected = np.round(wide / 257).astype(np.uint8)
    np.testing.assert_array_equal(read_image(path), np.repeat(expected[..., None], 3, axis=2))


def test_cmyk_is_not_inverted(tmp_path: Path) -> None:
    photo = Image.new("RGB", (32, 32), (250, 120, 10))
    path = save(tmp_path, photo.convert("CMYK"), "a.jpg", quality=95)
    assert np.abs(read_image(path).astype(int) - [250, 120, 10]).max() < 12


def test_orientation_in_the_metadata_is_ignored(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    path = save(tmp_path, Image.new("RGB", (20, 10)), "a.jpg", exif=exif)
    assert read_image(path).shape == (10, 20, 3)


def encoded(format: str, image: Image.Image | None = None) -> bytes:
    buffer = io.BytesIO()
    (image or Image.fromarray(COLOUR)).save(buffer, format)
    return buffer.getvalue()


def animated(format: str) -> bytes:
    buffer = io.BytesIO()
    first, *rest = (Image.fromarray(np.roll(COLOUR, i, axis=0)) for i in range(3))
    first.save(buffer, format, save_all=True, append_images=rest, duration=40)
    return buffer.getvalue()


def bomb() -> bytes:
    """A PNG of 100,000 x 100,000 pixels in a few bytes."""
    buffer = io.BytesIO()
    chunk = PngImagePlugin.putchunk
    buffer.write(b"\x89PNG\r\n\x1a\n")
    side = (100_000).to_bytes(4, "big")
    chunk(buffer, b"IHDR", side, side, b"\x08\x02\x00\x00\x00")
    chunk(buffer, b"IDAT", b"")
    chunk(buffer, b"IEND", b"")
    return buffer.getvalue()


BAD: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty.png": (lambda: b"", "0 bytes"),
    "text.png": (lambda: b"this is no image", "not an image"),
    "truncated.png": (lambda: encoded("PNG")[:-40], "truncated"),
    "truncated.jpg": (lambda: encoded("JPEG", Image.new("RGB", (99, 99)))[:-99], "truncated"),
    "postscript.png": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an im"),
    "moving.gif": (lambda: animated("GIF"), "animated"),
    "moving.png": (lambda: animated("PNG"), "animated"),
    "moving.webp": (lambda: animated("WEBP"), "animated"),
    "pages.tif": (lambda: animated("TIFF"), "several pages"),
    "bomb.png": (bomb, f"{MAX_PIXELS:,}"),
    "strip.png": (lambda: encoded("PNG", Image.new("RGB", (1, 5000))), "100 times"),
    "float.tif": (lambda: encoded("TIFF", Image.new("F", (4, 4))), "floating point"),
    "int.tif": (lambda: encoded("TIFF", Image.new("I", (4, 4))), "32-bit integers"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_images_get_one_line_with_their_name(tmp_path: Path, name: str) -> None:
    make, message = BAD[name]
    path = tmp_path / name
    path.write_bytes(make())
    with pytest.raises(DataError, match=message) as caught:
        read_image(path)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_image_and_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        read_image(tmp_path / "gone.png")
    with pytest.raises(DataError, match="it is a folder"):
        read_image(tmp_path)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("format", ["PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM"])
def test_cut_at_any_byte_is_an_error_or_changes_nothing(tmp_path: Path, format: str) -> None:
    whole, path = encoded(format), tmp_path / "cut"
    assert len(whole) < 2000
    path.write_bytes(whole)
    expected = read_image(path)
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        try:
            pixels = read_image(path)
        except DataError:
            continue
        np.testing.assert_array_equal(pixels, expected, err_msg=f"cut at {length}")
