"""Boxes with a class each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.detection import MeanAveragePrecision
from torchvision.models.detection.ssd import SSD
from torchvision.ops import box_iou

from mecq_cli.data import Split, boxes
from mecq_cli.data.coco import open_evaluation, open_training
from mecq_cli.distributed import Processes
from mecq_cli.errors import DataError, EnvironmentFailure, UsageError
from mecq_cli.models.classes import ClassMap
from mecq_cli.models.detection import BACKGROUND, coco_names
from mecq_cli.models.detector import COORDINATES, Detector
from mecq_cli.tasks.base import ADVICE, Measured, Metric
from mecq_cli.tasks.decoding import LABEL, SCORE, decoded
from mecq_cli.tasks.drawing import BoxDrawing
from mecq_cli.tasks.figures import DETECT, FIGURES


class Detection:
    """Outputs [N, classes + 4, anchors], labels float32 [N, M, 6], see `mecq_cli.data.boxes`.

    Args:
        detector: what makes boxes of the outputs; None while no network is known.
        network: whose loss it is; None where nothing is trained.
    """

    name = DETECT
    figures = FIGURES[DETECT]
    regularized = False
    balance: float | None = None
    drawing = BoxDrawing()
    # Parts that are cut out show objects larger, and the weights have learned with these (network
    # of docs/detection.md, an epoch at W4A4: mAP 62.2 % with them, 51.2 % with whole images).
    norms_of_whole_images = False

    def __init__(self, detector: Detector | None = None, network: nn.Module | None = None) -> None:
        self._detector, self._network = detector, network
        self._anchors: dict[torch.device, Tensor] = {}

    @property
    def detector(self) -> Detector:
        """What makes boxes of the outputs."""
        assert self._detector is not None, "no network is known yet"
        return self._detector

    def open_training(self, data: str, val_split: float | None, seed: int) -> tuple[Split, Split]:
        return open_training(data, val_split, seed)

    def open_evaluation(self, data: str, split: str | None = None) -> Split:
        return open_evaluation(data, split)

    def match_classes(
        self, names: Sequence[str], outputs: int, *, imagenet: bool = False, advice: str = ADVICE
    ) -> ClassMap:
        """As many outputs as names and the background; or COCO's, which are found by their names.

        A RetinaNet may do without the background.

        Raises:
            UsageError: none of these is the case.
        """
        count = len(names)
        if outputs == count + 1:
            return ClassMap((BACKGROUND, *names), tuple(range(1, outputs)))
        if outputs == count and self._detector is not None and not self._detector.background:
            return ClassMap(tuple(names), tuple(range(outputs)))
        known = coco_names()
        unknown = [name for name in names if name not in known]
        if outputs == len(known) and not unknown:
            return ClassMap(known, tuple(map(known.index, names)))
        hint = f" (of which COCO has no {unknown[0]!r})" if outputs == len(known) else ""
        raise UsageError(
            f"the model has {outputs} outputs, the background among them, and the data "
            f"{count} categories{hint}; {advice}"
        )

    def outputs_for(self, names: Sequence[str]) -> int:
        return len(names) + 1

    def same_classes(self, data: ClassMap, model: Sequence[str]) -> bool:
        return data.names == tuple(model)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The network's own: that of the classes and that of the boxes; crowds do not count."""
        network: Any = self._network
        assert network is not None, "an artifact has no loss"
        targets, anchors = _targets(labels), [self._on(logits.device)] * len(labels)
        classes, moves = (part.transpose(1, 2).contiguous() for part in _parts(logits))
        heads = {"cls_logits": classes, "bbox_regression": moves}
        if isinstance(network, SSD):
            found = network.compute_loss(targets, heads, anchors, self._matched(targets, anchors))
        else:
            found = network.compute_loss(targets, heads, anchors)
        return torch.stack(list(found.values())).sum()

    def divergence(self, logits: Tensor, target: Tensor, temperature: float = 1.0) -> Tensor:
        """Of the classes of all anchors, and of the boxes of those that the float network uses.

        The Kullback-Leibler divergence of the classes (each by itself, where they are sigmoids) and
        the smooth L1 distance of the four numbers, weighted by the probability that the float
        network sees something there; the sum, for one such anchor.
        """
        t = temperature
        (mine, moves), (wanted, goal) = _parts(logits), _parts(target)
        if self.detector.kind == "ssd":
            student, teacher = F.log_softmax(mine / t, 1), F.log_softmax(wanted / t, 1)
            far = F.kl_div(student, teacher, reduction="sum", log_target=True)
            there = 1 - torch.softmax(wanted, 1)[:, 0]
        else:
            share = torch.sigmoid(wanted / t)
            far = F.binary_cross_entropy_with_logits(mine / t, share, reduction="sum")
            far = far - F.binary_cross_entropy_with_logits(wanted / t, share, reduction="sum")
            there = torch.sigmoid(wanted).amax(1)
        away = F.smooth_l1_loss(moves, goal, reduction="none").sum(1)
        return (far * t * t + (there * away).sum()) / there.sum().clamp_min(1)

    def answers(self, logits: Tensor) -> Tensor:
        return decoded(logits, self.detector)

    def counts(self, logits: Tensor, labels: Tensor) -> tuple[int, int]:
        """Of the anchors that belong to a box, those whose largest logit is that of its class."""
        targets, anchors = _targets(labels), [self._on(logits.device)] * len(labels)
        said, right, count = _parts(logits)[0].argmax(1), 0, 0
        for own, target, matched in zip(
            said, targets, self._matched(targets, anchors), strict=True
        ):
            (there,) = torch.where(matched >= 0)
            right += int((own[there] == target["labels"][matched[there]]).sum())
            count += len(there)
        return right, count

    def metric(self, outputs: int) -> Metric:
        return _Precision(outputs)

    def some_labels(
        self, images: int, outputs: int, size: tuple[int, int], device: torch.device
    ) -> Tensor:
        """One box in the middle of each image."""
        height, width = size
        row = [outputs - 1, width / 4, height / 4, 3 * width / 4, 3 * height / 4, 0]
        return torch.tensor([[row]] * images, device=device)

    def _on(self, device: torch.device) -> Tensor:
        """The anchors on a device."""
        if device not in self._anchors:
            self._anchors[device] = torch.from_numpy(self.detector.anchors).to(device)
        return self._anchors[device]

    def _matched(self, targets: list[dict[str, Tensor]], anchors: list[Tensor]) -> list[Tensor]:
        """For each image which box each anchor belongs to; below zero where it is none."""
        network: Any = self._network
        return [
            network.proposal_matcher(box_iou(target["boxes"], own))
            if len(target["boxes"])
            else torch.full((len(own),), -1, dtype=torch.int64, device=own.device)
            for target, own in zip(targets, anchors, strict=True)
        ]


def _parts(outputs: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [N, classes, anchors] and what moves the anchors [N, 4, anchors]."""
    return outputs[:, :-COORDINATES], outputs[:, -COORDINATES:]


def _targets(labels: Tensor) -> list[dict[str, Tensor]]:
    """What torchvision's losses take."""
    found = []
    for rows in labels:
        own = rows[(rows[:, boxes.LABEL] >= 0) & (rows[:, boxes.CROWD] == 0)]
        found.append({"boxes": own[:, boxes.BOX], "labels": own[:, boxes.LABEL].long()})
    return found


class _Precision:
    """Mean average precision, as COCO counts it.

    The rows of all answers and of all boxes that are there are kept, since they are ranked
    together.
    """

    def __init__(self, outputs: int) -> None:
        self.outputs = outputs
        self._images = 0
        self._answers: list[Tensor] = []
        self._boxes: list[Tensor] = []
        self._metric = _mean_average_precision()

    def update(self, answers: Tensor, labels: Tensor) -> None:
        for found, there in zip(answers, labels, strict=True):
            own = found[found[:, SCORE] > 0], there[there[:, boxes.LABEL] >= 0]
            for rows, place in zip(own, (self._answers, self._boxes), strict=True):
                image = rows.new_full((len(rows), 1), self._images)
                place.append(torch.cat([image, rows], 1).double())
            self._images += 1

    def gather(self, processes: Processes) -> None:
        """Images of several processes get numbers of their own."""
        apart = processes.largest(self._images) * processes.rank
        for place in (self._answers, self._boxes):
            mine = torch.cat([*place, torch.zeros(0, 7, dtype=torch.float64)])
            mine[:, 0] += apart
            place[:] = [processes.rows(mine)]

    def sums(self) -> list[float]:
        return []

    def measured(self, images: int, sums: Sequence[float]) -> Measured:
        answers, there = torch.cat(self._answers), torch.cat(self._boxes)
        if not bool((there[:, 1 + boxes.CROWD] == 0).any()):
            raise DataError(
                f"there are no boxes in the {images} images to evaluate on, so no precision; add "
                "images with boxes, or hold more out"
            )
        found_in, known_in = _by_image(answers), _by_image(there)
        none = torch.zeros(0, 6, dtype=torch.float64)
        for number in sorted(found_in.keys() | known_in.keys()):
            found, known = found_in.get(number, none), known_in.get(number, none)
            self._metric.update(
                [
                    {
                        "boxes": found[:, :4].float(),
                        "scores": found[:, SCORE].float(),
                        "labels": found[:, LABEL].long(),
                    }
                ],
                [
                    {
                        "boxes": known[:, boxes.BOX].float(),
                        "labels": known[:, boxes.LABEL].long(),
                        "iscrowd": known[:, boxes.CROWD].long(),
                    }
                ],
            )
        counted = self._metric.compute()
        figures = {key: 100 * float(counted[key]) for key in ("map", "map_50", "map_75")}
        by_class: list[float | None] = [None] * self.outputs
        for label, value in zip(
            counted["classes"].reshape(-1), counted["map_per_class"].reshape(-1), strict=True
        ):
            by_class[int(label)] = 100 * float(value) if value >= 0 else None
        return Measured(images, figures, {"ap": by_class})


def _by_image(rows: Tensor) -> dict[int, Tensor]:
    """Rows [K, 1 + 6] by the number of their image, without it, in the order they had."""
    rows = rows[rows[:, 0].argsort(stable=True)]
    numbers, counts = rows[:, 0].unique_consecutive(return_counts=True)
    parts = rows[:, 1:].split(counts.tolist())
    return {int(number): part for number, part in zip(numbers, parts, strict=True)}


IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10).tolist()
RECALL_THRESHOLDS = np.linspace(0, 1, 101).tolist()
"""Those of COCO, in float64. torchmetrics makes them in float32, where a third of them lie a hair
above k/100: a class of which just so much is found loses a point of its curve."""


def _mean_average_precision() -> MeanAveragePrecision:
    try:
        metric = MeanAveragePrecision(
            iou_thresholds=IOU_THRESHOLDS, rec_thresholds=RECALL_THRESHOLDS, class_metrics=True
        )
    except ModuleNotFoundError as error:
        raise EnvironmentFailure(
            "the mean average precision takes pycocotools; install it with: "
            "pip install 'mecq[detection]'"
        ) from error
    # COCO's precision is of the 100 best of each class in an image.
    metric.warn_on_many_detections = False
    return metric
