"""The float model of a run: by its settings, with the last layer that was fitted for it."""

from __future__ import annotations

import safetensors.torch
from safetensors import SafetensorError

from mecq_cli.config import QuantizeConfig
from mecq_cli.errors import InputError
from mecq_cli.models.classes import ClassMap
from mecq_cli.models.loading import LoadedModel
from mecq_cli.runs import RunFolder
from mecq_cli.tasks.figures import CLASSIFY
from mecq_cli.training import last_layer
from mecq_cli.workflow.common import load_for_data


def load_float(
    config: QuantizeConfig, folders: tuple[str, ...], run: RunFolder | None = None
) -> tuple[LoadedModel, ClassMap]:
    """The model that the settings name, and which of its outputs belongs to which class.

    Args:
        config: of a run.
        folders: names of the classes.
        run: whose last layer it gets, if one was fitted there.

    Raises:
        MecqError: as of `load_for_data`, and what is kept of the last layer cannot be read.
    """
    loaded, classes = load_for_data(
        config.model,
        folders,
        checkpoint=config.checkpoint,
        pretrained=config.pretrained,
        reset_classifier=config.reset_classifier,
        img_size=config.img_size,
        crop_pct=config.crop_pct,
    )
    if run is not None:
        put_classifier(loaded, run)
    return loaded, classes


def knows_classes(loaded: LoadedModel, config: QuantizeConfig) -> bool:
    """Whether the float model is trained for the classes: else its figure is that of guessing."""
    trained = loaded.weights != "random"
    return trained and (not config.reset_classifier or fits_classifier(loaded, config))


def fits_classifier(loaded: LoadedModel, config: QuantizeConfig) -> bool:
    """Whether the last layer is a new one that is fitted before anything is quantized."""
    return (
        config.reset_classifier
        and config.fit_classifier
        and loaded.weights != "random"
        and loaded.task == CLASSIFY
        and last_layer.last_layer(loaded.module, loaded.classifiers) is not None
    )


def put_classifier(loaded: LoadedModel, run: RunFolder) -> bool:
    """Give the model the last layer that is kept in a run's folder; False where none is.

    Raises:
        InputError: the file is damaged, or of another network.
    """
    layer = last_layer.last_layer(loaded.module, loaded.classifiers)
    if layer is None or not run.classifier.is_file():
        return False
    try:
        kept = safetensors.torch.load(run.classifier.read_bytes())
        layer.load_state_dict(kept)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise InputError(
            f"{run.classifier}: cannot be read, or does not fit the network; restore it, or start "
            "over with --force"
        ) from error
    return True
