"""A module of a program as a loaded model: what it does is found by running it once."""

from __future__ import annotations

import copy

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn

from mecq_cli.config import QuantizeConfig
from mecq_cli.errors import MecqError, UsageError
from mecq_cli.models.detection import detector_of, is_detector, outputs_only, preprocessing_of
from mecq_cli.models.detector import COORDINATES
from mecq_cli.models.loading import LoadedModel
from mecq_cli.models.order import keep_order
from mecq_cli.models.preprocessing import Preprocessing
from mecq_cli.models.segmentation import OUT, logits_only
from mecq_cli.tasks.figures import CLASSIFY, DETECT, SEGMENT

IMAGENET = Preprocessing((3, 224, 224), IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, "bilinear")
"""How most published models of torchvision's kind see an image."""


def default_preprocessing(model: nn.Module) -> Preprocessing:
    """A module that detects says what it takes."""
    return preprocessing_of(model) if is_detector(model) else IMAGENET


def load_module(
    model: nn.Module, preprocessing: Preprocessing, config: QuantizeConfig
) -> LoadedModel:
    """A copy of the module, what it does, and how many classes it has.

    Raises:
        UsageError: it cannot be copied, fails at such images, or does nothing that is known here.
    """
    own = _copied(model)
    preprocessing = preprocessing.overridden(img_size=config.img_size, crop_pct=config.crop_pct)
    name, size = type(model).__name__, list(preprocessing.input_size)
    try:
        preprocessing.require_sound()
    except (TypeError, ValueError) as error:
        raise UsageError(f"preprocessing: {error}") from error
    found = None
    try:
        if is_detector(own):
            own = outputs_only(own)
            found = detector_of(own, (size[1], size[2]))
        with torch.no_grad():
            logits = own(torch.zeros(1, *size))
            if isinstance(logits, dict) and OUT in logits:
                own, logits = logits_only(own), logits[OUT]
            keep_order(own, torch.zeros(2, *size))
    except MecqError:
        raise
    except Exception as error:  # whatever a program's module may raise
        raise UsageError(
            f"model: {name} fails at images of {size} ({type(error).__name__}: {error}); say what "
            "it takes: preprocessing=mecq_cli.Preprocessing(input_size=..., mean=..., std=...)"
        ) from error
    shape = tuple(logits.shape) if isinstance(logits, torch.Tensor) else ()
    if found is not None:
        return LoadedModel(
            name, own, preprocessing, shape[1] - COORDINATES, "module", imagenet=False,
            task=DETECT, detector=found,
        )  # fmt: skip
    dense = len(shape) == 4
    if len(shape) not in (2, 4) or shape[0] != 1:
        raise UsageError(
            f"model: {name} gives no logits [N, classes], and no [N, classes, H, W] (or a dict "
            "with these as 'out'), and is no SSD or RetinaNet of torchvision's; what "
            "classifies, segments or detects is needed"
        )
    if dense and shape[2:] != preprocessing.input_size[1:]:
        raise UsageError(
            f"model: {name} gives logits of {shape[2]} x {shape[3]} for images of {size[1]} x "
            f"{size[2]}; let it resize them to the size of the image, as torch's interpolate does"
        )
    task = SEGMENT if dense else CLASSIFY
    return LoadedModel(name, own, preprocessing, shape[1], "module", imagenet=False, task=task)


def _copied(model: nn.Module) -> nn.Module:
    """In float32, on the CPU."""
    try:
        return copy.deepcopy(model).float().cpu().eval()
    except Exception as error:  # whatever a program's module may hold
        raise UsageError(
            f"model: {type(model).__name__} cannot be copied ({type(error).__name__}: {error}); a "
            "module that keeps what it computed can be once it has run under torch.no_grad()"
        ) from error
