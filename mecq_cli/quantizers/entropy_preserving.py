"""Weights whose levels are used alike: the entropy-preserving regularization of N2UQ.

Liu et al., arXiv 2111.14826, section 3.3: a weight is divided by its mean magnitude before it is
rounded, times a factor such that weights spread evenly would fall on all 2^b levels equally often.
On the grid without zero, -(2^b - 1), ..., -1, 1, ..., 2^b - 1, that is a step of

    s = mean|w| / 2^(b-1)

for each output channel, which follows the weights and is not learned; at 1 bit sign(w) mean|w|.

Departures: the paper's mean is that of a layer, not of an output channel. The step is a constant to
the gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mecq_cli.integer.ir import MID_RISE_BITS
from mecq_cli.quantizers.base import WeightQuantizer
from mecq_cli.quantizers.rounding import fake_quantize, to_integers, units
from mecq_cli.quantizers.uniform import per_channel

_SMALLEST = 1e-8


def has_grid_without_zero(bits: int) -> bool:
    """Whether weights of so many bits can be on one."""
    return bits == 1 or bits in MID_RISE_BITS


class EntropyPreservingWeight(WeightQuantizer):
    """Grid -(2^b - 1), ..., -1, 1, ..., 2^b - 1 for 1 to 6 bits; nothing is learned but the weight.

    Attributes:
        qmax: the end of the grid.
    """

    def __init__(self, bits: int, channels: int) -> None:
        super().__init__(bits, channels)
        if not has_grid_without_zero(bits):
            raise ValueError(f"a grid without zero has 1 to {max(MID_RISE_BITS)} bits, not {bits}")
        self.mid_rise = True
        self.qmax = 2**bits - 1

    def initialize(self, weight: Tensor) -> None:
        """Nothing to do: the step follows the weight [O, ...]."""

    def steps(self, weight: Tensor) -> Tensor:
        """Float32 [O]."""
        mean = weight.detach().float().abs().flatten(1).mean(1)
        step: Tensor = mean / 2 ** (self.bits - 1)
        return step.clamp_min(_SMALLEST)

    def forward(self, weight: Tensor) -> Tensor:
        """Weight [O, ...] on its grid, same shape and dtype."""
        if not self.active:
            return weight
        step = per_channel(self.steps(weight), weight)
        return fake_quantize(weight, step, -self.qmax, self.qmax, 1.0, True, self.kernels)

    def integers(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """int8 weight [O, ...] and float32 step [O]."""
        steps = self.steps(weight)
        v = units(weight.detach(), per_channel(steps, weight))
        q = to_integers(v, torch.clamp(v, -self.qmax, self.qmax), mid_rise=True)
        return q.to(torch.int8), steps.clone()
