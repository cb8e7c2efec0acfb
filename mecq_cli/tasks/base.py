"""The contract of a task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from PIL.Image import Image
from torch import Tensor

from mecq_cli.data import Split
from mecq_cli.distributed import Processes
from mecq_cli.models.classes import ClassMap
from mecq_cli.tasks.figures import Figures

ADVICE = (
    "use data of the model's classes, or give --reset-classifier to train a new last layer for "
    "these"
)


@dataclass(frozen=True)
class Measured:
    """What an evaluation yields.

    Attributes:
        images: how many were seen.
        figures: by the keys of the task's `Figures`, in percent.
        details: what else there is to tell, for documents.
    """

    images: int
    figures: dict[str, float]
    details: dict[str, Any] = field(default_factory=dict)


class Metric(Protocol):
    """Counts, on one process; the sums of all processes give the figures."""

    def update(self, answers: Tensor, labels: Tensor) -> None:
        """Take a batch: float32 answers and labels of the data set, both on the CPU."""

    def gather(self, processes: Processes) -> None:
        """Bring together, in every process, what is no sum."""

    def sums(self) -> list[float]:
        """What was counted so far; as many numbers in every process."""

    def measured(self, images: int, sums: Sequence[float]) -> Measured:
        """The figures of ``images`` images whose sums are these."""


class Drawing(Protocol):
    """How answers look over the picture that they are about.

    Pictures are RGB, of the size that the network takes; ``classes`` is their number.
    """

    def colours(self, classes: int) -> list[str | None]:
        """In CSS, the colour of each class; None for one that is not drawn."""

    def labels(self, picture: Image, labels: Tensor, classes: int) -> Image:
        """What is true of one image: its part of the labels of a batch."""

    def answers(self, picture: Image, answers: Tensor, classes: int) -> Image:
        """What a network says of one image: its part of what the metric takes of a batch."""


class Task(Protocol):
    """What a model is for.

    Attributes:
        name: as ``--task`` takes it.
        figures: what its figures are called.
        regularized: whether the entropy regularizer is on where no weight is given: its default
            weight was found for this task, or is balanced.
        balance: the weight is chosen for the network, so that the gradient of the regularizer is
            so many times that of the task, at most the default; None: it is the default.
        norms_of_whole_images: whether batch norm counts what it sees of whole images, or of those
            that are trained on.
    """

    name: str
    figures: Figures
    regularized: bool
    balance: float | None
    norms_of_whole_images: bool

    @property
    def drawing(self) -> Drawing | None:
        """Of answers over pictures; None where an answer is the name of a class."""

    def open_training(self, data: str, val_split: float | None, seed: int) -> tuple[Split, Split]:
        """Images to train on and to evaluate on; see `mecq_cli.data.open_training`."""

    def open_evaluation(self, data: str, split: str | None = None) -> Split:
        """Images to evaluate on; see `mecq_cli.data.open_evaluation`."""

    def match_classes(
        self, names: Sequence[str], outputs: int, *, imagenet: bool = False, advice: str = ADVICE
    ) -> ClassMap:
        """Which output of a model belongs to which class of the data; UsageError if none does."""

    def outputs_for(self, names: Sequence[str]) -> int:
        """How many outputs a new model needs for classes of such names."""

    def same_classes(self, data: ClassMap, model: Sequence[str]) -> bool:
        """Whether the classes of the data are those a quantized model was made for."""

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss of a batch; a float32 scalar."""

    def divergence(self, logits: Tensor, target: Tensor, temperature: float = 1.0) -> Tensor:
        """How far outputs are from those of the float network; a float32 scalar."""

    def answers(self, logits: Tensor) -> Tensor:
        """What the metric takes of a batch: the logits themselves, or what is made of them."""

    def counts(self, logits: Tensor, labels: Tensor) -> tuple[Tensor | int, Tensor | int]:
        """How many answers of a batch are right, and how many there are.

        As tensors of one number where they are made on the device, which then need not be waited
        for.
        """

    def metric(self, outputs: int) -> Metric:
        """A new metric for a model of so many outputs.

        Raises:
            EnvironmentFailure: a library that it takes is missing.
        """

    def some_labels(
        self, images: int, outputs: int, size: tuple[int, int], device: torch.device
    ) -> Tensor:
        """Labels for ``images`` images of a size (H, W), to measure a step with."""
