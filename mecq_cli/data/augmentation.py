"""From a decoded image to the uint8 pixels a model is fed with, in evaluation and in training.

What is random about a sample is drawn from one 64-bit word of its own, so that neither the order
of the samples nor the number of processes changes it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from PIL import Image
from timm.data.transforms_factory import create_transform
from torchvision.transforms import InterpolationMode, v2

from mecq_cli.data.images import in_channels, pixels_of
from mecq_cli.errors import UsageError
from mecq_cli.models.preprocessing import Preprocessing

SMALL = 64
"""Inputs up to this side are shifted and flipped; larger ones are cropped and resized."""
PADDING = 4
"""How far `pad_crop_flip` shifts, in pixels (He et al. 2016, section 4.2)."""
SCALE = (0.35, 1.0)
"""Share of the area `random_resized_crop` keeps; short fine-tuning takes less than 0.08 to 1."""
RATIO = (3 / 4, 4 / 3)
"""Of its width to its height, in parts of what is not stretched."""

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
CROP_MODES = ("center", "squash", "border")

Pixels = NDArray[np.uint8]


def check_preprocessing(preprocessing: Preprocessing) -> None:
    """Raise UsageError for what no transform here can do."""
    p = preprocessing
    rules: tuple[tuple[bool, str, object, str], ...] = (
        (p.input_size[0] in (1, 3), "input channels", p.input_size[0], "3 (RGB) or 1 (grey)"),
        (min(p.input_size) > 0, "input size", p.input_size[1:], "at least 1 x 1"),
        (0 < p.crop_pct <= 1, "crop_pct", p.crop_pct, "above 0, up to 1"),
        (p.interpolation in INTERPOLATIONS, "interpolation", p.interpolation, _one(INTERPOLATIONS)),
        (p.crop_mode in CROP_MODES, "crop_mode", p.crop_mode, _one(CROP_MODES)),
    )
    for holds, name, got, allowed in rules:
        if not holds:
            raise UsageError(f"preprocessing: {name} is {got!r}; allowed: {allowed}")


def eval_transform(preprocessing: Preprocessing) -> Callable[[Image.Image], Pixels]:
    """The evaluation transform of timm, less its normalization: RGB image to uint8 [C, H, W].

    For a network of one channel the image is made grey first. The short side becomes
    floor(size / crop_pct), then the centre is cut out (crop_mode "center"; "squash" and "border"
    as timm has them). An image that has that size already is not resampled.
    """
    check_preprocessing(preprocessing)
    transform = create_transform(
        preprocessing.input_size,
        is_training=False,
        interpolation=preprocessing.interpolation,
        mean=preprocessing.mean,  # the colour of the border in crop_mode "border"
        std=preprocessing.std,
        crop_pct=preprocessing.crop_pct,
        crop_mode=preprocessing.crop_mode,
        use_prefetcher=True,  # timm's name for "leave the pixels uint8"
    )
    height, width = preprocessing.input_size[1:]
    ready = (width, height) if preprocessing.crop_pct == 1 else None

    def apply(image: Image.Image) -> Pixels:
        image = in_channels(image, preprocessing.input_size[0])
        if image.size == ready:  # timm would do nothing, in twice the time
            return pixels_of(image)
        return np.asarray(transform(image))

    return apply


def random_resized_crop(preprocessing: Preprocessing) -> Callable[[Image.Image, int], Pixels]:
    """Random part of the image, resized, flipped half of the time (Szegedy et al. 2015).

    The function made takes an RGB image and the word that decides, and gives uint8 [3, H, W].
    """
    check_preprocessing(preprocessing)
    crop_of = random_crops(preprocessing)
    grey = [v2.Grayscale()] if preprocessing.input_size[0] == 1 else []
    others = (v2.RandomHorizontalFlip(), v2.PILToTensor())

    def apply(image: Image.Image, word: int) -> Pixels:
        # torchvision draws from torch's global generator: borrow it, and give it back as it was.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(word)
            return np.asarray(v2.Compose([*grey, crop_of(*image.size), *others])(image))

    return apply


def random_crops(preprocessing: Preprocessing) -> Callable[[int, int], v2.RandomResizedCrop]:
    """What cuts a random part out of an image of so many pixels (width, height).

    Its shape varies around the one that is not stretched otherwise than in evaluation: that of the
    input, or of the whole image where `crop_mode` is "squash".
    """
    height, width = preprocessing.input_size[1:]

    @lru_cache(maxsize=64)
    def crop(shape: float) -> v2.RandomResizedCrop:
        return v2.RandomResizedCrop(
            (height, width),
            scale=SCALE,
            ratio=(RATIO[0] * shape, RATIO[1] * shape),
            interpolation=InterpolationMode(preprocessing.interpolation),
        )

    def crop_of(image_width: int, image_height: int) -> v2.RandomResizedCrop:
        squashed = preprocessing.crop_mode == "squash"
        return crop(image_width / image_height if squashed else width / height)

    return crop_of


def pad_crop_flip(images: Pixels, words: NDArray[np.uint64], padding: int = PADDING) -> Pixels:
    """Pad with black, cut the old size out at random, flip half of the images left to right.

    Args:
        images: uint8 [N, 3, H, W].
        words: uint64 [N], one for each image; decides its shift and flip.
        padding: pixels on each side.

    Returns:
        uint8 [N, 3, H, W].
    """
    size = images.shape[-2:]
    padded = np.pad(images, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    windows = sliding_window_view(padded, size, axis=(2, 3))
    places = np.uint64(2 * padding + 1)
    # The shifts and the flip come from bits of their own.
    down = (words & np.uint64(0xFFFFFF)) % places
    right = ((words >> np.uint64(24)) & np.uint64(0xFFFFFF)) % places
    flip = (words >> np.uint64(63)).astype(bool)
    shifted = windows[np.arange(len(images)), :, down.astype(np.intp), right.astype(np.intp)]
    return np.where(flip[:, None, None, None], shifted[..., ::-1], shifted)


def _one(names: tuple[str, ...]) -> str:
    return ", ".join(names)
