"""An image file becomes RGB pixels, or one line that says why it cannot.

Choices, the same in training and evaluation:

* Transparent pixels lie on white, as a viewer shows them.
* 16-bit grey is scaled to 8 bits, round(v / 257); colour of 16 bits keeps its high byte.
* CMYK goes through Pillow's plain conversion; colour profiles are not applied.
* The EXIF orientation is ignored, as by the pipelines the pretrained models were trained with.
* Of several frames none is picked: an animation or a file of many pages is an error. (A camera's
  MPO file is a JPEG with previews behind it; its first image is the photograph.)

An image is never skipped, and never replaced by another.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from mecq_cli.data.split import Encoded
from mecq_cli.errors import DataError

MAX_PIXELS = 89_478_485
"""Above this Pillow warns of a decompression bomb; here it is an error."""
MAX_ASPECT = 100
"""Long side over short side. Beyond, resizing the short side would need gigabytes."""

# The size is checked below, and remarks on broken metadata (TIFF, EXIF) concern no pixel.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.\w+Plugin")
Image.init()
# Only plain raster formats: Pillow's others start programs (EPS) or read further files.
_KNOWN = ("PNG", "JPEG", "BMP", "GIF", "JPEG2000", "PPM", "TIFF", "WEBP", "AVIF")
_FORMATS = tuple(name for name in _KNOWN if name in Image.OPEN)


_OF_A_SET = " (a run that has begun goes on with --resume once it is replaced under the same name)"


def read_image(
    path: str | os.PathLike[str] | Encoded, advice: str = _OF_A_SET
) -> NDArray[np.uint8]:
    """Pixels uint8 [H, W, 3], RGB.

    Args:
        path: of the file, or its bytes.
        advice: ends the message where it cannot be used.

    Raises:
        DataError: missing, empty, truncated, no image, animated, far too large, or of a kind
            that has no defined 8-bit value (32-bit integers, floats).
    """
    return np.array(open_rgb(path, advice), dtype=np.uint8)


def open_rgb(path: str | os.PathLike[str] | Encoded, advice: str = _OF_A_SET) -> Image.Image:
    """As `read_image`, but a Pillow image of mode RGB, decoded and detached from its file."""
    with opened(path, advice) as image:
        return to_rgb(image)


@contextmanager
def opened(
    path: str | os.PathLike[str] | Encoded, advice: str = _OF_A_SET
) -> Iterator[Image.Image]:
    """The open image with its head checked; whatever fails inside becomes a DataError."""
    try:
        with path.open() if isinstance(path, Encoded) else open(path, "rb") as file:
            if file.seek(0, os.SEEK_END) == 0:
                raise _Unusable("the file is empty (0 bytes)")
            file.seek(0)
            with Image.open(file, formats=_FORMATS) as image:
                _check(image)
                yield image
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise nearly everything on broken files
        name = path.name if isinstance(path, Encoded) else os.fspath(path)
        raise DataError(
            f"cannot use image {name!r}: {_reason(error)}; replace it or remove it{advice}"
        ) from error


class _Unusable(Exception):
    """The reason why an image is not used, in words."""


def _check(image: Image.Image) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise _Unusable(f"{width} x {height} pixels are more than the {MAX_PIXELS:,} allowed")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise _Unusable(f"{width} x {height} pixels; one side may be {MAX_ASPECT} times the other")
    if image.format != "MPO" and getattr(image, "is_animated", getattr(image, "n_frames", 1) > 1):
        raise _Unusable("it is animated or has several pages; save the frame to use on its own")
    wide_grey = image.mode == "I" and image.format in ("PNG", "PPM")  # values up to 65535
    if image.mode in ("I", "F") and not wide_grey:
        kind = "32-bit integers" if image.mode == "I" else "floating point numbers"
        raise _Unusable(f"its pixels are {kind}, of unknown range; save it with 8 or 16 bits")


def to_rgb(image: Image.Image) -> Image.Image:
    """Decode and convert; see the choices at the top of this file."""
    if image.mode == "RGB" and "transparency" not in image.info:
        image.load()
        return image
    if image.mode.startswith("I"):
        grey = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((grey + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        pixels = image.convert("RGBA")
        white = Image.new("RGBA", pixels.size, "white")
        return Image.alpha_composite(white, pixels).convert("RGB")
    return image.convert("RGB")


def in_channels(image: Image.Image, channels: int) -> Image.Image:
    """An RGB image as a network of 3 channels, or of 1, takes it."""
    return image.convert("L") if channels == 1 else image


def pixels_of(image: Image.Image) -> NDArray[np.uint8]:
    """uint8 [channels, H, W] of an image; the inverse of `picture_of`, where that is in colour."""
    return np.atleast_3d(np.asarray(image)).transpose(2, 0, 1)


def picture_of(pixels: NDArray[np.uint8]) -> Image.Image:
    """The picture (RGB) that uint8 [channels, H, W] are."""
    grey = len(pixels) == 1
    return Image.fromarray(pixels[0] if grey else pixels.transpose(1, 2, 0)).convert("RGB")


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    if isinstance(error, PermissionError):
        return "no permission to read it"
    if isinstance(error, IsADirectoryError):
        return "it is a folder"
    if isinstance(error, UnidentifiedImageError):
        return "it is not an image of a known format"
    if isinstance(error, Image.DecompressionBombError):
        return f"it has more than the {MAX_PIXELS:,} pixels allowed"
    return " ".join(str(error).split()) or type(error).__name__
