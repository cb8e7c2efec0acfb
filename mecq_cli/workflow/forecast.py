"""What a training will take: a step of a few images is measured, and the rest is computed."""

from __future__ import annotations

import copy
import gc
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from mecq_cli.config import QuantizeConfig
from mecq_cli.events import Listener
from mecq_cli.models.loading import LoadedModel
from mecq_cli.tasks.registry import task_of
from mecq_cli.training.recipe import Recipe
from mecq_cli.workflow.bench_train import memory_now, memory_peak, qat_step, timed
from mecq_cli.workflow.machine import available_memory

MEASURED_VALUES = 500_000
"""Input values of the measured batch: three images of 224 pixels, or all of a batch of CIFAR's."""
_COPIES = {"sgd": 3, "adamw": 4}
"""Of the weights: themselves, gradients, and what the optimizer remembers."""


def forecast(
    loaded: LoadedModel,
    config: QuantizeConfig,
    recipe: Recipe,
    device: torch.device,
    processes: int,
    image_bytes: int,
    listener: Listener,
) -> dict[str, Any]:
    """Seconds and bytes of a training, from one step of the whole recipe on random images.

    Time is proportional to the images of a step, which makes it too long for small networks.
    Memory is what the measured step took at its peak (at least what its forward pass keeps), times
    the images of a micro-batch, with the copies of the weights, the images that stay decoded, and
    what the process has already. A whole run takes more: evaluation has batches of its own, the
    allocator keeps what it had (ResNet-20, batches of 32: 0.98 GB foretold, 1.33 GB at the peak).

    Args:
        loaded: the float model, which stays as it is.
        config, recipe, device: of the training.
        processes: that share it.
        image_bytes: of the decoded images that stay in memory.
        listener: hears of it.

    Returns:
        measured_images, step_seconds (of a whole batch), training_seconds, batch_bytes,
        weight_bytes, image_bytes, process_bytes, memory_bytes (their sum), available_bytes (None
        where the system does not tell).
    """
    shape = loaded.preprocessing.input_size
    per_step = -(-recipe.batch_size // processes)
    together = -(-per_step // recipe.accumulate)
    images = max(min(MEASURED_VALUES // (shape[0] * shape[1] * shape[2]), together), 2)
    listener.note(f"a training step of {images} images is measured")
    before = memory_now(device)
    plain = replace(recipe, batch_size=images, accumulate=1, compile="off")
    x = torch.rand(images, *shape).to(device, memory_format=torch.channels_last)
    task = task_of(loaded)
    y = task.some_labels(images, loaded.num_classes, shape[1:], device)
    step = qat_step(_copy(loaded), x, y, config, plain, Listener())
    kept = _Kept()
    with kept:
        step()
    seconds = min(timed(step, device) for _ in range(2)) * per_step / images
    if recipe.accumulate > 1:
        seconds *= 4 / 3  # each part runs forward once more
    weights = sum(p.numel() * p.element_size() for p in loaded.module.parameters())
    weights *= _COPIES[recipe.optimizer] + bool(recipe.distill_weight)
    # What the process had and gave back before the step may have been enough for it.
    taken = max(memory_peak(device) - before - weights, kept.bytes)
    needs = {
        "batch_bytes": taken * together // images,
        "weight_bytes": weights,
        # Decoded images stay in the computer's memory.
        "image_bytes": image_bytes if device.type == "cpu" else 0,
        "process_bytes": before,
    }
    del step, x, y  # what was measured is free again
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
    return {
        "measured_images": images,
        "step_seconds": seconds,
        "training_seconds": seconds * recipe.total_steps,
        **needs,
        "memory_bytes": sum(needs.values()),
        "available_bytes": available_memory(device),
    }


class _Kept(saved_tensors_hooks):
    """Counts the bytes that a forward pass keeps for the backward pass, those of weights included.

    Attributes:
        bytes: of all storages, each counted once.
    """

    def __init__(self) -> None:
        self.bytes = 0
        self._seen: set[int] = set()
        super().__init__(self._keep, lambda tensor: tensor)

    def _keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self.bytes += storage.nbytes()
        return tensor


def _copy(loaded: LoadedModel) -> LoadedModel:
    return replace(loaded, module=copy.deepcopy(loaded.module))
