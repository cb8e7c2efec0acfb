"""torchvision's networks for semantic segmentation, and any module that returns {"out": logits}."""

from __future__ import annotations

from functools import cache
from typing import Any

import torchvision.models
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from mecq_cli.models.hub import PublishedWeights
from mecq_cli.models.preprocessing import Preprocessing

OUT = "out"
"""The key of the logits in what torchvision's networks return."""
_LAST = {"fcn": ("classifier.4",), "deeplabv3": ("classifier.4",)}
_LAST_OF_LRASPP = ("classifier.low_classifier", "classifier.high_classifier")
_AUXILIARY = ("aux_classifier",)


@cache
def segmentation_names() -> tuple[str, ...]:
    """What torchvision calls its networks that segment."""
    return tuple(torchvision.models.list_models(module=torchvision.models.segmentation))


class TorchvisionSegmentation:
    """A network for semantic segmentation of torchvision's, without its auxiliary head.

    Images are squashed to a square, which is what the logits cover; see `LibraryModel`.
    """

    task = "segment"
    rows_of_a_class = 1

    def __init__(self, name: str, arch: str) -> None:
        self.name, self._arch = name, arch
        self._weights: Any = torchvision.models.get_model_weights(arch).DEFAULT
        self.num_classes = len(self._weights.meta["categories"])
        family = arch.partition("_")[0]
        self.classifiers: tuple[str, ...] = _LAST.get(family, _LAST_OF_LRASPP)
        self.unused: tuple[str, ...] = _AUXILIARY
        self.published: PublishedWeights | None = PublishedWeights(self._weights.url)
        size = self._weights.transforms().resize_size[0]
        self.preprocessing = Preprocessing(
            (3, size, size),
            IMAGENET_DEFAULT_MEAN,
            IMAGENET_DEFAULT_STD,
            "bilinear",
            crop_pct=1.0,
            crop_mode="squash",
        )

    def build(self, *, pretrained: bool, num_classes: int, img_size: int | None) -> nn.Module:
        make = torchvision.models.get_model
        if pretrained:
            module: nn.Module = make(self._arch, weights=self._weights, progress=False)
            if num_classes != self.num_classes:
                for name in self.classifiers:
                    _replace(module, name, num_classes)
        else:
            module = make(self._arch, weights=None, weights_backbone=None, num_classes=num_classes)
        if hasattr(module, _AUXILIARY[0]):
            setattr(module, _AUXILIARY[0], None)
        return logits_only(module)


def logits_only(module: nn.Module) -> nn.Module:
    """The same module, which gives its logits where it gave a dict with them.

    Its parts keep their names, so that weights fit as before, and layers are called as they were.
    """
    kind = type(module)
    if issubclass(kind, _LogitsOnly):
        return module
    made = type(kind.__name__, (_LogitsOnly, kind), {"__module__": kind.__module__})
    module.__class__ = made
    return module


class _LogitsOnly(nn.Module):
    """Put before the class of a module."""

    def forward(self, images: Tensor) -> Any:
        """What the module gives under `OUT`."""
        given = super().forward(images)
        return given[OUT] if isinstance(given, dict) else given


def _replace(module: nn.Module, name: str, num_classes: int) -> None:
    """Another number of outputs, of random weights."""
    old = module.get_submodule(name)
    assert isinstance(old, nn.Conv2d), f"{name} is a {type(old).__name__}"
    parent, _, child = name.rpartition(".")
    new = nn.Conv2d(old.in_channels, num_classes, kernel_size=1)
    setattr(module.get_submodule(parent), child, new)
