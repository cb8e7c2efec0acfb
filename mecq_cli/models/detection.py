"""torchvision's networks that detect in one stage, SSD and RetinaNet, and modules of their kind."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
import torchvision.models
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.retinanet import RetinaNet
from torchvision.models.detection.ssd import SSD
from torchvision.ops import FrozenBatchNorm2d

from mecq_cli.errors import UsageError
from mecq_cli.models.detector import COORDINATES, Detector, Level
from mecq_cli.models.hub import PublishedWeights
from mecq_cli.models.preprocessing import Preprocessing
from mecq_cli.models.weights import fit_state_dict

BACKGROUND = "__background__"
"""What torchvision calls the class of what is nothing."""
_FAMILIES = ("retinanet", "ssd")
_HEADS = ("classification_head", "regression_head")
_SQUARE = 800
"""Of a RetinaNet, whose own images keep their shape and have no less on the short side."""
_WITHOUT_EPS = ("retinanet_resnet50_fpn",)
"""Whose published weights are for batch norms that add nothing to the variance."""
_LEAST_EPS = 1e-12
"""What is added all the same: in training a variance may be 0."""
_CLOSE = 1e-3
"""Pixels that anchors may be off from a regular grid: they are float32."""


@cache
def detection_names() -> tuple[str, ...]:
    """What torchvision calls its networks that detect in one stage, by anchors."""
    names = torchvision.models.list_models(module=torchvision.models.detection)
    return tuple(name for name in names if name.startswith(_FAMILIES))


@cache
def other_detection_names() -> tuple[str, ...]:
    """Its other networks for boxes: of two stages, or without anchors."""
    names = torchvision.models.list_models(module=torchvision.models.detection)
    return tuple(name for name in names if name not in detection_names())


@cache
def coco_names() -> tuple[str, ...]:
    """The 91 classes of torchvision's published weights; the first is the background."""
    weights: Any = torchvision.models.get_model_weights(detection_names()[0]).DEFAULT
    return tuple(weights.meta["categories"])


class TorchvisionDetection:
    """A network of torchvision's for detection; see `LibraryModel`.

    Images are squashed to a square, as SSD does by itself. RetinaNet's own preprocessing keeps
    their shape, which no graph of a fixed size can.
    """

    task = "detect"
    unused: tuple[str, ...] = ()

    def __init__(self, name: str, arch: str) -> None:
        self.name, self._arch = name, arch
        self._weights: Any = torchvision.models.get_model_weights(arch).DEFAULT
        self.num_classes = len(self._weights.meta["categories"])
        self.published: PublishedWeights | None = PublishedWeights(self._weights.url)
        plain = self._made(self.num_classes, device="meta")
        self.classifiers: tuple[str, ...] = _classifiers(plain)
        first = plain.get_submodule(self.classifiers[0]).weight
        self.rows_of_a_class = len(first) // self.num_classes
        self.preprocessing = preprocessing_of(plain)

    def build(self, *, pretrained: bool, num_classes: int, img_size: int | None) -> nn.Module:
        module = self._made(num_classes)
        if pretrained:
            state = self._weights.get_state_dict(progress=False, check_hash=True)
            new = self.classifiers if num_classes != self.num_classes else ()
            fit_state_dict(module, state, source=f"the pretrained {self.name}", ignore=new)
            if self._arch in _WITHOUT_EPS:
                for norm in module.modules():
                    if isinstance(norm, nn.BatchNorm2d):
                        norm.eps = _LEAST_EPS
        return outputs_only(module)

    def _made(self, num_classes: int, device: str = "cpu") -> Any:
        with torch.device(device):
            return torchvision.models.get_model(
                self._arch, weights=None, weights_backbone=None, num_classes=num_classes
            )


def preprocessing_of(module: Any) -> Preprocessing:
    """What an SSD or RetinaNet does to images by itself, but squashed to one size."""
    transform = module.transform
    width, height = transform.fixed_size or (_SQUARE, _SQUARE)
    mean, std = tuple(transform.image_mean), tuple(transform.image_std)
    return Preprocessing(
        (len(mean), height, width), mean, std, "bilinear", crop_pct=1.0, crop_mode="squash"
    )


def _classifiers(module: nn.Module) -> tuple[str, ...]:
    """The convolutions that make the logits of a head: one, or one of each level."""
    head = module.get_submodule("head.classification_head")
    if hasattr(head, "cls_logits"):
        return ("head.classification_head.cls_logits",)
    found = []
    for name, level in head.get_submodule("module_list").named_children():
        path = f"head.classification_head.module_list.{name}"
        inner = [f"{path}.{n}" for n, m in level.named_modules() if n and isinstance(m, nn.Conv2d)]
        found.append(inner[-1] if inner else path)
    return tuple(found)


_MOST_OUTSIDE = 0.25
"""Of the centres of a level's anchors. SSD300 has 19 % at its own size."""


def is_detector(module: nn.Module) -> bool:
    """Whether it is of a class that can be quantized here."""
    return isinstance(module, (SSD, RetinaNet))


def outputs_only(module: nn.Module) -> nn.Module:
    """The same module, which takes a batch and gives [N, classes + 4, anchors].

    What torchvision does around backbone and heads is left out. Its parts keep their names, so that
    weights fit as before, and layers are called as they were. Batch norms that were frozen are such
    as learn, which compute the same.
    """
    kind = type(module)
    if issubclass(kind, _OutputsOnly):
        return module
    _thaw(module)
    module.__class__ = type(kind.__name__, (_OutputsOnly, kind), {"__module__": kind.__module__})
    return module


class _OutputsOnly(nn.Module):
    """Put before the class of a module."""

    head: nn.Module

    def forward(self, images: Tensor) -> Tensor:
        """Backbone and heads, and nothing else."""
        given = self.head(feature_maps(self, images))
        logits, moves = given["cls_logits"], given["bbox_regression"]
        return torch.cat([logits.transpose(1, 2), moves.transpose(1, 2)], 1)


def _thaw(module: nn.Module) -> None:
    """Plain batch norms in the place of frozen ones, which no layer before them could take over."""
    for name, old in [*module.named_modules()]:
        if not isinstance(old, FrozenBatchNorm2d):
            continue
        new = nn.BatchNorm2d(len(old.weight), eps=max(old.eps, _LEAST_EPS))
        new.load_state_dict(old.state_dict(), strict=False)  # the frozen ones count no batches
        parent, _, child = name.rpartition(".")
        setattr(module.get_submodule(parent), child, new.to(old.weight.device).eval())


def feature_maps(module: nn.Module, images: Tensor) -> list[Tensor]:
    """What the backbone gives, from the finest map on."""
    backbone: Any = module.backbone
    given = backbone(images)
    return [given] if isinstance(given, Tensor) else list(given.values())


@torch.no_grad()
def detector_of(module: Any, size: tuple[int, int]) -> Detector:
    """What `Detector` says of a module of torchvision's kind.

    Args:
        module: an SSD or RetinaNet; it is run once.
        size: height and width of the images.

    Raises:
        UsageError: its anchors are not the same boxes at each place, or do not fit its heads.
    """
    first = next(m for m in module.backbone.modules() if isinstance(m, nn.Conv2d))
    images = torch.zeros(1, first.in_channels, *size)
    maps = feature_maps(module, images)
    (anchors,) = module.anchor_generator(ImageList(images, [size]), maps)
    grids = [(int(m.shape[-2]), int(m.shape[-1])) for m in maps]
    per_place = module.anchor_generator.num_anchors_per_location()
    levels, start = [], 0
    for (rows, columns), boxes in zip(grids, per_place, strict=True):
        count = rows * columns * boxes
        part = anchors[start : start + count].double().numpy()
        levels.append(_level(type(module).__name__, part.reshape(rows, columns, boxes, 4)))
        _check_places(module, part, size)
        start += count
    given = module.head(maps)["bbox_regression"]
    if start != len(anchors) or tuple(given.shape[1:]) != (start, COORDINATES):
        raise UsageError(
            f"model: {type(module).__name__} has {len(anchors)} anchors and moves "
            f"{list(given.shape[1:])}; heads and anchor generator must be made for each other"
        )
    return Detector(
        kind="ssd" if isinstance(module, SSD) else "retinanet",
        size=size,
        levels=tuple(levels),
        weights=tuple(float(w) for w in module.box_coder.weights),  # type: ignore[arg-type]
        largest_growth=float(module.box_coder.bbox_xform_clip),
        score_threshold=float(module.score_thresh),
        iou_threshold=float(module.nms_thresh),
        candidates=int(module.topk_candidates),
        detections=int(module.detections_per_img),
    )


def _check_places(module: nn.Module, anchors: Any, size: tuple[int, int]) -> None:
    """Whether the boxes of a level are where the image is."""
    centres = (anchors[:, :2] + anchors[:, 2:]) / 2
    outside = float((centres > (size[1], size[0])).any(1).mean())
    if outside > _MOST_OUTSIDE:
        raise UsageError(
            f"model: {type(module).__name__} at {size[1]} x {size[0]} pixels has a map whose "
            f"anchors lie outside of the image to {100 * outside:.0f} %, so that large objects are "
            "not found; its anchor generator is made for another --img-size"
        )


def _level(name: str, anchors: Any) -> Level:
    """Of anchors [rows, columns, boxes, 4]."""
    rows, columns = anchors.shape[:2]
    first = anchors[0, 0]
    # Over the whole map: a single step has the rounding of float32.
    down = (anchors[-1, 0, 0, 1] - first[0, 1]) / (rows - 1) if rows > 1 else 0.0
    right = (anchors[0, -1, 0, 0] - first[0, 0]) / (columns - 1) if columns > 1 else 0.0
    boxes = tuple(tuple(float(v) for v in box) for box in first)
    level = Level((rows, columns), (float(down), float(right)), boxes)  # type: ignore[arg-type]
    if np.abs(level.anchors() - anchors.reshape(-1, 4)).max() > _CLOSE:
        raise UsageError(
            f"model: the anchors of {name} are not the same boxes at each place of a feature map; "
            "use torchvision's AnchorGenerator or DefaultBoxGenerator"
        )
    return level
