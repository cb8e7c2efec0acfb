"""The float model of a run: by its settings, with the last layer that was fitted for it."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from mecq_cli.config import QuantizeConfig
from mecq_cli.errors import CheckpointError, InputError
from mecq_cli.models.classes import ClassMap
from mecq_cli.models.loading import LoadedModel
from mecq_cli.models.weights import fit_state_dict, load_state_dict
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
        restore_classifier(loaded, config, run)
    return loaded, classes


def knows_classes(loaded: LoadedModel, config: QuantizeConfig) -> bool:
    """Whether the float model is trained for the classes: else its figure is that of guessing."""
    if config.reset_classifier:
        return fits_classifier(loaded, config)
    return loaded.weights != "random"


def fits_classifier(loaded: LoadedModel, config: QuantizeConfig) -> bool:
    """Whether the last layer is a new one that is fitted before anything is quantized."""
    return (
        config.reset_classifier
        and config.fit_classifier
        and loaded.weights != "random"
        and loaded.task == CLASSIFY
        and last_layer.last_layer(loaded.module, loaded.classifiers) is not None
    )


def read_classifier(run: RunFolder) -> dict[str, Tensor] | None:
    """The last layer that is kept in a run's folder; None where none is.

    Raises:
        InputError: the file cannot be read.
    """
    if not run.classifier.is_file():
        return None
    try:
        return load_state_dict(run.classifier)
    except CheckpointError as error:
        raise _damaged(run) from error


def use_classifier(loaded: LoadedModel, kept: Mapping[str, Tensor], run: RunFolder) -> None:
    """Give the model the last layer that was kept.

    Raises:
        InputError: it is of another network.
    """
    layer = last_layer.last_layer(loaded.module, loaded.classifiers)
    assert layer is not None
    try:
        fit_state_dict(layer, kept, source=str(run.classifier))
    except CheckpointError as error:
        raise _damaged(run) from error


def restore_classifier(loaded: LoadedModel, config: QuantizeConfig, run: RunFolder) -> None:
    """Give the model the last layer that was fitted in a run, if that run fits one.

    Raises:
        InputError: it is gone, cannot be read, or is of another network.
    """
    if fits_classifier(loaded, config):
        kept = read_classifier(run)
        if kept is None:
            raise gone(run)
        use_classifier(loaded, kept, run)


def gone(run: RunFolder) -> InputError:
    """The error of a run that began with a last layer which nobody has any more."""
    return InputError(
        f"{run.classifier}: the last layer that this run fitted is gone; restore it, or start over "
        "with --force"
    )


def _damaged(run: RunFolder) -> InputError:
    return InputError(
        f"{run.classifier}: cannot be read, or does not fit the network; restore it, or start over "
        "with --force"
    )
