"""What the figures of a task are called, in documents and for people. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

CLASSIFY, SEGMENT, DETECT = "classify", "segment", "detect"


@dataclass(frozen=True)
class Figures:
    """Keys and names of what is measured, all in percent.

    Attributes:
        key: of the figure that counts, in documents; ``fp_KEY`` and ``simulator_KEY`` are those of
            the float network and of the simulator.
        label: its name.
        others: keys and names of what else an evaluation yields.
        train_key, train_label: of what is right in the batches of the training.
        by_class: key and name of a figure for each class, a list in the details of `Measured`;
            None without one.
    """

    key: str
    label: str
    others: Mapping[str, str]
    train_key: str
    train_label: str
    by_class: tuple[str, str] | None = None

    @property
    def eval_key(self) -> str:
        """Key of the figure that counts, of an evaluation in the middle of training."""
        return f"val_{self.key}"

    @property
    def train_title(self) -> str:
        """The same, as a title."""
        return self.train_label[0].upper() + self.train_label[1:]


FIGURES = {
    CLASSIFY: Figures(
        "top1", "top-1", {"top5": "top-5"}, "train_top1", "top-1 on training batches"
    ),
    SEGMENT: Figures(
        "miou",
        "mIoU",
        {"pixel_accuracy": "pixel accuracy"},
        "train_pixels",
        "pixels right in training batches",
        ("iou", "IoU"),
    ),
    DETECT: Figures(
        "map",
        "mAP",
        {"map_50": "mAP at an IoU of 0.5", "map_75": "mAP at an IoU of 0.75"},
        "train_anchors",
        "anchors on objects right in training batches",
        ("ap", "AP"),
    ),
}
"""By the name of the task."""


def figures_of(document: Mapping[str, Any] | None) -> Figures:
    """Of the task that a document is about; those that name none are about classification."""
    return FIGURES.get(str((document or {}).get("task", CLASSIFY)), FIGURES[CLASSIFY])
