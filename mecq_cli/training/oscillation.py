"""Weights that keep jumping between two levels are frozen on the one they are on more often.

Nagel et al., *Overcoming Oscillations in Quantization-Aware Training* (arXiv 2203.11086), section
4.3. A weight's integer oscillates at a step where it changes, and against the direction of its last
change. Its frequency f is a moving average of that, with momentum m; where f exceeds a threshold,
which falls along a cosine (section 4.3, "annealing"), the weight is set to the nearest level of the
moving average of its integers and never changes again. It matters most in depthwise layers, of
which each output depends on a few weights only.

Departures: the latent weight of a frozen one follows its step, which is still learned, so that the
integer stays. Weights of more than `MOST_BITS` bits are not watched: their steps are smaller than
an update, so that integers go back and forth as the weights do, and freezing those would only stop
what is still learning.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mecq_cli.errors import UsageError
from mecq_cli.quantizers import Quantizers, UniformWeight
from mecq_cli.sites import ProductSite

MOMENTUM = 0.01
"""Of frequency and mean integer: about a hundred steps count."""

START = 4.0
"""The threshold begins at so many times its final value, before which little is decided."""

MOST_BITS = 4
"""The paper freezes weights of 3 and 4 bits."""

REMEMBERED = (1, 1, 4, 4, 1)
"""Bytes a checkpoint holds of each weight, tensor by tensor (`_Weight.tensors`)."""


class _Weight:
    """What is remembered of one weight tensor."""

    def __init__(self, weight: Tensor, quantizer: UniformWeight) -> None:
        self.weight, self.quantizer = weight, quantizer
        integers, _ = quantizer.integers(weight)
        self.integers = integers
        weight = weight.detach()
        self.direction = torch.zeros_like(integers)
        self.frequency = torch.zeros_like(weight, dtype=torch.float32)
        self.mean = integers.float()
        self.frozen = torch.zeros_like(weight, dtype=torch.bool)

    def tensors(self) -> dict[str, Tensor]:
        names = ("integers", "direction", "frequency", "mean", "frozen")
        return {name: getattr(self, name) for name in names}

    def update(self, threshold: float) -> None:
        integers, _ = self.quantizer.integers(self.weight)
        change = torch.sign(integers - self.integers)
        moved = change != 0
        back = moved & (change == -self.direction)
        self.direction = torch.where(moved, change, self.direction)
        self.frequency.lerp_(back.float(), MOMENTUM)
        # Of a frozen one it is the level: what the optimizer makes of it before it is put back
        # must not move that.
        mean = self.mean.lerp(integers.float(), MOMENTUM)
        self.mean = torch.where(self.frozen, self.mean, mean)
        self.integers = integers
        fresh = (self.frequency > threshold) & ~self.frozen
        self.mean = torch.where(fresh, self._level(self.mean), self.mean)
        self.frozen |= fresh
        self.hold()

    def hold(self) -> None:
        """Put the frozen ones back on their level."""
        step = self.quantizer.steps(self.weight).detach()
        held = self._level(self.mean) * step.reshape(-1, *[1] * (self.weight.dim() - 1))
        self.weight.copy_(torch.where(self.frozen, held.to(self.weight.dtype), self.weight))

    def _level(self, mean: Tensor) -> Tensor:
        nearest = 2.0 * torch.floor(mean / 2) + 1.0 if self.quantizer.mid_rise else mean.round()
        return nearest.clamp(self.quantizer.qmin, self.quantizer.qmax)


class OscillationFreezing:
    """Watches the weights of a network after each update.

    Args:
        model: calibrated; weights whose integers are not w / step rounded are left alone, and those
            of more than `MOST_BITS` bits.
        threshold: final frequency above which a weight is frozen, such as 0.02.
    """

    def __init__(self, model: nn.Module, threshold: float) -> None:
        self.threshold = threshold
        self._weights = dict(_watched(model))

    @property
    def frozen_share(self) -> float:
        """Of all the weights that are watched."""
        total = sum(w.frozen.numel() for w in self._weights.values())
        return sum(int(w.frozen.sum()) for w in self._weights.values()) / max(total, 1)

    @torch.no_grad()
    def update(self, progress: float) -> None:
        """After an update of the parameters; ``progress`` is the share of all steps."""
        falling = 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))
        threshold = self.threshold * (1.0 + (START - 1.0) * falling)
        for weight in self._weights.values():
            weight.update(threshold)

    @torch.no_grad()
    def settle(self) -> None:
        """Whatever moved them meanwhile, such as an average: the frozen ones are on their level."""
        for weight in self._weights.values():
            weight.hold()

    def saved_states(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {name: weight.tensors() for name, weight in self._weights.items()}

    def load_saved_states(self, state: dict[str, Any]) -> None:
        """Go on from `saved_states`."""
        if state.keys() != self._weights.keys():
            raise ValueError("these are the oscillations of another network")
        for name, weight in self._weights.items():
            for key, value in weight.tensors().items():
                if state[name][key].shape != value.shape:
                    raise ValueError(f"{name}: {key} is of another shape")
                setattr(weight, key, state[name][key].to(value.device).clone())


def can_freeze(quantizers: Quantizers) -> bool:
    """Whether weights of these are watched: those on a grid of equal steps."""
    return isinstance(quantizers.weight(4, 1), UniformWeight)


def require_freezing(model: nn.Module) -> None:
    """Whether there is something to freeze, where somebody asks for it.

    Raises:
        UsageError: its quantizers have no such weights.
    """
    if next(_watched(model), None) is None:
        raise UsageError(
            f"--freeze-oscillations: no weight of this network is on a grid of equal steps of "
            f"{MOST_BITS} bits or fewer; leave it out, or give fewer bits or another --quantizer"
        )


def _watched(model: nn.Module) -> Iterator[tuple[str, _Weight]]:
    seen: set[tuple[int, int]] = set()
    for module in model.modules():
        if not isinstance(module, ProductSite):
            continue
        quantizer = module.weight_quantizer
        if isinstance(quantizer, UniformWeight) and quantizer.bits <= MOST_BITS:
            both = (id(module.weight), id(quantizer))
            if both not in seen:  # else it is shared with a layer before
                seen.add(both)
                yield module.name, _Weight(module.weight, quantizer)
