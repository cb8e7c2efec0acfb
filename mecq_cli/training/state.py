"""Everything a run needs to go on exactly where it stopped, in one file a checkpoint."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from mecq_cli.errors import CheckpointError, EnvironmentFailure, NumericError
from mecq_cli.insertion import QuantizedModel
from mecq_cli.memory import is_out_of_memory, out_of_memory
from mecq_cli.storage import write_failure
from mecq_cli.training import container
from mecq_cli.training.diagnosis import is_finite, label

KEEP = 2
"""Checkpoints kept: the last one, and the one before it in case the last is damaged."""

_NAME = re.compile(r"step-(\d{8,18})\.safetensors")
_TENSOR_OVERHEAD = 512
_SMALL_STATES = 32_768
"""Bytes a tensor takes in the header; and those of the rest."""


class Part(Protocol):
    """What a training remembers beside the network and its optimizer."""

    def saved_states(self) -> Any:
        """Tensors and plain values, in dictionaries and lists."""

    def load_saved_states(self, state: Any, /) -> None:
        """Go on from there."""


@dataclass
class Progress:
    """Where a run is.

    Attributes:
        step: steps done.
        facts: what was measured before the training and is not measured again (FP accuracy).
    """

    step: int
    facts: dict[str, Any]


def save(
    folder: Path,
    model: QuantizedModel,
    optimizer: torch.optim.Optimizer,
    parts: Mapping[str, Part],
    progress: Progress,
    keep: int = KEEP,
) -> Path:
    """Write the checkpoint of this step, then remove those that are too old.

    Raises:
        NumericError: a number of the network or of the optimizer is not finite; nothing was
            written.
        EnvironmentFailure: as `storage.atomic_write`.
    """
    _require_finite(model, optimizer, progress.step)
    tensors, structure = container.flatten_state(
        "state",
        {
            "model": dict(model.state_dict()),
            "optimizer": optimizer.state_dict(),
            "parts": {name: part.saved_states() for name, part in parts.items()},
        },
    )
    document = {
        "state": structure,
        "step": progress.step,
        "facts": progress.facts,
    }
    path = folder / f"step-{progress.step:08d}.safetensors"
    container.write(path, tensors, document, force=True)
    _retain(folder, progress.step, keep)
    return path


def _retain(folder: Path, step: int, keep: int) -> None:
    """Keep the last ``keep`` up to ``step``. Later ones are damaged: they were passed over when
    the run was resumed, and counted among the last they would push good ones out."""
    found = checkpoints(folder)
    kept = {path for path in found if step_of(path) <= step}
    kept = set(sorted(kept, key=step_of)[-keep:])
    for path in found:
        if path not in kept:
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                raise write_failure(path, error) from error


def _require_finite(model: QuantizedModel, optimizer: torch.optim.Optimizer, step: int) -> None:
    """A network that is broken must not take the place of the last good one."""
    for name, tensor in model.state_dict().items():
        if not is_finite(tensor):
            raise _broken(step, label(name))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for parameter, values in optimizer.state.items():
        for key, value in values.items():
            if isinstance(value, Tensor) and not is_finite(value):
                raise _broken(step, f"{label(names.get(id(parameter), '?'))} ({key})")


def _broken(step: int, what: str) -> NumericError:
    return NumericError(
        f"step {step}: {what} is not finite after the update; it was not saved, the checkpoint "
        "before it is good; try a smaller --lr in a new run"
    )


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoints of a run, oldest first."""
    found = [path for path in folder.glob("step-*") if _NAME.fullmatch(path.name)]
    return sorted((path for path in found if not path.is_dir()), key=step_of)


def step_of(path: Path) -> int:
    """The steps that a checkpoint stands for, by its name."""
    match = _NAME.fullmatch(path.name)
    assert match is not None, path
    return int(match[1])


def expected_bytes(
    model: QuantizedModel, optimizer: torch.optim.Optimizer, remembered: Sequence[int] = ()
) -> int:
    """About what a checkpoint takes once training has begun; rather too much than too little.

    Args:
        model, optimizer: of the training.
        remembered: bytes of each tensor that is kept of a parameter beside those.
    """
    tensors = [*model.state_dict().values()]
    # Momentum of SGD is one tensor a parameter; Adam has two, and a counter.
    states = 2 if "betas" in optimizer.defaults else 1
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    size: int = sum(t.numel() * t.element_size() for t in tensors)
    size += states * sum(p.numel() * p.element_size() for p in parameters)
    # What the mixture keeps of each tap: 64 directions of both views' features, at most.
    widest = max((p.shape[0] for p in parameters if p.dim() > 1), default=0)
    size += len(model.taps) * 64 * 2 * widest * 4
    size += sum(remembered) * sum(p.numel() for p in parameters)
    kept = states + 1 + len(remembered)
    return size + _SMALL_STATES + _TENSOR_OVERHEAD * (len(tensors) + kept * len(parameters))


def restore(
    folder: Path,
    model: QuantizedModel,
    optimizer: torch.optim.Optimizer,
    parts: Mapping[str, Part],
) -> tuple[Progress | None, list[str]]:
    """Load the newest checkpoint that is whole. The schedule needs none: it follows the step.

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
            state = container.unflatten_state(tensors, document.get("state"))
        except CheckpointError as error:
            complaints.append(str(error))
            continue
        try:
            _load(model, state["model"], path)
            optimizer.load_state_dict(state["optimizer"])
            for name, part in parts.items():
                part.load_saved_states(state["parts"][name])
            step = int(document["step"])
            progress = Progress(step, dict(document["facts"]))
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise EnvironmentFailure(out_of_memory()) from error
            raise CheckpointError(
                f"{path}: holds something else than the state of this run ({type(error).__name__});"
                " remove it to continue from the one before, or start over with --force"
            ) from error
        return progress, complaints
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
            state = container.unflatten_state(tensors, document.get("state"))
        except CheckpointError as reason:
            error = error or reason
            continue
        _load(model, state.get("model") if isinstance(state, dict) else None, path)
        return
    raise error or CheckpointError(f"{folder}: there is no checkpoint; the run was never saved")


def _load(model: QuantizedModel, state: Any, path: Path) -> None:
    try:
        model.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: does not fit the network of this run; was config.toml changed?"
        ) from error
