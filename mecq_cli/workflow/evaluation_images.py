"""Which images a stored model is evaluated on, where a run may know them."""

from __future__ import annotations

from pathlib import Path

from mecq_cli.config import QuantizeConfig
from mecq_cli.data import Split
from mecq_cli.errors import DataError, MecqError, UsageError
from mecq_cli.runs import RunFolder, read_summary
from mecq_cli.settings import absolute_data
from mecq_cli.tasks.base import Task
from mecq_cli.tasks.registry import CLASSIFICATION
from mecq_cli.workflow.identity import digest_of_images
from mecq_cli.workflow.targets import settings_of


def evaluation_split(
    run: RunFolder | None,
    data: str | None,
    split: str | None = None,
    task: Task = CLASSIFICATION,
) -> Split:
    """The images to evaluate on.

    Where the run had no folder of its own for that, those it held out of its training, wherever
    its images are now.

    Args:
        run: whose images they are, unless ``data`` names others.
        data: what --data says.
        split: what --split says.
        task: what the images are for.

    Raises:
        MecqError: they are not there, or neither a run nor --data names any.
    """
    config = settings_of(run)
    root = data or (None if config is None else config.data)
    if root is None:
        raise UsageError("which images? give --data DIR")
    try:
        if run is not None and config is not None and config.val_split is not None and not split:
            held_out = _held_out(run, config, config.val_split, root, task)
            if held_out is not None:
                return held_out
        return task.open_evaluation(root, split)
    except DataError as error:
        if data is not None or run is None or "/" not in root or Path(root).exists():
            raise
        raise DataError(
            f"the images of {run.path} were in {root}, which is not there; say where they are: "
            "--data DIR"
        ) from error


def _held_out(
    run: RunFolder, config: QuantizeConfig, share: float, root: str, task: Task
) -> Split | None:
    """What the run held out of the images in ``root``; None if these are others."""
    known = read_summary(run).get("images_sha256")
    own = absolute_data(root) == absolute_data(config.data)
    if known is None and not own:
        return None
    try:
        parts = task.open_training(root, share, config.seed)
    except MecqError:
        if own:
            raise
        return None  # and the message is about what --data is asked for
    if known is None or digest_of_images(*parts) == known:
        return parts[1]
    if own:
        raise UsageError(
            f"{root}: its images are no longer those that {run.path} was trained on, so that what "
            "was held out of the training is not known; restore them, or give others with --data"
        )
    return None
