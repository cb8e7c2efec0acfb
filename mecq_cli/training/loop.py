"""The training loop: batches in, metrics and checkpoints out."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from mecq_cli.errors import EnvironmentFailure, Interrupted
from mecq_cli.events import Listener
from mecq_cli.insertion import QuantizedModel
from mecq_cli.storage import atomic_write
from mecq_cli.training import state
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
    ) -> None:
        self.model, self.recipe, self.batches = model, recipe, batches
        self.checkpoints, self.metrics, self.listener = checkpoints, metrics, listener
        self.every = checkpoint_every or max(recipe.steps_per_epoch, 1)
        self.optimizer, self.schedule = make_optimizer(model, recipe)
        self.step = TrainingStep(model, teacher, recipe, self.optimizer, listener)
        self.progress = state.Progress(0, False, {})

    def resume(self) -> bool:
        """Continue from the newest checkpoint; False where there is none."""
        regularizer = self.step.regularizer
        progress, complaints = state.restore(
            self.checkpoints, self.model, self.optimizer, self.schedule, regularizer
        )
        for complaint in complaints:
            self.listener.warn(f"{complaint}; the checkpoint before it is used")
        if progress is None:
            return False
        self.progress = progress
        _cut_metrics(self.metrics, progress.step)
        return True

    def save(self) -> Path:
        """Write a checkpoint of this moment."""
        return state.save(
            self.checkpoints, self.model, self.optimizer, self.step.regularizer, self.progress
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
                asked = time.perf_counter()
                for images, labels in self.batches(epoch, first):
                    self._one(images, labels, epoch, log, time.perf_counter() - asked)
                    if watch.received:
                        self._interrupted(watch.received, resume_command)
                    if progress.step >= recipe.total_steps:
                        break
                    asked = time.perf_counter()
        # What follows takes a while too, and need not be paid for with steps.
        self.save()
        self.listener.finish("train")

    def _log(self) -> TextIO:
        """The metrics, written line by line: no checkpoint is ahead of them."""
        return self.metrics.open("a", encoding="utf-8", buffering=1)

    def _one(self, images: Tensor, labels: Tensor, epoch: int, log: TextIO, waited: float) -> None:
        progress = self.progress
        started = time.perf_counter()
        self.schedule.step_update(progress.step)
        try:
            losses = self.step(images, labels, progress.step)
        except torch.OutOfMemoryError as error:
            raise EnvironmentFailure(_out_of_memory(len(labels))) from error
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
            "data_seconds": round(waited, 4),
        }
        log.write(json.dumps(row) + "\n")
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


def _out_of_memory(batch: int) -> str:
    return (
        f"out of memory at a batch of {batch} images; try --batch-size {max(batch // 2, 1)} in a "
        "new run (the batch size of a run cannot change), or another --device with --resume"
    )


def _cut_metrics(path: Path, step: int) -> None:
    """Forget rows after the checkpoint: those steps are done again."""
    if not path.exists():
        return
    kept: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue  # the last line of a killed process
        if row["step"] < step:
            kept.append(line)
    atomic_write(path, "".join(line + "\n" for line in kept).encode(), force=True)
