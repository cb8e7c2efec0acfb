"""TensorBoard: the metrics as event files, in RUN/tensorboard.

metrics.jsonl is the record, and the events are a view of it. So a run that is continued writes them
anew from its record, up to the step it continues at: each step is there once, whatever was lost
between the last flush and a kill, and also those before logging was asked for.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from mecq_cli.errors import EnvironmentFailure
from mecq_cli.storage import write_failure
from mecq_cli.tasks.figures import FIGURES, figures_of

_TAGS = {
    "loss": "loss/total",
    "loss_task": "loss/task",
    "loss_mec": "loss/entropy",
    **{of.train_key: f"accuracy/{of.train_key}" for of in FIGURES.values()},
    **{of.eval_key: f"accuracy/{of.eval_key}" for of in FIGURES.values()},
    "lr": "schedule/lr",
    "epoch": "schedule/epoch",
    "seconds": "time/step_seconds",
    "data_seconds": "time/data_seconds",
}
"""Of a row of metrics.jsonl: its keys, and what they are called in TensorBoard."""

_FLUSH_SECONDS = 10


def require() -> None:
    """Check that events can be written.

    Raises:
        EnvironmentFailure: tensorboard is missing.
    """
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise EnvironmentFailure(
            "--log tensorboard: tensorboard is not installed; pip install 'mecq[tracking]'"
        ) from error


class EventLog:
    """Writes rows as events. Used as a context manager.

    Args:
        folder: of the event files.
        rows: of the steps before, which replace whatever the folder holds.

    Raises:
        EnvironmentFailure: tensorboard is missing, or the disk refuses; so do all methods.
    """

    def __init__(self, folder: Path, rows: Sequence[Mapping[str, Any]] = ()) -> None:
        require()
        from torch.utils.tensorboard import SummaryWriter

        self.folder = folder
        try:
            if folder.is_dir() and not folder.is_symlink():
                shutil.rmtree(folder)
            self._writer = SummaryWriter(str(folder), flush_secs=_FLUSH_SECONDS)
        except OSError as error:
            raise write_failure(folder, error) from error
        # As if they had been done without a pause, up to now.
        moment = time.time() - sum(_duration(row) for row in rows)
        for row in rows:
            moment += _duration(row)
            self.write(row, moment)

    def write(self, row: Mapping[str, Any], moment: float | None = None) -> None:
        """One step. Steps count from 1, as those that are done."""
        step = int(row["step"]) + 1
        lengths = row.get("coding_length") or {}
        values = {tag: row.get(key) for key, tag in _TAGS.items()}
        values |= {f"coding_length/{site}": value for site, value in lengths.items()}
        self._add({tag: v for tag, v in values.items() if v is not None}, step, moment)

    def _add(self, values: Mapping[str, float], step: int, moment: float | None) -> None:
        try:
            for tag, value in values.items():
                self._writer.add_scalar(tag, value, step, walltime=moment)
        except OSError as error:
            raise write_failure(self.folder, error) from error

    def __enter__(self) -> EventLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        try:
            self._writer.close()
        except OSError as failure:
            if error is None:
                raise write_failure(self.folder, failure) from failure


def write_results(
    folder: Path, summary: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]
) -> None:
    """Accuracies at the end of a run, beside the events of its training.

    Args:
        folder: of the event files; where there are none, those of ``rows`` are written first.
        summary: with steps and the figures of its task (fp_top1, simulator_top1, top1).
        rows: of metrics.jsonl.

    Raises:
        EnvironmentFailure: as `EventLog`.
    """
    if not folder.is_dir():
        with EventLog(folder, rows):
            pass
    from torch.utils.tensorboard import SummaryWriter

    try:
        writer = SummaryWriter(str(folder), filename_suffix=".results")
        main = figures_of(summary).key
        for key in (f"fp_{main}", f"simulator_{main}", main):
            writer.add_scalar(f"accuracy/{key}", summary[key], summary["steps"])
        writer.close()
    except OSError as error:
        raise write_failure(folder, error) from error


def _duration(row: Mapping[str, Any]) -> float:
    return float(row.get("seconds") or 0.0) + float(row.get("data_seconds") or 0.0)
