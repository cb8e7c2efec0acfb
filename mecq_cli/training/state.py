"""Everything a run needs to go on exactly where it stopped, in one file a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.scheduler.cosine_lr import CosineLRScheduler

from mecq_cli.entropy import EntropyRegularizer
from mecq_cli.errors import CheckpointError
from mecq_cli.insertion import QuantizedModel
from mecq_cli.training import container

KEEP = 2
"""Checkpoints kept: the last one, and the one before it in case the last is damaged."""


@dataclass
class Progress:
    """Where a run is.

    Attributes:
        step: steps done.
        finished: the training and everything after it is over.
        facts: what was measured before the training and is not measured again (FP accuracy).
    """

    step: int
    finished: bool
    facts: dict[str, Any]


def save(
    folder: Path,
    model: QuantizedModel,
    optimizer: torch.optim.Optimizer,
    regularizer: EntropyRegularizer,
    progress: Progress,
) -> Path:
    """Write the checkpoint of this step and remove those that are too old."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors, structure = container.flatten_state(
        "state",
        {
            "model": dict(model.state_dict()),
            "optimizer": optimizer.state_dict(),
            "regularizer": regularizer.saved_states(),
            "random": torch.get_rng_state(),
        },
    )
    document = {
        "state": structure,
        "step": progress.step,
        "finished": progress.finished,
        "facts": progress.facts,
    }
    path = folder / f"step-{progress.step:08d}.safetensors"
    container.write(path, tensors, document, force=True)
    for old in checkpoints(folder)[:-KEEP]:
        old.unlink(missing_ok=True)
    return path


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoints of a run, oldest first."""
    return sorted(folder.glob("step-*.safetensors"))


def restore(
    folder: Path,
    model: QuantizedModel,
    optimizer: torch.optim.Optimizer,
    schedule: CosineLRScheduler,
    regularizer: EntropyRegularizer,
) -> tuple[Progress | None, list[str]]:
    """Load the newest checkpoint that is whole.

    Returns:
        (progress, complaints): progress is None where there is no checkpoint at all; a complaint
        names each newer file that is damaged.

    Raises:
        CheckpointError: there are checkpoints, and none of them can be used.
    """
    complaints: list[str] = []
    for path in reversed(checkpoints(folder)):
        try:
            tensors, document = container.read(path)
            state = container.unflatten_state(tensors, document["state"])
        except CheckpointError as error:
            complaints.append(str(error))
            continue
        _load(model, state["model"], path)
        optimizer.load_state_dict(state["optimizer"])
        regularizer.load_saved_states(state["regularizer"])
        torch.set_rng_state(state["random"])
        step = int(document["step"])
        schedule.step_update(step)
        return Progress(step, bool(document["finished"]), dict(document["facts"])), complaints
    if complaints:
        raise CheckpointError(
            f"{folder}: no checkpoint can be read ({complaints[0]}); start over with --force"
        )
    return None, []


def load_model(folder: Path, model: QuantizedModel) -> None:
    """Only the network of the newest whole checkpoint, to evaluate the simulator."""
    error: CheckpointError | None = None
    for path in reversed(checkpoints(folder)):
        try:
            tensors, document = container.read(path)
        except CheckpointError as reason:
            error = error or reason
            continue
        state = container.unflatten_state(tensors, document["state"])
        _load(model, state["model"], path)
        return
    raise error or CheckpointError(f"{folder}: there is no checkpoint; the run was never saved")


def _load(model: QuantizedModel, state: dict[str, Any], path: Path) -> None:
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(
            f"{path}: does not fit the network of this run; was config.toml changed?"
        ) from error
