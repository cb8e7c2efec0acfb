"""The training loop: batches in, metrics and checkpoints out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from mecq_cli.errors import EnvironmentFailure, Interrupted
from mecq_cli.events import Listener
from mecq_cli.insertion import QuantizedModel
from mecq_cli.memory import is_out_of_memory, out_of_memory
from mecq_cli.storage import sync_file
from mecq_cli.training import state
from mecq_cli.training.metrics import MetricsLog, cut
from mecq_cli.training.recipe import Recipe, make_optimizer
from mecq_cli.training.signals import SignalWatch
from mecq_cli.training.step import TrainingStep
from mecq_cli.training.teacher import Teacher

Epoch = Callable[[int, int], Iterator[tuple[Tensor, Tensor]]]
"""(epoch, first batch) -> normalised images [N, C, H, W] and labels [N], on the device."""


class Trainer:
    """Trains a quantized network, resumably.

    Args:
        model: calibrated.
        teacher: the FP network, for distillation and as the second view.
        recipe: what to do.
        batches: one epoch of data.
        checkpoints: folder of the checkpoints.
        metrics: the metrics.jsonl.
        checkpoint_every: steps between checkpoints; None: once an epoch.
        keep_checkpoints: how many are kept, the last ones.
        listener: hears of every step.
    """

    def __init__(
        self,
        model: QuantizedModel,
        teacher: Teacher | None,
        recipe: Recipe,
        batches: Epoch,
        *,
        checkpoints: Path,
        metrics: Path,
        checkpoint_every: int | None,
        listener: Listener,
        keep_checkpoints: int = state.KEEP,
    ) -> None:
        self.keep = keep_checkpoints
        self.model, self.recipe, self.batches = model, recipe, batches
        self.checkpoints, self.metrics, self.listener = checkpoints, metrics, listener
        self.every = checkpoint_every or max(recipe.steps_per_epoch, 1)
        self.optimizer, self.schedule = make_optimizer(model, recipe)
        self.step = TrainingStep(model, teacher, recipe, self.optimizer, listener)
        self.progress = state.Progress(0, False, {})

    def resume(self) -> bool:
        """Continue from the newest checkpoint; False where there is none."""
        progress, complaints = state.restore(
            self.checkpoints, self.model, self.optimizer, self.step.regularizer
        )
        for complaint in complaints:
            self.listener.warn(f"{complaint}; the checkpoint before it is used")
        if progress is None:
            return False
        self.progress = progress
        cut(self.metrics, progress.step)
        return True

    def save(self) -> Path:
        """Write a checkpoint of this moment, after the metrics that lead to it."""
        sync_file(self.metrics)
        return state.save(
            self.checkpoints,
            self.model,
            self.optimizer,
            self.step.regularizer,
            self.progress,
            self.keep,
        )

    def train(self, resume_command: str) -> None:
        """Run to the last step.

        Raises:
            NumericError: NaN or Inf; the last checkpoint is good.
            Interrupted: by a signal, after a checkpoint was written.
            EnvironmentFailure: out of memory.
        """
        recipe, progress = self.recipe, self.progress
        if progress.step >= recipe.total_steps:
            return
        self.model.train()
        self.listener.start("train", recipe.total_steps)
        with SignalWatch() as watch, self._log() as log:
            if watch.received:
                self._interrupted(watch.received, resume_command)
            while progress.step < recipe.total_steps:
                epoch, first = divmod(progress.step, recipe.steps_per_epoch)
                for images, labels in self.batches(epoch, first):
                    with _advice(len(labels), resume_command):
                        self._one(images, labels, epoch, log)
                    if watch.received:
                        self._interrupted(watch.received, resume_command)
                    if progress.step >= recipe.total_steps:
                        break
        # What follows takes a while too, and need not be paid for with steps.
        self.save()
        self.listener.finish("train")

    def _log(self) -> MetricsLog:
        """The metrics, written line by line: no checkpoint is ahead of them."""
        return MetricsLog(self.metrics)

    def _one(self, images: Tensor, labels: Tensor, epoch: int, log: MetricsLog) -> None:
        progress = self.progress
        started = time.perf_counter()
        self.schedule.step_update(progress.step)
        losses = self.step(images, labels, progress.step)
        row: dict[str, Any] = {
            "step": progress.step,
            "epoch": epoch,
            "loss": losses.total,
            "loss_task": losses.task,
            "loss_mec": losses.mec,
            "coding_length": losses.coding_lengths,
            "lr": self.optimizer.param_groups[0]["lr"],
            "train_top1": 100.0 * losses.correct / len(labels),
            "seconds": round(time.perf_counter() - started, 4),
        }
        log.write(row)
        progress.step += 1
        self.listener.advance("train", progress.step, row)
        if progress.step % self.every == 0 and progress.step < self.recipe.total_steps:
            self.save()

    def _interrupted(self, number: int, resume_command: str) -> None:
        self.save()
        raise Interrupted(
            f"stopped after step {self.progress.step} of {self.recipe.total_steps}, saved; "
            f"continue with: {resume_command}",
            number,
        )


@contextmanager
def _advice(batch: int, resume_command: str) -> Iterator[None]:
    """Say what to do where a step runs out of memory."""
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        raise EnvironmentFailure(out_of_memory(batch, resume_command)) from error
