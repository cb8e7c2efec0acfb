"""What a training will take: a step of a few images is measured, and the rest is computed."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mecq_cli.config import QuantizeConfig
from mecq_cli.events import Listener
from mecq_cli.models.loading import LoadedModel
from mecq_cli.training.recipe import Recipe
from mecq_cli.workflow.bench_train import qat_step, timed
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
    Memory is what autograd keeps of an image, times the images of a micro-batch, and the copies of
    the weights, and what the process has already.

    Args:
        loaded: the float model, which stays as it is.
        config, recipe, device: of the training.
        processes: that share it.
        image_bytes: of the decoded images that stay in memory.
        listener: hears of it.

    Returns:
        measured_images, step_seconds (of a whole batch), training_seconds, activation_bytes,
        weight_bytes, image_bytes, process_bytes, memory_bytes (their sum), available_bytes (None
        where the system does not tell).
    """
    shape = loaded.preprocessing.input_size
    per_step = -(-recipe.batch_size // processes)
    together = -(-per_step // recipe.accumulate)
    images = max(min(MEASURED_VALUES // (shape[0] * shape[1] * shape[2]), together), 2)
    listener.note(f"a training step of {images} images is measured")
    before = _resident()
    plain = replace(recipe, batch_size=images, accumulate=1, compile="off")
    x = torch.rand(images, *shape).to(device, memory_format=torch.channels_last)
    y = torch.arange(images, device=device) % loaded.num_classes
    step = qat_step(_copy(loaded), x, y, config, plain, Listener())
    kept = _Kept()
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda tensor: tensor):
        step()
    seconds = min(timed(step, device) for _ in range(2)) * per_step / images
    if recipe.accumulate > 1:
        seconds *= 4 / 3  # each part runs forward once more
    weights = sum(p.numel() * p.element_size() for p in loaded.module.parameters())
    needs = {
        "activation_bytes": kept.bytes * together // images,
        "weight_bytes": weights * (_COPIES[recipe.optimizer] + bool(recipe.distill_weight)),
        "image_bytes": image_bytes,
        "process_bytes": before if device.type == "cpu" else 0,
    }
    return {
        "measured_images": images,
        "step_seconds": seconds,
        "training_seconds": seconds * recipe.total_steps,
        **needs,
        "memory_bytes": sum(needs.values()),
        "available_bytes": available_memory(device),
    }


def _copy(loaded: LoadedModel) -> LoadedModel:
    return replace(loaded, module=copy.deepcopy(loaded.module))


class _Kept:
    """The bytes of all storages that autograd keeps for a backward pass."""

    def __init__(self) -> None:
        self._seen: set[int] = set()
        self.bytes = 0

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if not isinstance(tensor, torch.nn.Parameter) and storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self.bytes += storage.nbytes()
        return tensor


def _resident() -> int:
    """Bytes of memory of this process; 0 where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    return pages * 4096
