"""Pictures that anybody can draw: coloured shapes on textured ground, with masks or boxes.

    python -m tests.scenes FOLDER            400 pictures to train on and 100 to evaluate on
    python -m tests.scenes FOLDER --boxes    the same with boxes, in the layout of COCO

Every picture depends on its split and number alone. Discs, boxes and triangles have colours of
their own, which overlap: neither colour nor outline alone tells them apart.
"""

from __future__ import annotations

import colorsys
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

CLASSES = ("ground", "disc", "box", "triangle")
PALETTE = (*(0, 0, 0, 214, 90, 60, 60, 130, 214, 90, 180, 80), *(255,) * 756)
"""All of it: with fewer colours Pillow writes fewer bits a pixel, and 255 would become 3."""
IGNORED = 255
_HUES = (0.0, 0.02, 0.60, 0.33)
_STREAMS = {"train": 0, "val": 1}
_LEAST_SEEN = 40
"""Pixels that must be seen of a shape that is to be found."""
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


def write_boxes(folder: Path, splits: dict[str, int], size: int = 96) -> Path:
    """DATA/{train,val} and DATA/annotations/instances_{train,val}.json, of the same pictures.

    A box is around what can be seen of a shape; one that is all but covered has none.
    """
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    for split, count in splits.items():
        (folder / split).mkdir(exist_ok=True)
        images: list[dict[str, object]] = []
        annotations: list[dict[str, object]] = []
        for number in range(count):
            name = f"{number:04d}.png"
            picture, seen = drawn(_STREAMS[split], number, size)
            picture.save(folder / split / name)
            images.append({"id": number, "file_name": name, "width": size, "height": size})
            for label, shape in seen:
                rows, columns = (np.flatnonzero(shape.any(axis)) for axis in (1, 0))
                if shape.sum() < _LEAST_SEEN:
                    continue
                left, top = int(columns[0]), int(rows[0])
                box = [left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top]
                annotations.append(
                    {"id": len(annotations), "image_id": number, "category_id": label, "bbox": box}
                )
        document = {
            "images": images,
            "categories": [{"id": i, "name": CLASSES[i]} for i in range(1, len(CLASSES))],
            "annotations": annotations,
        }
        file = folder / "annotations" / f"instances_{split}.json"
        file.write_text(json.dumps(document))
    return folder


def drawn(
    stream: int, number: int, size: int = 96
) -> tuple[Image.Image, list[tuple[int, np.ndarray]]]:
    """A picture, and for each of its shapes the class and what can be seen of it, bool [H, W]."""
    mask, seen = np.zeros((size, size), np.int64), []
    picture = _drawn(stream, number, size, lambda label, shape, _: seen.append((label, shape)))
    for place, (_, shape) in enumerate(seen, 1):
        mask[shape] = place
    return picture, [(label, mask == place) for place, (label, _) in enumerate(seen, 1)]


def scene(stream: int, number: int, size: int = 96) -> tuple[Image.Image, Image.Image]:
    """A picture (RGB) and its mask (palette; indices of `CLASSES`, 255 where two shapes meet)."""
    mask = Image.new("P", (size, size), 0)
    mask.putpalette(PALETTE)
    draw = ImageDraw.Draw(mask)

    def add(label: int, shape: np.ndarray, outline: list[Point]) -> None:
        draw.polygon(outline, fill=label)
        draw.line([*outline, outline[0]], fill=IGNORED)

    return _drawn(stream, number, size, add), mask


def _drawn(
    stream: int, number: int, size: int, seen: Callable[[int, np.ndarray, list[Point]], object]
) -> Image.Image:
    """A picture; ``seen`` hears of each shape: its class, its pixels, its outline."""
    rng = np.random.default_rng([stream, number, size])
    picture = Image.fromarray(_ground(rng, size))
    for _ in range(rng.integers(2, 5)):
        label = int(rng.integers(1, len(CLASSES)))
        outline = _outline(rng, label, size)
        layer = Image.new("L", (size, size), 0)
        ImageDraw.Draw(layer).polygon(outline, fill=255)
        picture.paste(_surface(rng, label, size), mask=layer)
        seen(label, np.asarray(layer) > 0, outline)
    noise = rng.normal(0, 10, (size, size, 3))
    pixels = np.clip(np.asarray(picture, np.float64) + noise, 0, 255).astype(np.uint8)
    return Image.fromarray(pixels)


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
    write = write_boxes if "--boxes" in sys.argv else write_scenes
    write(Path(sys.argv[1]), {"train": 400, "val": 100})
