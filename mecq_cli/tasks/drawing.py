"""Masks and boxes as pictures, in the colours of their classes."""

from __future__ import annotations

import colorsys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

_TURN = 0.618034
"""Of the colour circle, from one class to the next: neighbours are never alike."""
_STRENGTH = 0.55
"""Of a colour over a picture."""
_NO_CLASS = (255, 255, 255)
"""Where a mask holds no class: pixels that are ignored."""
SHOWN = 0.5
"""Probability from which on a box is drawn."""

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


def boxed(
    picture: Image.Image, found: Sequence[Mapping[str, Any]], classes: int, least: float = SHOWN
) -> Image.Image:
    """An RGB picture with boxes on it.

    Args:
        picture: stays as it is.
        found: each with its class, its index, score and box (left, top, right, bottom in pixels of
            the picture), the most probable ones first; without a name nothing is written.
        classes: how many there are.
        least: boxes that are less probable are left out.
    """
    drawn = picture.convert("RGB")
    draw, colours = ImageDraw.Draw(drawn), palette(classes + 1)
    side = min(picture.size)
    width, font = max(1, side // 150), ImageFont.load_default(max(9, side // 30))
    for row in reversed([row for row in found if row["score"] >= least]):
        first = 3 * (row["index"] + 1)  # after the colour of what is nothing
        colour = tuple(colours[first : first + 3])
        left, top, right, bottom = row["box"]
        draw.rectangle((left, top, max(left, right - 1), max(top, bottom - 1)), None, colour, width)
        if not row["class"]:
            continue
        text = f"{row['class']} {100 * row['score']:.0f}"
        extent = draw.textbbox((0, 0), text, font)
        right, bottom = extent[2] + 3, extent[3] + 2
        place = (max(0, min(left, drawn.width - right - 1)), max(0, top - bottom))
        draw.rectangle((*place, place[0] + right, place[1] + bottom), colour)
        draw.text((place[0] + 2, place[1]), text, "black", font)
    return drawn


class BoxDrawing:
    """The boxes of labels and answers, of the columns that `mecq_cli.data.boxes` and
    `mecq_cli.tasks.decoding` have; see `mecq_cli.tasks.base.Drawing`."""

    def colours(self, classes: int) -> list[str | None]:
        rows = np.reshape(palette(classes + 1), (-1, 3)).tolist()
        return [f"rgb({r} {g} {b})" for r, g, b in rows[1:]]

    def labels(self, picture: Image.Image, labels: Tensor, classes: int) -> Image.Image:
        rows = [(box, 1.0, label) for label, *box, _ in labels.tolist() if label >= 0]
        return boxed(picture, _nameless(rows), classes)

    def answers(self, picture: Image.Image, answers: Tensor, classes: int) -> Image.Image:
        rows = [(box, score, label) for *box, score, label in answers.tolist()]
        return boxed(picture, _nameless(rows), classes)


def _nameless(rows: Sequence[tuple[list[float], float, float]]) -> list[dict[str, Any]]:
    return [
        {"class": "", "index": int(label), "score": score, "box": box} for box, score, label in rows
    ]
