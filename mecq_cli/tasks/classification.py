"""One class an image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mecq_cli.data import Split, open_evaluation, open_training
from mecq_cli.data.coco import require_no_boxes
from mecq_cli.data.pairs import require_no_masks
from mecq_cli.distributed import Processes
from mecq_cli.models.classes import ClassMap, match_classes
from mecq_cli.tasks.base import ADVICE, Measured, Metric
from mecq_cli.tasks.divergence import divergence
from mecq_cli.tasks.figures import CLASSIFY, FIGURES


class Classification:
    """Logits [N, classes], labels [N]."""

    name = CLASSIFY
    figures = FIGURES[CLASSIFY]
    regularized = True
    balance: float | None = None
    norms_of_whole_images = True
    drawing = None

    def open_training(self, data: str, val_split: float | None, seed: int) -> tuple[Split, Split]:
        require_no_masks(data)
        require_no_boxes(data)
        return open_training(data, val_split, seed)

    def open_evaluation(self, data: str, split: str | None = None) -> Split:
        require_no_masks(data)
        require_no_boxes(data)
        return open_evaluation(data, split)

    def match_classes(
        self, names: Sequence[str], outputs: int, *, imagenet: bool = False, advice: str = ADVICE
    ) -> ClassMap:
        return match_classes(names, outputs, imagenet=imagenet, advice=advice)

    def outputs_for(self, names: Sequence[str]) -> int:
        return len(names)

    def same_classes(self, data: ClassMap, model: Sequence[str]) -> bool:
        return data.names == tuple(model)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels)

    def divergence(self, logits: Tensor, target: Tensor, temperature: float = 1.0) -> Tensor:
        return divergence(logits, target, temperature)

    def answers(self, logits: Tensor) -> Tensor:
        return logits

    def counts(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, int]:
        return (logits.argmax(1) == labels).sum(), len(labels)

    def metric(self, outputs: int) -> Metric:
        return _TopK()

    def some_labels(
        self, images: int, outputs: int, size: tuple[int, int], device: torch.device
    ) -> Tensor:
        return torch.arange(images, device=device) % outputs


class _TopK:
    """Top-1 and top-5."""

    def __init__(self) -> None:
        self.top1 = self.top5 = 0

    def update(self, answers: Tensor, labels: Tensor) -> None:
        ranked = answers.topk(min(5, answers.shape[1]), 1).indices
        hits = ranked == labels[:, None]
        self.top1 += int(hits[:, 0].sum())
        self.top5 += int(hits.any(1).sum())

    def gather(self, processes: Processes) -> None:
        """Nothing: all of it is sums."""

    def sums(self) -> list[float]:
        return [self.top1, self.top5]

    def measured(self, images: int, sums: Sequence[float]) -> Measured:
        top1, top5 = (int(total) for total in sums)
        return Measured(images, {"top1": 100.0 * top1 / images, "top5": 100.0 * top5 / images})
