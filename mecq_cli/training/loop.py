"""The training loop: batches in, metrics and checkpoints out."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mecq_cli.calibration import calibrate
from mecq_cli.distributed import ALONE, Processes
from mecq_cli.errors import EnvironmentFailure, Interrupted
from mecq_cli.events import Listener
from mecq_cli.insertion import QuantizedModel
from mecq_cli.memory import advising
from mecq_cli.sites import ProductSite
from mecq_cli.storage import sync_file
from mecq_cli.tasks.base import Task
from mecq_cli.tasks.registry import CLASSIFICATION
from mecq_cli.training import state
from mecq_cli.training.averaging import WeightAverage
from mecq_cli.training.balance import balanced_weight
from mecq_cli.training.batch_norm import synchronise
from mecq_cli.training.integer_teacher import IntegerTeacher
from mecq_cli.training.lowering import fewest_bits, raise_bits, stages
from mecq_cli.training.metrics import MetricsLog, cut, read_rows
from mecq_cli.training.oscillation import OscillationFreezing
from mecq_cli.training.recipe import Recipe, make_optimizer
from mecq_cli.training.signals import SignalWatch
from mecq_cli.training.step import TrainingStep
from mecq_cli.training.teacher import Teacher
from mecq_cli.training.tracking import EventLog

Epoch = Callable[[int, int], Iterator[tuple[Tensor, Tensor]]]
"""(epoch, first batch) -> normalised images [N, C, H, W] and labels [N], on the device."""


_WEIGHT = "mec_weight"

Images = Callable[[], tuple[Iterable[Tensor], int]]
"""Normalised batches for the grids, and how many they are."""


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
        keep_checkpoints: how many are kept, the last ones.
        events: folder of TensorBoard's event files; None: none are written.
        listener: hears of every step.
        processes: which share the work; the first one writes.
        calibration: for the grids of each stage, where the bits are lowered step by step.
        task: whose loss it is.
        evaluation: the figure that counts, in percent, of the network as it is.
        eval_every: epochs between two of them; 0: none. After the last step there is none either.
    """

    def __init__(
        self,
        model: QuantizedModel,
        teacher: Teacher | IntegerTeacher | None,
        recipe: Recipe,
        batches: Epoch,
        *,
        checkpoints: Path,
        metrics: Path,
        checkpoint_every: int | None,
        listener: Listener,
        keep_checkpoints: int = state.KEEP,
        events: Path | None = None,
        processes: Processes = ALONE,
        calibration: Images | None = None,
        task: Task = CLASSIFICATION,
        evaluation: Callable[[], float] | None = None,
        eval_every: int = 0,
    ) -> None:
        self.keep, self.events = keep_checkpoints, events
        self.model, self.recipe, self.batches = model, recipe, batches
        self.processes = processes
        self.checkpoints, self.metrics, self.listener = checkpoints, metrics, listener
        self.every = checkpoint_every or max(recipe.steps_per_epoch, 1)
        self.evaluation = evaluation if eval_every else None
        self.eval_every = eval_every * recipe.steps_per_epoch
        self.optimizer, self.schedule = make_optimizer(model, recipe)
        if processes.count > 1:
            synchronise(model)
        self.step = TrainingStep(model, teacher, recipe, self.optimizer, listener, processes, task)
        self.progress = state.Progress(0, {})
        self.stages = stages(recipe, fewest_bits(model))
        self.calibration = calibration
        self._follow()
        self._seed = torch.initial_seed()

    def _follow(self) -> None:
        """Begin to average the weights and to watch them, as the recipe wants it."""
        recipe = self.recipe
        self.average = WeightAverage(self.model, recipe.ema) if recipe.ema else None
        self.freezing = (
            OscillationFreezing(self.model, recipe.freeze_oscillations)
            if recipe.freeze_oscillations
            else None
        )
        # Frozen weights are put in their place last, and averaged there.
        self.step.followers = tuple(f for f in (self.freezing, self.average) if f is not None)

    def parts(self) -> Mapping[str, state.Part]:
        """What a checkpoint holds beside the network and the optimizer."""
        parts: dict[str, state.Part] = {"regularizer": self.step.regularizer}
        if self.average is not None:
            parts["average"] = self.average
        if self.freezing is not None:
            parts["oscillations"] = self.freezing
        return parts

    def _enter_stage(self) -> None:
        """Lower the bits where a stage begins at this step."""
        bits = {stage.first_step: stage.bits for stage in self.stages}.get(self.progress.step)
        if bits is None or len(self.stages) == 1:
            return
        raise_bits(self.model, bits)
        for site in self.model.sites():
            if isinstance(site, ProductSite) and site.weight_quantizer is not None:
                site.weight_quantizer.initialize(site.weight)
        assert self.calibration is not None
        trained = self.progress.step > 0
        calibrate(self.model, *self.calibration(), to_be_trained=True, trained=trained)
        self.share_state()
        self.model.train()
        self._follow()
        which = f"at least {bits} bits" if bits else "all bits as they were asked for"
        self.listener.note(f"step {self.progress.step}: {which}")

    def _use_bits_of(self, step: int) -> None:
        """Of the stage that was on when this step's checkpoint was written."""
        raise_bits(self.model, self._bits_at(max(step - 1, 0)))

    def _bits_at(self, step: int) -> int:
        """Of the stage that this step is in."""
        return [stage for stage in self.stages if stage.first_step <= step][-1].bits

    def resume(self) -> bool:
        """Continue from the newest checkpoint, which the first process reads; False without one."""
        found = self.processes.from_first(self._restore)
        if found:
            self.share_state()
            self._use_bits_of(self.progress.step)
            self._weigh()
        return found

    def balance(self, batches: Iterable[tuple[Tensor, Tensor]], share: float) -> float:
        """Find the weight of the regularizer (`balanced_weight`), and remember it."""
        weight = balanced_weight(self.step, batches, share)
        self.progress.facts[_WEIGHT] = weight
        self._weigh()
        return weight

    def _weigh(self) -> None:
        """Use the weight that was found, where one was."""
        weight = self.progress.facts.get(_WEIGHT)
        if weight is not None:
            self.recipe = self.step.recipe = replace(self.recipe, mec_weight=weight)

    def share_state(self) -> None:
        """All processes take over what the first one has."""
        if self.processes.count == 1:
            return
        everything = (
            dict(self.model.state_dict()),
            self.optimizer.state_dict(),
            {name: part.saved_states() for name, part in self.parts().items()},
            self.progress,
        )
        model, optimizer, parts, progress = self.processes.broadcast(everything)
        if not self.processes.first:
            self.model.load_state_dict(model)
            self.optimizer.load_state_dict(optimizer)
            for name, part in self.parts().items():
                part.load_saved_states(parts[name])
            # `train` holds this one.
            self.progress.step, self.progress.facts = progress.step, progress.facts

    def _restore(self) -> bool:
        progress, complaints = state.restore(
            self.checkpoints, self.model, self.optimizer, self.parts()
        )
        for complaint in complaints:
            self.listener.warn(f"{complaint}; the checkpoint before it is used")
        if progress is None:
            return False
        self.progress = progress
        cut(self.metrics, progress.step)
        return True

    def save(self) -> None:
        """Write a checkpoint of this moment, after the metrics; in the first process."""
        if not self.processes.first:
            return
        sync_file(self.metrics)
        state.save(
            self.checkpoints,
            self.model,
            self.optimizer,
            self.parts(),
            self.progress,
            self.keep,
        )

    def train(self, resume_command: str) -> None:
        """Run to the last step.

        Raises:
            NumericError: NaN or Inf; the last checkpoint is good.
            Interrupted: by a signal, after a checkpoint was written.
            EnvironmentFailure: out of memory, or the run folder is gone.
        """
        recipe, progress = self.recipe, self.progress
        if progress.step >= recipe.total_steps:
            self._settle()
            return
        more_parts = 2 * recipe.accumulate
        self.model.train()
        if recipe.compile != "off":
            takes = "about a minute" if recipe.compile == "model" else "some seconds"
            self.listener.note(f"the first step compiles the network, which takes {takes}")
        self.listener.start("train", recipe.total_steps)
        with SignalWatch(self._tell_stop) as watch, self._log() as log, self._event_log() as events:
            self._stop_if_asked(watch, resume_command)
            while progress.step < recipe.total_steps:
                self._enter_stage()
                epoch, first = divmod(progress.step, recipe.steps_per_epoch)
                asked = time.perf_counter()
                for images, labels in self.batches(epoch, first):
                    waited = time.perf_counter() - asked
                    found = self._evaluated()
                    if found:
                        self._stop_if_asked(watch, resume_command)
                    with advising(recipe.batch_size, lambda: resume_command, more_parts):
                        row = self._one(images, labels, epoch, log, waited, found)
                    if events is not None:
                        events.write(row)
                    self._stop_if_asked(watch, resume_command)
                    if progress.step >= recipe.total_steps or self._at_stage():
                        break
                    asked = time.perf_counter()
        self._settle()
        # What follows takes a while too, and need not be paid for with steps.
        self.save()
        self.listener.finish("train")

    def _tell_stop(self) -> None:
        self.listener.note("stopping after this step; a second signal stops at once")

    def _require_folder(self) -> None:
        """Else writing would make it anew, without what was in it."""
        if self.processes.first and not self.metrics.exists():
            raise EnvironmentFailure(
                f"{self.metrics.parent}: the run folder was removed or moved while this run worked "
                "in it; start it again"
            )

    def _at_stage(self) -> bool:
        return any(0 < stage.first_step == self.progress.step for stage in self.stages)

    def _settle(self) -> None:
        """The network is what is kept of it. A second time changes nothing."""
        if self.average is not None:
            self.average.settle()
        if self.freezing is not None:
            self.freezing.settle()
            self.listener.note(
                f"{100 * self.freezing.frozen_share:.1f} % of the weights are frozen"
            )

    def _log(self) -> MetricsLog:
        """The metrics, written line by line: no checkpoint is ahead of them."""
        return MetricsLog(self.metrics if self.processes.first else Path(os.devnull))

    def _event_log(self) -> AbstractContextManager[EventLog | None]:
        """With the steps that were done before, so that the record and the events agree."""
        if self.events is None or not self.processes.first:
            return nullcontext()
        return EventLog(self.events, read_rows(self.metrics))

    def _one(
        self,
        images: Tensor,
        labels: Tensor,
        epoch: int,
        log: MetricsLog,
        waited: float,
        found: Mapping[str, float],
    ) -> dict[str, Any]:
        """One step; returns its row of the metrics, with what was ``found`` before it."""
        progress = self.progress
        started = time.perf_counter()
        self.schedule.step_update(progress.step)
        # Dropout draws from numbers of this step and process, whatever was drawn before: so a run
        # that goes on draws the same.
        number = progress.step * self.processes.count + self.processes.rank
        torch.manual_seed(self._seed + number)
        losses = self.step(images, labels, progress.step)
        row: dict[str, Any] = {
            "step": progress.step,
            "epoch": epoch,
            "loss": losses.total,
            "loss_task": losses.task,
            "loss_mec": losses.mec,
            "coding_length": losses.coding_lengths,
            "lr": self.optimizer.param_groups[0]["lr"],
            self.step.task.figures.train_key: 100.0 * losses.correct / max(losses.counted, 1),
            "seconds": round(time.perf_counter() - started, 4),
            "data_seconds": round(waited, 4),
        }
        row |= found
        log.write(row)
        progress.step += 1
        self.listener.advance("train", progress.step, row)
        if progress.step % self.every == 0:
            self._require_folder()
            if progress.step < self.recipe.total_steps:
                self.save()
        return row

    def _evaluated(self) -> dict[str, float]:
        """What the network reaches before this step, behind the checkpoint of the one before.

        It stands in the row of this step, so that a run that goes on here has it too.
        """
        done = self.progress.step
        if self.evaluation is None or not done or done % self.eval_every:
            return {}
        if self._bits_at(done):
            return {}  # the integer network has the bits that were asked for, and no others yet
        self.model.eval()
        value, of = self.evaluation(), self.step.task.figures
        self.model.train()
        epochs = done // self.recipe.steps_per_epoch
        self.listener.note(f"epoch {epochs}: {of.label} {value:.2f} %")
        return {of.eval_key: value}

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
