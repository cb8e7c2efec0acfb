"""One class a pixel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.classification import MulticlassJaccardIndex

from mecq_cli.data import Split
from mecq_cli.data.coco import require_no_boxes
from mecq_cli.data.masks import IGNORED
from mecq_cli.data.pairs import is_numbered, open_evaluation, open_training
from mecq_cli.distributed import Processes
from mecq_cli.errors import DataError, UsageError
from mecq_cli.models.classes import ClassMap
from mecq_cli.tasks.base import ADVICE, Measured, Metric
from mecq_cli.tasks.divergence import divergence
from mecq_cli.tasks.drawing import MaskDrawing
from mecq_cli.tasks.figures import FIGURES, SEGMENT

BALANCE = 2.0
"""Found on two networks (docs/segmentation.md)."""


class Segmentation:
    """Logits [N, classes, H, W], labels uint8 [N, H, W] with 255 where a pixel is ignored."""

    name = SEGMENT
    figures = FIGURES[SEGMENT]
    regularized = True
    balance: float | None = BALANCE
    norms_of_whole_images = True
    drawing = MaskDrawing()

    def open_training(self, data: str, val_split: float | None, seed: int) -> tuple[Split, Split]:
        require_no_boxes(data)
        return open_training(data, val_split, seed)

    def open_evaluation(self, data: str, split: str | None = None) -> Split:
        require_no_boxes(data)
        return open_evaluation(data, split)

    def match_classes(
        self, names: Sequence[str], outputs: int, *, imagenet: bool = False, advice: str = ADVICE
    ) -> ClassMap:
        """As many names as outputs; classes without names may be fewer, since some may not occur.

        Raises:
            UsageError: neither is the case.
        """
        numbered = is_numbered(names)
        if len(names) == outputs or (numbered and len(names) < outputs):
            shown = map(str, range(outputs)) if numbered else names
            return ClassMap(tuple(shown), tuple(range(len(names))))
        found = f"classes up to {len(names) - 1}" if numbered else f"{len(names)} classes"
        raise UsageError(f"the model has {outputs} outputs and the masks have {found}; {advice}")

    def outputs_for(self, names: Sequence[str]) -> int:
        return len(names)

    def same_classes(self, data: ClassMap, model: Sequence[str]) -> bool:
        return data.names == tuple(model) or is_numbered(data.names) or is_numbered(model)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean over the pixels that count; zero where a batch has none."""
        labels = labels.long()
        total = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
        return total / (labels != IGNORED).sum().clamp_min(1)

    def divergence(self, logits: Tensor, target: Tensor, temperature: float = 1.0) -> Tensor:
        return divergence(logits, target, temperature)

    def answers(self, logits: Tensor) -> Tensor:
        return logits

    def counts(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        right = (logits.argmax(1) == labels) & (labels != IGNORED)
        return right.sum(), (labels != IGNORED).sum()

    def metric(self, outputs: int) -> Metric:
        return _Overlap(outputs)

    def some_labels(
        self, images: int, outputs: int, size: tuple[int, int], device: torch.device
    ) -> Tensor:
        return (torch.arange(images * size[0] * size[1], device=device) % outputs).reshape(
            images, *size
        )


class _Overlap:
    """Intersection over union of each class, over the pixels of all images together.

    The mean is over the classes that are there: in a mask, or in an answer.
    """

    def __init__(self, outputs: int) -> None:
        self.outputs = outputs
        self._counts = self._metric("macro")

    def _metric(self, average: str) -> MulticlassJaccardIndex:
        return MulticlassJaccardIndex(
            self.outputs,
            average=average,  # type: ignore[arg-type]
            ignore_index=IGNORED,
            validate_args=False,
        )

    def update(self, answers: Tensor, labels: Tensor) -> None:
        self._counts.update(answers.argmax(1), labels.long())

    def gather(self, processes: Processes) -> None:
        """Nothing: all of it is sums."""

    def sums(self) -> list[float]:
        counts: list[float] = self._counts.confmat.flatten().double().tolist()
        return counts

    def measured(self, images: int, sums: Sequence[float]) -> Measured:
        table = torch.tensor(sums, dtype=torch.float64).reshape(self.outputs, self.outputs)
        if not table.sum():
            raise DataError(
                f"every pixel of the {images} masks is ignored (255); a mask holds the index of a "
                "class in each pixel that counts"
            )
        found = {average: self._of(table, average) for average in ("macro", "none")}
        seen = (table.sum(0) + table.sum(1)) > 0
        by_class = [
            float(100 * value) if there else None
            for value, there in zip(found["none"], seen, strict=True)
        ]
        figures = {
            "miou": float(100 * found["macro"]),
            "pixel_accuracy": float(100 * table.trace() / table.sum()),
        }
        return Measured(images, figures, {"iou": by_class})

    def _of(self, table: Tensor, average: str) -> Tensor:
        metric = self._metric(average).double()
        metric.update(torch.zeros(1, dtype=torch.long), torch.full((1,), IGNORED))
        metric.confmat = table
        value: Tensor = metric.compute()
        return value
