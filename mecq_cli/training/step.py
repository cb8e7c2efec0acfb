"""One training step: task loss, distillation, entropy; backward; update."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mecq_cli import integer_conv, loops
from mecq_cli.distributed import ALONE, Processes
from mecq_cli.entropy import EntropyRegularizer
from mecq_cli.errors import NumericError, UsageError
from mecq_cli.events import Listener
from mecq_cli.insertion import QuantizedModel
from mecq_cli.quantizers import WeightQuantizer
from mecq_cli.sites import ProductSite
from mecq_cli.tasks.base import Task
from mecq_cli.tasks.registry import CLASSIFICATION
from mecq_cli.training.accumulation import MicroBatches
from mecq_cli.training.compiling import Compiler
from mecq_cli.training.diagnosis import is_finite, label, not_finite
from mecq_cli.training.integer_teacher import IntegerTeacher
from mecq_cli.training.limits import StepLimit
from mecq_cli.training.memory_order import InMemoryOrder
from mecq_cli.training.recipe import Recipe
from mecq_cli.training.teacher import Teacher


@dataclass(frozen=True)
class Losses:
    """Loss parts of one step, as plain numbers.

    ``total = task + mec_weight * mec``; ``correct`` of the batch's ``counted`` images, or pixels,
    were classified right.
    All of it is of the batch of all processes;
    ``coding_lengths`` are nats by site.
    """

    total: float
    task: float
    mec: float
    correct: int
    counted: int
    coding_lengths: dict[str, float]


class Follower(Protocol):
    """Sees the network after each update."""

    def update(self, progress: float, /) -> None:
        """``progress`` is the share of the steps that is done."""


def on_cpu(model: QuantizedModel) -> bool:
    """Where its parameters are."""
    return all(p.device.type == "cpu" for p in model.parameters())


def _quantized_weights(model: QuantizedModel) -> list[tuple[str, Tensor, WeightQuantizer]]:
    """Those that are trained, each once: layers may share one."""
    found: dict[int, tuple[str, Tensor, WeightQuantizer]] = {}
    for site in model.sites():
        if not isinstance(site, ProductSite) or site.weight_quantizer is None:
            continue
        if site.weight.requires_grad:
            found.setdefault(id(site.weight), (site.name, site.weight, site.weight_quantizer))
    return list(found.values())


@contextmanager
def _told_of_single_values() -> Iterator[None]:
    """Batch norm of one image whose maps are 1 x 1 has no variance; PyTorch says so in its words.

    Raises:
        UsageError: it is so.
    """
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise UsageError(
            "batch norm cannot be trained on one image where its maps are 1 x 1, and so small are "
            "the parts of a batch; give a smaller --accumulate, a larger --batch-size or "
            "--img-size, or fewer processes"
        ) from error


def numbers(values: Sequence[Tensor | float]) -> list[float]:
    """Tensors of one number each, and numbers, as numbers: the device is waited for once."""
    tensors = [v.detach().double() for v in values if isinstance(v, Tensor)]
    place = next((t.device for t in tensors if t.device.type != "cpu"), None)
    read = iter(torch.stack([t.to(place) for t in tensors]).tolist() if tensors else [])
    return [next(read) if isinstance(v, Tensor) else float(v) for v in values]


class TrainingStep:
    """Computes the loss and updates the network.

    Attributes:
        followers: told after each update.

    Args:
        model: in training mode.
        teacher: the FP network whose logits are distilled and whose features are the other view;
            None where neither is wanted.
        recipe: weights of the loss parts.
        optimizer: of the model's parameters.
        listener: hears of a compiler that is missing.
        processes: which share the batch.
        task: whose loss it is.
    """

    def __init__(
        self,
        model: QuantizedModel,
        teacher: Teacher | IntegerTeacher | None,
        recipe: Recipe,
        optimizer: torch.optim.Optimizer,
        listener: Listener,
        processes: Processes = ALONE,
        task: Task = CLASSIFICATION,
    ) -> None:
        self.task = task
        self.model, self.recipe, self.optimizer = model, recipe, optimizer
        self.processes = processes
        self.teacher: Callable[[Tensor], tuple[Tensor, ...]] | None = (
            teacher if recipe.has_teacher else None
        )
        self.regularizer = EntropyRegularizer(recipe.mec)
        self.followers: tuple[Follower, ...] = ()
        self.limit = StepLimit(model, optimizer)
        self.order = InMemoryOrder(optimizer)
        self.weights = _quantized_weights(model) if "weights" in recipe.mec_on else []
        self.run: Callable[[Tensor], tuple[Tensor, ...]] = model.graph
        compiler = Compiler(listener)
        if recipe.compile == "model":
            if on_cpu(model) and integer_conv.is_available():
                model.convolve_integers()
            if recipe.bf16 and on_cpu(model) and loops.is_available():
                model.use_loops()
            self.run = compiler.compiled(model.graph)
            if isinstance(self.teacher, Teacher):
                self.teacher = compiler.compiled(self.teacher)
        elif recipe.compile == "quantizers":
            compiler.quantizers(model)
        if recipe.accumulate > 1 or processes.count > 1:
            parts = MicroBatches(model.graph, self.run, recipe.accumulate)
            self.run = processes.data_parallel(parts)
            if teacher is not None and self.teacher is not None:
                self.teacher = MicroBatches(teacher, self.teacher, recipe.accumulate)

    def __call__(self, images: Tensor, labels: Tensor, step: int) -> Losses:
        """Train on one batch.

        Args:
            images: normalised, float32 [N, C, H, W]; of several processes, this one's part.
            labels: int64 [N], or what else the task has.
            step: number of the step, from 0.

        Raises:
            NumericError: the loss or a gradient is not finite; nothing was updated.
        """
        logits, task, mec, lengths = self.losses(images, labels, step)
        total = task + self.recipe.mec_weight * mec
        losses = self._read((total, task, mec), self.task.counts(logits, labels), lengths)
        if not all(math.isfinite(v) for v in (losses.total, losses.task, losses.mec)):
            raise NumericError(
                f"step {step}: the loss is not finite (total {losses.total}, task {losses.task}, "
                f"entropy {losses.mec}), {self._cause(images)}; nothing was updated; "
                "try a smaller --lr"
            )
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        self._check_gradients(step)
        with self.limit, self.order:
            self.optimizer.step()
        self.model.project()
        for follower in self.followers:
            follower.update((step + 1) / max(self.recipe.total_steps, 1))
        return losses

    def losses(
        self, images: Tensor, labels: Tensor, step: int
    ) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """Logits, the loss of the task, the entropy term, and coding lengths by site in nats."""
        device = images.device.type
        target, other = None, None
        with torch.autocast(device, torch.bfloat16, enabled=self.recipe.bf16):
            if self.teacher is not None:
                with torch.no_grad():
                    target, *other = self.teacher(images)
            with _told_of_single_values():
                logits, *features = self.run(images)
        logits = logits.float()
        task = self._task(logits, target, labels)
        return logits, task, *self._entropy(features, other, step)

    def _read(
        self,
        parts: Sequence[Tensor],
        counts: Sequence[Tensor | int],
        lengths: Mapping[str, Tensor],
    ) -> Losses:
        """As plain numbers; losses and counts of all processes.

        So all of these see a loss that is not finite before the first waits for the gradients.
        """
        found = numbers([*parts, *counts, *lengths.values()])
        *sums, hits, counted = self.processes.sums(found[:5])
        total, task, mec = (value / self.processes.count for value in sums)
        own = dict(zip(lengths, found[5:], strict=True))
        return Losses(total, task, mec, int(hits), int(counted), own)

    def _entropy(
        self, features: Sequence[Tensor], other: Sequence[Tensor] | None, step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The entropy term, and the coding length of each site in nats."""
        if self.recipe.mec_weight == 0:
            return torch.zeros(()), {}
        names = self.model.taps
        sites = dict(zip(names, features, strict=True))
        reference = None
        if self.recipe.has_two_views and other is not None:
            reference = dict(zip(names, other, strict=True))
        for name, weight, quantizer in self.weights:
            sites[f"{name}.weight"] = quantizer(weight).flatten(1)
        term = self.regularizer(sites, reference, step / max(self.recipe.total_steps, 1))
        return term.loss, term.coding_lengths

    def _task(self, logits: Tensor, target: Tensor | None, labels: Tensor) -> Tensor:
        cross_entropy = self.task.loss(logits, labels)
        if target is None or self.recipe.distill_weight == 0:
            return cross_entropy
        t, share = self.recipe.distill_temperature, self.recipe.distill_weight
        return (1 - share) * cross_entropy + share * self.task.divergence(logits, target.float(), t)

    def _cause(self, images: Tensor) -> str:
        """Where a loss that is not finite comes from."""
        if self.processes.count > 1:  # where one process looks, it would wait for the others
            return "in one of the processes"
        return not_finite(self.model, images)

    def _check_gradients(self, step: int) -> None:
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norms = torch._foreach_norm(gradients)
        if bool(torch.isfinite(torch.stack(list(norms)).sum())):
            return
        for name, p in self.model.named_parameters():
            if p.grad is not None and not is_finite(p.grad):
                raise NumericError(
                    f"step {step}: the gradient of {label(name)} is not finite; nothing was "
                    "updated; try a smaller --lr"
                )
