"""Pictures to segment that anybody can draw: coloured shapes on textured ground, and their masks.

    python -m tests.scenes FOLDER            400 pictures to train on and 100 to evaluate on

Every picture depends on its split and number alone. Discs, boxes and triangles have colours of
their own, which overlap: neither colour nor outline alone tells them apart.
"""

from __future__ import annotations

import colorsys
import math
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

CLASSES = ("ground", "disc", "box", "triangle")
PALETTE = (*(0, 0, 0, 214, 90, 60, 60, 130, 214, 90, 180, 80), *(255,) * 756)
"""All of it: with fewer colours Pillow writes fewer bits a pixel, and 255 would become 3."""
IGNORED = 255
_HUES = (0.0, 0.02, 0.60, 0.33)
_STREAMS = {"train": 0, "val": 1}
Point = tuple[float, float]


def write_scenes(folder: Path, splits: dict[str, int], size: int = 96) -> Path:
    """DATA/{train,val}/{images,masks} and classes.txt; a border of each shape is ignored."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    for split, count in splits.items():
        for kind in ("images", "masks"):
            (folder / split / kind).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            picture, mask = scene(_STREAMS[split], number, size)
            picture.save(folder / split / "images" / f"{number:04d}.png")
            mask.save(folder / split / "masks" / f"{number:04d}.png")
    return folder


def scene(stream: int, number: int, size: int = 96) -> tuple[Image.Image, Image.Image]:
    """A picture (RGB) and its mask (palette; indices of `CLASSES`, 255 where two shapes meet)."""
    rng = np.random.default_rng([stream, number, size])
    picture = Image.fromarray(_ground(rng, size))
    mask = Image.new("P", (size, size), 0)
    mask.putpalette(PALETTE)
    for _ in range(rng.integers(2, 5)):
        label = int(rng.integers(1, len(CLASSES)))
        outline = _outline(rng, label, size)
        layer = Image.new("L", (size, size), 0)
        ImageDraw.Draw(layer).polygon(outline, fill=255)
        picture.paste(_surface(rng, label, size), mask=layer)
        draw = ImageDraw.Draw(mask)
        draw.polygon(outline, fill=label)
        draw.line([*outline, outline[0]], fill=IGNORED)
    noise = rng.normal(0, 10, (size, size, 3))
    pixels = np.clip(np.asarray(picture, np.float64) + noise, 0, 255).astype(np.uint8)
    return Image.fromarray(pixels), mask


def _outline(rng: np.random.Generator, label: int, size: int) -> list[Point]:
    """A polygon of a random place, size and direction."""
    x, y = rng.uniform(0.15, 0.85, 2) * size
    radius, turn = rng.uniform(0.12, 0.26) * size, rng.uniform(0, 2 * math.pi)
    corners = {1: 40, 2: 4, 3: 3}[label]
    angles = turn + np.arange(corners) * 2 * math.pi / corners
    return [(x + radius * math.cos(a), y + radius * math.sin(a)) for a in angles]


def _ground(rng: np.random.Generator, size: int) -> np.ndarray:
    """Waves of two directions in dull colours."""
    rows, columns = np.mgrid[0:size, 0:size] / size
    waves = np.zeros((size, size))
    for _ in range(3):
        fx, fy, phase = rng.uniform(-12, 12), rng.uniform(-12, 12), rng.uniform(0, 6)
        waves += np.sin(2 * math.pi * (fx * columns + fy * rows) + phase)
    colour = np.array(colorsys.hsv_to_rgb(rng.uniform(0, 1), 0.25, rng.uniform(0.35, 0.8)))
    return np.clip(255 * colour + 22 * waves[..., None], 0, 255).astype(np.uint8)


def _surface(rng: np.random.Generator, label: int, size: int) -> Image.Image:
    """A colour near that of the class, lighter to one side."""
    hue = (_HUES[label] + rng.normal(0, 0.07)) % 1.0
    colour = np.array(colorsys.hsv_to_rgb(hue, rng.uniform(0.45, 0.9), rng.uniform(0.5, 0.95)))
    slope = np.linspace(0.8, 1.15, size)[:, None, None]
    pixels = np.broadcast_to(255 * colour * slope, (size, size, 3))
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


if __name__ == "__main__":
    write_scenes(Path(sys.argv[1]), {"train": 400, "val": 100})
