"""A name -> a model with its weights, its preprocessing and the number of its classes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor, nn

from mecq_cli.errors import CheckpointError, UsageError
from mecq_cli.models import libraries
from mecq_cli.models.detection import detector_of, is_detector
from mecq_cli.models.detector import Detector
from mecq_cli.models.hub import quiet, unavailable
from mecq_cli.models.libraries import LibraryModel, model_names
from mecq_cli.models.preprocessing import Preprocessing
from mecq_cli.models.timm_models import SavedTimmModel
from mecq_cli.models.weights import first_line, fit_state_dict, load_state_dict

__all__ = ["LoadedModel", "load_model", "model_names"]

_IMAGENET_CLASSES = 1000


@dataclass(frozen=True)
class LoadedModel:
    """A floating point model, ready to evaluate or to quantize.

    Attributes:
        name: as it was asked for.
        module: float32, on the CPU, in evaluation mode.
        preprocessing: what its weights expect, with the overrides in it.
        num_classes: outputs it has.
        weights: "library", "random", or the name of the checkpoint file.
        imagenet: whether the outputs are the classes of ImageNet-1k, in its order.
        task: what it is for, see mecq_cli.tasks.
        detector: what makes boxes of its outputs; None of those that do not detect.
        classifiers: submodules that make its outputs, by name; none where they are not known.
    """

    name: str
    module: nn.Module
    preprocessing: Preprocessing
    num_classes: int
    weights: Literal["library", "random"] | str
    imagenet: bool
    task: str = "classify"
    detector: Detector | None = None
    classifiers: tuple[str, ...] = ()


def load_model(
    name: str,
    *,
    checkpoint: Path | None = None,
    pretrained: bool = True,
    num_classes: int | None = None,
    reset_classifier: bool = False,
    img_size: int | None = None,
    crop_pct: float | None = None,
) -> LoadedModel:
    """Build a model and give it its weights.

    What is random in it (all of it, or a new classifier) comes from torch's global generator.

    Args:
        name: of timm's, ``torchvision/NAME``, ``resnet20_cifar`` and its kin, or a saved model of
            timm's: ``hf-hub:OWNER/NAME``, ``local-dir:FOLDER``.
        checkpoint: weights to use in place of the library's.
        pretrained: without a checkpoint: the library's weights (True) or random ones.
        num_classes: outputs to have; None: as the weights have, or as the library has.
        reset_classifier: make the last layer anew, with ``num_classes`` outputs.
        img_size: height and width of the input; None: the model's own.
        crop_pct: part of the short side that the crop keeps; None: the model's own.

    Raises:
        UsageError: an unknown model, one without published weights or without classes, or an
            image size it cannot take.
        CheckpointError: the weights cannot be read or do not fit.
        EnvironmentFailure: the library's weights are not here and cannot be fetched.
    """
    model = libraries.find(name)
    preprocessing = model.preprocessing.overridden(img_size=img_size, crop_pct=crop_pct)
    if num_classes is not None and num_classes < 1:
        raise UsageError(f"a model with {num_classes} classes was asked for; it needs at least 1")
    if checkpoint is not None:
        module, classes = _from_checkpoint(
            model, checkpoint, num_classes, reset_classifier, img_size
        )
    elif pretrained and isinstance(model, SavedTimmModel):
        module, classes = _from_checkpoint(
            model, model.file(), num_classes, reset_classifier, img_size
        )
    elif pretrained:
        module, classes = _from_library(model, num_classes, reset_classifier, img_size)
    else:
        classes = _some(num_classes or model.num_classes, model)
        module = _built(model, classes, img_size)
    weights = checkpoint.name if checkpoint else "library" if pretrained else "random"
    module = module.float().eval()
    return LoadedModel(
        name=name,
        module=module,
        preprocessing=preprocessing,
        num_classes=classes,
        weights=weights,
        imagenet=classes == model.num_classes == _IMAGENET_CLASSES,
        task=model.task,
        detector=_detector(module, model, preprocessing) if is_detector(module) else None,
        classifiers=model.classifiers,
    )


def _detector(module: nn.Module, model: LibraryModel, preprocessing: Preprocessing) -> Detector:
    _, height, width = preprocessing.input_size
    try:
        return detector_of(module, (height, width))
    except RuntimeError as error:  # torch's, of a map that is smaller than a kernel
        raise UsageError(
            f"{model.name} cannot take images of {height} pixels ({first_line(error)}); its own "
            f"size is {model.preprocessing.input_size[-1]}"
        ) from error


def _from_checkpoint(
    model: LibraryModel,
    checkpoint: Path,
    num_classes: int | None,
    reset: bool,
    img_size: int | None,
) -> tuple[nn.Module, int]:
    state = load_state_dict(checkpoint)
    held = _classifier_rows(model, state)
    classes = _some(num_classes or held or model.num_classes, model)
    if held is not None and held != classes and not reset:
        raise _other_size(str(checkpoint), held, classes)
    module = _built(model, classes, img_size)
    kept = model.classifiers if reset else ()
    fit_state_dict(module, state, source=str(checkpoint), ignore=(*kept, *model.unused))
    return module, classes


def _from_library(
    model: LibraryModel, num_classes: int | None, reset: bool, img_size: int | None
) -> tuple[nn.Module, int]:
    classes = _some(num_classes or model.num_classes, model)
    if model.published is None:
        raise UsageError(
            f"there are no published weights of {model.name}; give a weight file with "
            "--checkpoint FILE, or start from random weights with --no-pretrained"
        )
    if classes != model.num_classes and not reset:
        raise _other_size(f"the pretrained {model.name}", model.num_classes, classes)
    cached = model.published.cached()
    if cached is None:
        model.published.require_reachable(model.name)
    try:
        module = _built(model, classes, img_size, pretrained=True)
    except UsageError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        if cached is None:
            raise unavailable(model.name, reason) from error
        raise CheckpointError(
            f"the pretrained weights in {cached} cannot be used ({reason}); delete that file to "
            "fetch it again, or give another with --checkpoint"
        ) from error
    if reset and classes == model.num_classes:
        if is_detector(module):  # of which the bias begins where nothing is there, most of the time
            _renew(module, model, _built(model, classes, img_size))
        else:
            _reset(module, model)
    return module, classes


def _built(
    model: LibraryModel, num_classes: int, img_size: int | None, *, pretrained: bool = False
) -> nn.Module:
    if img_size == model.preprocessing.input_size[-1]:
        img_size = None
    try:
        with quiet():
            return model.build(pretrained=pretrained, num_classes=num_classes, img_size=img_size)
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        if img_size is None or isinstance(error, OSError):
            raise
        raise UsageError(
            f"{model.name} cannot be built for images of {img_size} pixels "
            f"({first_line(error)}); its own size is "
            f"{model.preprocessing.input_size[-1]}"
        ) from error


def _reset(module: nn.Module, model: LibraryModel) -> None:
    for name in model.classifiers:
        layer = module.get_submodule(name)
        assert isinstance(layer, nn.Linear | nn.Conv2d), f"{name} is a {type(layer).__name__}"
        layer.reset_parameters()


def _renew(module: nn.Module, model: LibraryModel, random: nn.Module) -> None:
    for name in model.classifiers:
        module.get_submodule(name).load_state_dict(random.get_submodule(name).state_dict())


def _classifier_rows(model: LibraryModel, state: Mapping[str, Tensor]) -> int | None:
    """How many classes the weights are for; None where they have no such layer."""
    for name in model.classifiers:
        weight = state.get(f"{name}.weight")
        if weight is not None and weight.ndim > 1:
            return weight.shape[0] // model.rows_of_a_class
    return None


def _some(num_classes: int, model: LibraryModel) -> int:
    if num_classes < 1 or not model.classifiers:
        raise UsageError(
            f"{model.name} only makes features and has no classifier; choose a classification model"
        )
    return num_classes


def _other_size(source: str, held: int, wanted: int) -> CheckpointError:
    return CheckpointError(
        f"{source} has a classifier of {held} classes and {wanted} are wanted; use data of its "
        "classes, or give --reset-classifier to train a new last layer"
    )
