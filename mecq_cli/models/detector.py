"""What makes boxes of the outputs of a network that detects: anchors, their coding, thresholds.

A network puts out, for each of its A anchors, a logit for each of C classes and four numbers that
move the anchor: [N, C + 4, A], the logits first. All else is said here, as numbers that an artifact
and an ONNX file carry along.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mecq_cli.errors import ArtifactError

KEY = "detector"
"""Of its description in the metadata of an artifact."""
COORDINATES = 4
"""Numbers that move an anchor: two for its centre, two for its width and height."""

MOST_ANCHORS = 2**24
"""Of an image."""

Kind = Literal["retinanet", "ssd"]
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Level:
    """The anchors of one feature map: the same boxes at each of its places.

    Attributes:
        grid: rows and columns of the map.
        stride: how far its places are apart, down and to the right, in pixels.
        boxes: left, top, right, bottom of the anchors at the first place, in pixels.
    """

    grid: tuple[int, int]
    stride: tuple[float, float]
    boxes: tuple[Box, ...]

    @property
    def count(self) -> int:
        """How many anchors these are."""
        return self.grid[0] * self.grid[1] * len(self.boxes)

    def anchors(self) -> NDArray[np.float64]:
        """[count, 4]: by row, by column, by box."""
        rows, columns = (
            np.arange(count) * step for count, step in zip(self.grid, self.stride, strict=True)
        )
        y, x = np.meshgrid(rows, columns, indexing="ij")
        moved: NDArray[np.float64] = np.stack([x, y, x, y], -1)[:, :, None] + np.array(self.boxes)
        return moved.reshape(-1, COORDINATES)


@dataclass(frozen=True)
class Detector:
    """How outputs [N, C + 4, A] become boxes.

    Attributes:
        kind: "retinanet": a sigmoid of each logit, of which the ``candidates`` largest of each
            level go on; "ssd": a softmax over the classes, of which the first is the background,
            and the largest of each class go on.
        size: height and width of the images.
        levels: the feature maps, in the order of the anchors.
        weights: by which the four numbers are divided.
        largest_growth: logarithm of how much wider or higher than its anchor a box may be.
        score_threshold: only what is more probable is an answer.
        iou_threshold: of two boxes of a class that overlap more, the less probable one is dropped.
        candidates: see ``kind``.
        detections: boxes an image may have at most.
    """

    kind: Kind
    size: tuple[int, int]
    levels: tuple[Level, ...]
    weights: Box
    largest_growth: float
    score_threshold: float
    iou_threshold: float
    candidates: int
    detections: int

    def __post_init__(self) -> None:
        shares = (self.score_threshold, self.iou_threshold)
        sizes = (*self.size, *(n for level in self.levels for n in level.grid))
        places = sum(level.grid[0] * level.grid[1] * len(level.boxes) for level in self.levels)
        numbers = (*self.weights, *(n for level in self.levels for b in level.boxes for n in b))
        good = (
            self.kind in ("retinanet", "ssd")
            and all(0 <= share <= 1 for share in shares)
            and type(self.candidates) is type(self.detections) is int
            and places <= MOST_ANCHORS
            and min(*sizes, self.candidates, self.detections) > 0
            and all(map(math.isfinite, (*numbers, self.largest_growth)))
            and all(weight > 0 for weight in self.weights)
            and all(len(box) == COORDINATES for level in self.levels for box in level.boxes)
        )
        if not good or not self.levels:
            raise ValueError("no detector has such numbers")

    @cached_property
    def anchors(self) -> NDArray[np.float32]:
        """Left, top, right, bottom of all anchors in pixels, float32 [A, 4]."""
        return np.concatenate([level.anchors() for level in self.levels]).astype(np.float32)

    @property
    def background(self) -> int:
        """How many of the classes mean that nothing is there, and are no answer."""
        return int(self.kind == "ssd")

    def to_json(self) -> dict[str, Any]:
        """As plain JSON types."""
        document: dict[str, Any] = json.loads(json.dumps(asdict(self)))  # lists for tuples
        return document

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> Detector:
        """The inverse of `to_json`.

        Raises:
            KeyError, TypeError, ValueError: it is something else.
        """
        levels = tuple(
            Level(
                _integers(level["grid"], 2),
                (float(level["stride"][0]), float(level["stride"][1])),
                tuple(_box(box) for box in level["boxes"]),
            )
            for level in document["levels"]
        )
        rest = {
            "size": _integers(document["size"], 2),
            "levels": levels,
            "weights": _box(document["weights"]),
        }
        return cls(**{**document, **rest})


def detector_in(metadata: Mapping[str, Any]) -> Detector | None:
    """What an artifact or ONNX file says of its detector; None where it does not detect.

    Raises:
        ArtifactError: it says something impossible.
    """
    document = metadata.get(KEY)
    if document is None:
        return None
    try:
        return Detector.from_json(dict(document))
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise ArtifactError(
            f"what the file says of its {KEY} makes no boxes ({type(error).__name__}: {error}); "
            "export it again"
        ) from error


def _integers(values: Any, count: int) -> Any:
    if len(values) != count or not all(isinstance(value, int) for value in values):
        raise ValueError(f"{count} whole numbers are wanted, not {values}")
    return tuple(values)


def _box(values: Any) -> Box:
    left, top, right, bottom = (float(value) for value in values)
    return left, top, right, bottom
