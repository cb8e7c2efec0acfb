"""From the outputs of a network that detects to boxes, as torchvision makes them.

`mecq_cli.export.onnx_detection` writes the same as ONNX operators. Where scores are equal, the one
that comes first goes first, as in onnxruntime; torchvision leaves that open.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import boxes as box_ops

from mecq_cli.models.detector import COORDINATES, Detector

SCORE, LABEL = 4, 5
"""Columns of an answer behind left, top, right, bottom."""
COLUMNS = 6


@torch.no_grad()
def decoded(outputs: Tensor, detector: Detector) -> Tensor:
    """The boxes of each image, the most probable ones first.

    Args:
        outputs: float32 [N, C + 4, A].
        detector: of the network.

    Returns:
        float32 [N, D, 6]: left, top, right, bottom in pixels of the input, probability, class. Rows
        that are left over have the probability 0. D is ``detector.detections``.
    """
    found = outputs.new_zeros(len(outputs), detector.detections, COLUMNS)
    anchors = torch.from_numpy(detector.anchors).to(outputs.device)
    for image, place in zip(outputs, found, strict=True):
        own = _of_one(image, anchors, detector)
        place[: len(own)] = own
    return found


def _of_one(outputs: Tensor, anchors: Tensor, detector: Detector) -> Tensor:
    """Of [C + 4, A]."""
    logits, moves = outputs[:-COORDINATES], outputs[-COORDINATES:]
    if detector.kind == "ssd":
        scores, labels, chosen = _of_classes(logits, detector)
    else:
        scores, labels, chosen = _of_levels(logits, detector)
    coder = BoxCoder(detector.weights, detector.largest_growth)
    boxes = coder.decode_single(moves.T[chosen], anchors[chosen])
    boxes = box_ops.clip_boxes_to_image(boxes, detector.size)
    kept = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
    for label in labels.unique():
        (own,) = torch.where(labels == label)
        kept[own[box_ops.nms(boxes[own], scores[own], detector.iou_threshold)]] = True
    (best,) = torch.where(kept)
    best = best[_ranked(scores[best], detector.detections)]
    return torch.cat([boxes[best], scores[best, None], labels[best, None].to(boxes)], 1)


def _of_classes(logits: Tensor, detector: Detector) -> tuple[Tensor, Tensor, Tensor]:
    """The best anchors of each class: scores, classes, anchors."""
    found = []
    for label, scores in enumerate(torch.softmax(logits, 0)[1:], 1):
        (over,) = torch.where(scores > detector.score_threshold)
        best = over[_ranked(scores[over], detector.candidates)]
        found.append((scores[best], torch.full_like(best, label), best))
    scores, labels, chosen = (torch.cat(parts) for parts in zip(*found, strict=True))
    return scores, labels, chosen


def _of_levels(logits: Tensor, detector: Detector) -> tuple[Tensor, Tensor, Tensor]:
    """The best pairs of anchor and class of each level: scores, classes, anchors."""
    classes, start, found = len(logits), 0, []
    for level in detector.levels:
        scores = torch.sigmoid(logits[:, start : start + level.count].T.flatten())
        (over,) = torch.where(scores > detector.score_threshold)
        best = over[_ranked(scores[over], detector.candidates)]
        found.append((scores[best], best % classes, start + best // classes))
        start += level.count
    scores, labels, chosen = (torch.cat(parts) for parts in zip(*found, strict=True))
    return scores, labels, chosen


def _ranked(scores: Tensor, most: int) -> Tensor:
    """Places of the largest ones, in their order."""
    return torch.sort(scores, descending=True, stable=True).indices[:most]
