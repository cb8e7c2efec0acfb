"""How much disk a run takes: told before it starts, and refused where there is not as much."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mecq_cli.config import QuantizeConfig
from mecq_cli.errors import EnvironmentFailure
from mecq_cli.insertion import QuantizedModel
from mecq_cli.runs import RunFolder
from mecq_cli.storage import free_space
from mecq_cli.training import averaging, oscillation, state
from mecq_cli.training.recipe import Recipe

_FLOAT_BITS = 32
_ARTIFACT_OVERHEAD = 100_000
_ROW, _COLUMN = 400, 80
"""Bytes of a row of the metrics, and of each coding length in it."""

_EVENT, _EVENTS = 65, 8
"""Bytes of an event of TensorBoard, and events of a step beside the coding lengths."""


@dataclass(frozen=True)
class DiskNeed:
    """Bytes, estimated from above.

    Attributes:
        checkpoint: of one checkpoint.
        checkpoints: how many there are at once: those kept, and the one that is being written.
        other: artifact, metrics, settings and summary.
        there: of the checkpoints and metrics that a run to be continued has already.
    """

    checkpoint: int
    checkpoints: int
    other: int
    there: int

    @property
    def needed(self) -> int:
        """Bytes that must be free."""
        return max(
            self.checkpoints * self.checkpoint + self.other - self.there,
            self.checkpoint + self.other,
        )

    def document(self, folder: Path) -> dict[str, Any]:
        """For --dry-run; ``folder`` is where the run would be."""
        return {
            "checkpoint_bytes": self.checkpoint,
            "checkpoints": self.checkpoints,
            "other_bytes": self.other,
            "needed_bytes": self.needed,
            "free_bytes": free_space(folder),
        }

    def require(self, folder: Path) -> str:
        """One line of both numbers.

        Raises:
            EnvironmentFailure: there is less than that.
        """
        free = free_space(folder)
        text = (
            f"{readable(self.needed)} of disk are needed ({self.checkpoints} checkpoints of "
            f"{readable(self.checkpoint)}, {readable(self.other)} other), {readable(free)} are "
            "free"
        )
        if free < self.needed:
            raise EnvironmentFailure(
                f"{folder}: {text}; free some space, choose another --output, or keep fewer with "
                "--keep-checkpoints"
            )
        return text


def disk_need(
    config: QuantizeConfig,
    recipe: Recipe,
    model: QuantizedModel,
    optimizer: torch.optim.Optimizer,
    run: RunFolder | None = None,
) -> DiskNeed:
    """What a run of these settings takes; ``run`` may hold a part of it already."""
    every = config.checkpoint_every or max(recipe.steps_per_epoch, 1)
    # One before the first step, and one after the last: without any step they are the same.
    written = -(-recipe.total_steps // every) + 1
    bits = [config.wbits, config.first_last_bits, *(o.wbits or 0 for o in config.layers)]
    parameters = sum(p.numel() for p in model.parameters())
    artifact = parameters * (4 if _FLOAT_BITS in bits else 1) + _ARTIFACT_OVERHEAD
    row = _ROW + _COLUMN * len(model.taps)
    if config.log == "tensorboard":
        row += _EVENT * (_EVENTS + len(model.taps))
    rows = recipe.total_steps * row
    files = [] if run is None else [*state.checkpoints(run.checkpoints), run.metrics]
    return DiskNeed(
        checkpoint=state.expected_bytes(model, optimizer, _remembered(recipe)),
        checkpoints=min(config.keep_checkpoints, written) + 1,
        other=artifact + rows,
        there=sum(file.stat().st_size for file in files if file.exists()),
    )


def _remembered(recipe: Recipe) -> Sequence[int]:
    average = averaging.REMEMBERED if recipe.ema else ()
    oscillations = oscillation.REMEMBERED if recipe.freeze_oscillations else ()
    return (*average, *oscillations)


def readable(size: int) -> str:
    """A size for people."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6)):
        if size >= factor:
            return f"{size / factor:,.1f} {unit}"
    return f"{size / 1e3:.1f} kB"
