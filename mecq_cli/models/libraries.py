"""timm and torchvision behind one contract: what each knows of a model, and how it builds it."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, Protocol

import timm
import torchvision.models
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn

from mecq_cli.errors import UsageError
from mecq_cli.models import cifar_resnet
from mecq_cli.models.detection import (
    TorchvisionDetection,
    detection_names,
    other_detection_names,
)
from mecq_cli.models.hub import PublishedWeights
from mecq_cli.models.preprocessing import Preprocessing
from mecq_cli.models.segmentation import TorchvisionSegmentation, segmentation_names
from mecq_cli.models.supported import near
from mecq_cli.models.timm_models import SavedTimmModel, TimmModel
from mecq_cli.runs import RunFolder
from mecq_cli.settings import HUB, LOCAL, OWN, split_model_name

TORCHVISION = "torchvision/"

# The last layer, by how the name of the architecture begins: torchvision does not tell it.
_TORCHVISION_CLASSIFIERS = {
    "alexnet": "classifier.6",
    "convnext": "classifier.2",
    "densenet": "classifier",
    "efficientnet": "classifier.1",
    "maxvit": "classifier.5",
    "mnasnet": "classifier.1",
    "mobilenet_v2": "classifier.1",
    "mobilenet_v3": "classifier.3",
    "squeezenet": "classifier.1",
    "swin": "head",
    "vgg": "classifier.6",
    "vit": "heads.head",
}
_TORCHVISION_OTHER_CLASSIFIER = "fc"
_AUXILIARY = ("aux1", "aux2", "AuxLogits")


class LibraryModel(Protocol):
    """A model that a library can build.

    Attributes:
        name: as the user gives it.
        num_classes: outputs it has in the library; 0 for a net without a classifier.
        classifiers: submodules that make the outputs, by name.
        unused: submodules that its published weights hold and `build` leaves out.
        preprocessing: that the library's weights count on.
        published: where the library's weights are; None where it has none.
        task: what it is for, by the name of the task.
        rows_of_a_class: how many rows of the first classifier's weight a class has.
    """

    name: str
    num_classes: int
    classifiers: tuple[str, ...]
    unused: tuple[str, ...]
    preprocessing: Preprocessing
    published: PublishedWeights | None
    task: str
    rows_of_a_class: int

    def build(self, *, pretrained: bool, num_classes: int, img_size: int | None) -> nn.Module:
        """Make the net; a classifier of another size than the pretrained one is random."""


class TorchvisionModel:
    """A classification model of torchvision's, with its default weights."""

    task = "classify"
    rows_of_a_class = 1

    def __init__(self, name: str) -> None:
        self.name = name
        self._arch = name.removeprefix(TORCHVISION)
        self._weights: Any = getattr(
            torchvision.models.get_model_weights(self._arch), "DEFAULT", None
        )
        self.num_classes = 1000
        known = [v for k, v in _TORCHVISION_CLASSIFIERS.items() if self._arch.startswith(k)]
        self.classifiers: tuple[str, ...] = (*known, _TORCHVISION_OTHER_CLASSIFIER)[:1]
        self._is_inception = self._arch in ("googlenet", "inception_v3")
        self.unused: tuple[str, ...] = _AUXILIARY if self._is_inception else ()
        self.published = PublishedWeights(self._weights.url) if self._weights else None
        self.preprocessing = self._preprocessing()

    def _preprocessing(self) -> Preprocessing:
        size, resize, interpolation = 224, 256, "bilinear"
        mean, std = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
        if self._weights:
            transforms = self._weights.transforms()
            size, resize = transforms.crop_size[0], transforms.resize_size[0]
            interpolation = transforms.interpolation.value
            mean, std = tuple(transforms.mean), tuple(transforms.std)
        if self._is_inception:
            # With its own weights the net turns this normalisation into the one it was trained
            # with (transform_input). Both steps in one: see `build`.
            mean = std = (0.5, 0.5, 0.5)
        return Preprocessing((3, size, size), mean, std, interpolation, crop_pct=size / resize)

    def build(self, *, pretrained: bool, num_classes: int, img_size: int | None) -> nn.Module:
        options: dict[str, Any] = {}
        if self._arch.startswith("vit"):
            options["image_size"] = img_size or self.preprocessing.input_size[-1]
        elif self._arch.startswith("maxvit") and img_size is not None:
            options["input_size"] = (img_size, img_size)
        if pretrained:
            module: nn.Module = torchvision.models.get_model(
                self._arch, weights=self._weights, progress=False, **options
            )
            if num_classes != self.num_classes:
                _replace_classifier(module, self.classifiers[0], num_classes)
        else:
            module = torchvision.models.get_model(
                self._arch, weights=None, num_classes=num_classes, **options
            )
        if self._is_inception:
            _without_extras(module)
        return module


def find(name: str) -> LibraryModel:
    """The model that is called ``name``.

    Raises:
        UsageError: there is none; the message holds up to three near matches.
        CheckpointError, EnvironmentFailure: as of `SavedTimmModel`.
    """
    if name.startswith(OWN):
        raise UsageError(
            f"{name.removeprefix(OWN)} is a module of the program that started this run, which "
            "alone can make it; go on there: mecq_cli.quantize(..., output=..., resume=True)"
        )
    if split_model_name(name)[0]:
        return SavedTimmModel(name)
    arch = name.removeprefix(TORCHVISION)
    if arch in segmentation_names():  # also by its own name alone, which timm has not
        return TorchvisionSegmentation(name, arch)
    if arch in detection_names():
        return TorchvisionDetection(name, arch)
    if arch in other_detection_names():
        raise UsageError(
            f"{name}: detects in two stages or without anchors, and cannot be quantized here; "
            f"choose one of {', '.join(detection_names())}"
        )
    if name.startswith(TORCHVISION):
        if name in _torchvision_names():
            return TorchvisionModel(name)
    elif ":" not in name and "/" not in name and timm.is_model(name):
        try:
            return TimmModel(name)
        except RuntimeError:  # the architecture exists, those weights of it do not
            tags = timm.list_pretrained(name.split(".")[0] + ".*")
            raise _unknown(name, difflib.get_close_matches(name, tags, 3, cutoff=0)) from None
    raise _unknown(name, near(name, model_names(), TORCHVISION))


def model_names() -> list[str]:
    """Every name that `find` takes, timm's first; timm's may be followed by ``.TAG``."""
    return [*timm.list_models(), *_torchvision_names(), *segmentation_names(), *detection_names()]


def _torchvision_names() -> list[str]:
    # The other packages in torchvision.models detect, segment and so on.
    names = torchvision.models.list_models(module=torchvision.models)
    return [TORCHVISION + name for name in names]


def _unknown(name: str, near: list[str]) -> UsageError:
    hint = (
        f"did you mean {', '.join(near)}?"
        if near
        else "mecq models lists those that were tried; a module of your own: docs/api.md"
    )
    if Path(name).is_dir():
        runs = [path.name for path in sorted(Path(name).iterdir()) if RunFolder(path).is_run]
        inside = f", but there are such in it: {', '.join(runs[:3])}" if runs else ""
        return UsageError(
            f"{name}: is neither a model's name nor a run folder (which has config.toml and "
            f"model.safetensors){inside}"
        )
    return UsageError(
        f"unknown model {name!r}: timm's names, torchvision/NAME, {HUB}OWNER/NAME, {LOCAL}FOLDER "
        f"and {', '.join(cifar_resnet.default_cfgs)} are known; {hint}"
    )


def _replace_classifier(module: nn.Module, name: str, num_classes: int) -> None:
    old = module.get_submodule(name)
    new: nn.Module
    if isinstance(old, nn.Linear):
        new = nn.Linear(old.in_features, num_classes)
    else:
        assert isinstance(old, nn.Conv2d), f"{name} is a {type(old).__name__}"
        new = nn.Conv2d(old.in_channels, num_classes, kernel_size=1)
    parent, _, child = name.rpartition(".")
    setattr(module.get_submodule(parent), child, new)


def _without_extras(module: nn.Module) -> None:
    """One output in training mode, too, and no normalisation inside of the net."""
    for name in _AUXILIARY:
        if hasattr(module, name):
            setattr(module, name, None)
    for flag in ("aux_logits", "transform_input"):
        setattr(module, flag, False)
