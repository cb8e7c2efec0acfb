"""Masks as pictures."""

from __future__ import annotations

import colorsys

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_TURN = 0.618034
"""Of the colour circle, from one class to the next: neighbours are never alike."""
_STRENGTH = 0.55

Mask = NDArray[np.uint8]


def palette(classes: int) -> list[int]:
    """Red, green and blue of each class; the first one, most often the ground, is black."""
    colours = [0, 0, 0]
    for number in range(1, classes):
        bright = 0.95 if number % 2 else 0.75
        rgb = colorsys.hsv_to_rgb((number - 1) * _TURN % 1.0, 0.75, bright)
        colours += [round(255 * value) for value in rgb]
    return colours


def as_image(mask: Mask, classes: int) -> Image.Image:
    """A palette picture that holds the indices of a mask [H, W]."""
    image = Image.frombytes("P", mask.shape[::-1], np.ascontiguousarray(mask).tobytes())
    image.putpalette(palette(classes))
    return image


def over(picture: Image.Image, mask: Mask, classes: int) -> Image.Image:
    """An RGB picture with the mask [H, W] of its size over it; the first class is left bare."""
    colours = np.array(palette(classes), np.float64).reshape(-1, 3)[mask]
    pixels = np.asarray(picture, np.float64)
    share = _STRENGTH * (mask > 0)[..., None]
    mixed = pixels * (1 - share) + colours * share
    return Image.fromarray(np.rint(mixed).astype(np.uint8))
