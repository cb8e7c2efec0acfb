"""Masks as pictures, in the colours of their classes."""

from __future__ import annotations

import colorsys

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

_TURN = 0.618034
"""Of the colour circle, from one class to the next: neighbours are never alike."""
_STRENGTH = 0.55
"""Of a colour over a picture."""
_NO_CLASS = (255, 255, 255)
"""Where a mask holds no class: pixels that are ignored."""

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
    colours = np.full((256, 3), _NO_CLASS, np.float64)
    colours[:classes] = np.reshape(palette(classes), (-1, 3))
    pixels = np.asarray(picture, np.float64)
    share = _STRENGTH * (mask > 0)[..., None]
    mixed = pixels * (1 - share) + colours[mask] * share
    return Image.fromarray(np.rint(mixed).astype(np.uint8))


class MaskDrawing:
    """The masks of labels and of logits [classes, H, W]; see `mecq_cli.tasks.base.Drawing`."""

    def colours(self, classes: int) -> list[str | None]:
        rows = np.reshape(palette(classes), (-1, 3)).tolist()
        return [None, *(f"rgb({r} {g} {b})" for r, g, b in rows[1:])]

    def labels(self, picture: Image.Image, labels: Tensor, classes: int) -> Image.Image:
        return over(picture, labels.numpy(), classes)

    def answers(self, picture: Image.Image, answers: Tensor, classes: int) -> Image.Image:
        return over(picture, answers.argmax(0).to(torch.uint8).numpy(), classes)
