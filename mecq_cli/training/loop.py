"""The training loop: batches in, metrics and checkpoints out."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from mecq_cli.distributed import ALONE, Processes
from mecq_cli.errors import EnvironmentFailure, Interrupted
from mecq_cli.events import Listener
from mecq_cli.insertion import QuantizedModel
from mecq_cli.storage import atomic_write
from mecq_cli.training import state
from mecq_cli.training.batch_norm import synchronise
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
        batches: one epoch of data; of several processes, the part of this one.
        checkpoints: folder of the checkpoints.
        metrics: the metrics.jsonl.
        checkpoint_every: steps between checkpoints; None: once an epoch.
        listener: hears of every step.
        processes: which share the work; the first one writes.
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
        processes: Processes = ALONE,
    ) -> None:
        self.model, self.recipe, self.batches = model, recipe, batches
        self.processes = processes
        self.checkpoints, self.metrics, self.listener = checkpoints, metrics, listener
        self.every = checkpoint_every or max(recipe.steps_per_epoch, 1)
        self.optimizer, self.schedule = make_optimizer(model, recipe)
        if processes.count > 1:
            synchronise(model)
        self.step = TrainingStep(model, teacher, recipe, self.optimizer, listener, processes)
        self.progress = state.Progress(0, False, {})
        self._seed = torch.initial_seed()

    def resume(self) -> bool:
        """Continue from the newest checkpoint, which the first process reads; False without one."""
        found = self.processes.from_first(self._restore)
        if found:
            self.share_state()
        return found

    def share_state(self) -> None:
        """All processes take over what the first one has."""
        if self.processes.count == 1:
            return
        regularizer = self.step.regularizer
        everything = (
            dict(self.model.state_dict()),
            self.optimizer.state_dict(),
            regularizer.saved_states(),
            self.progress,
        )
        model, optimizer, entropy, progress = self.processes.broadcast(everything)
        if not self.processes.first:
            self.model.load_state_dict(model)
            self.optimizer.load_state_dict(optimizer)
            regularizer.load_saved_states(entropy)
            self.progress = progress
            self.schedule.step_update(self.progress.step)

    def _restore(self) -> bool:
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

    def save(self) -> None:
        """Write a checkpoint of this moment, in the first process."""
        if self.processes.first:
            state.save(
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
            self._stop_if_asked(watch, resume_command)
            while progress.step < recipe.total_steps:
                epoch, first = divmod(progress.step, recipe.steps_per_epoch)
                asked = time.perf_counter()
                for images, labels in self.batches(epoch, first):
                    self._one(images, labels, epoch, log, time.perf_counter() - asked)
                    self._stop_if_asked(watch, resume_command)
                    if progress.step >= recipe.total_steps:
                        break
                    asked = time.perf_counter()
        # What follows takes a while too, and need not be paid for with steps.
        self.save()
        self.listener.finish("train")

    def _log(self) -> TextIO:
        """The metrics, written line by line: no checkpoint is ahead of them."""
        path = self.metrics if self.processes.first else Path(os.devnull)
        return path.open("a", encoding="utf-8", buffering=1)

    def _one(self, images: Tensor, labels: Tensor, epoch: int, log: TextIO, waited: float) -> None:
        progress = self.progress
        started = time.perf_counter()
        self.schedule.step_update(progress.step)
        if self.processes.count > 1:
            # Dropout draws from numbers of this step and process, whatever was drawn before.
            number = progress.step * self.processes.count + self.processes.rank
            torch.manual_seed(self._seed + number)
        try:
            losses = self.step(images, labels, progress.step)
        except torch.OutOfMemoryError as error:
            raise EnvironmentFailure(_out_of_memory(self.recipe)) from error
        row: dict[str, Any] = {
            "step": progress.step,
            "epoch": epoch,
            "loss": losses.total,
            "loss_task": losses.task,
            "loss_mec": losses.mec,
            "coding_length": losses.coding_lengths,
            "lr": self.optimizer.param_groups[0]["lr"],
            "train_top1": 100.0 * losses.correct / (len(labels) * self.processes.count),
            "seconds": round(time.perf_counter() - started, 4),
            "data_seconds": round(waited, 4),
        }
        log.write(json.dumps(row) + "\n")
        progress.step += 1
        self.listener.advance("train", progress.step, row)
        if progress.step % self.every == 0 and progress.step < self.recipe.total_steps:
            self.save()

    def _stop_if_asked(self, watch: SignalWatch, resume_command: str) -> None:
        """Save and stop, all processes after the same step, whichever of them got a signal."""
        number = self.processes.largest(watch.received)
        if not number:
            return
        self.save()
        # A launcher ends the others as soon as one has left.
        self.processes.wait()
        raise Interrupted(
            f"stopped after step {self.progress.step} of {self.recipe.total_steps}, saved; "
            f"continue with: {resume_command}",
            number,
        )


def _out_of_memory(recipe: Recipe) -> str:
    batch = recipe.batch_size
    return (
        f"out of memory at a batch of {batch} images; try --batch-size {max(batch // 2, 1)} in a "
        "new run (the batch size of a run cannot change), or with --resume "
        f"--accumulate {2 * recipe.accumulate} or another --device"
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
