"""DoReFa (Zhou et al., arXiv 1606.06160): weights through tanh, activations on a fixed range.

Weights: t = tanh(w) / max|tanh(w)| over the layer is brought to 2^b equally spaced levels from -1
to 1: the odd integers from -(2^b - 1) to 2^b - 1, a grid without zero. At 1 bit sign(w) mean|w|,
with the gradient straight through to w. Activations: clipped to a fixed range and rounded.

The paper trains from nothing, here a pretrained network is the start. Departures:

* Quantized weights are multiplied by a fixed factor per output channel, the one with the least
  squared error to the FP weights at the start. The paper has weights from -1 to 1, which would be
  of another size than those that the network knows. At 1 bit the mean is that of an output channel,
  not of the layer.
* The range of activations, [0, 1] in the paper, is found by calibration as LSQ's first step is. It
  has a zero point where there are negative values. It is not learned.
* At 7 and 8 bits weights are rounded to -(2^(b-1) - 1) ... 2^(b-1) - 1, which holds zero: the
  integers of the other grid would leave int8. The paper leaves layers of so many bits in float.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mecq_cli.integer.ir import MID_RISE_BITS
from mecq_cli.quantizers.base import WeightQuantizer
from mecq_cli.quantizers.rounding import fake_quantize, straight_through, to_integers
from mecq_cli.quantizers.uniform import UniformActivation, per_channel

_SMALLEST = 1e-8
"""Of a step: rows of zeros have one too."""


class DorefaWeight(WeightQuantizer):
    """Equally spaced levels of tanh(w), times a fixed factor per output channel.

    Attributes:
        top: the largest integer of the grid.
        scale: the step, float32 [O]; at 1 bit it follows the weight instead.
    """

    scale: Tensor

    def __init__(self, bits: int, channels: int) -> None:
        super().__init__(bits, channels)
        self.mid_rise = bits == 1 or bits in MID_RISE_BITS
        self.top = 2**bits - 1 if self.mid_rise else 2 ** (bits - 1) - 1
        self.register_buffer("scale", torch.ones(channels))

    def initialize(self, weight: Tensor) -> None:
        """The factors that bring the first quantized weight nearest to the FP weight [O, ...]."""
        w = weight.detach().float().flatten(1)
        q = self._rounded(self._spread(weight.detach())).flatten(1)
        fit = (w * q).sum(1) / q.square().sum(1).clamp_min(1.0)
        self.scale.copy_(fit.clamp_min(_SMALLEST))

    def steps(self, weight: Tensor) -> Tensor:
        """The fixed ones; at 1 bit the mean |w| of each channel."""
        if self.bits > 1:
            return self.scale
        return weight.detach().float().abs().flatten(1).mean(1).clamp_min(_SMALLEST)

    def forward(self, weight: Tensor) -> Tensor:
        """Weight [O, ...] on its grid, same shape and dtype."""
        if not self.active:
            return weight
        step = per_channel(self.steps(weight), weight)
        spread = self._spread(weight)
        value = self._rounded(spread) * step
        surrogate = weight.float() if self.bits == 1 else spread * step
        return straight_through(value, surrogate).to(weight.dtype)

    def integers(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """int8 weight [O, ...] and float32 step [O]."""
        q = self._rounded(self._spread(weight.detach()))
        return q.to(torch.int8), self.steps(weight).clone()

    def _spread(self, weight: Tensor) -> Tensor:
        """Before rounding, from -top to top: the sign decides at 1 bit, so tanh has no part."""
        if self.bits == 1:
            return weight.float()
        bent = torch.tanh(weight.float())
        spread: Tensor = bent / bent.abs().amax().clamp_min(_SMALLEST) * self.top
        return spread

    def _rounded(self, spread: Tensor) -> Tensor:
        v = spread.detach()
        return to_integers(v, torch.clamp(v, -self.top, self.top), self.mid_rise)


class DorefaActivation(UniformActivation):
    """Grid [0, 2^b - 1] with a fixed step and zero point."""

    scale: Tensor

    def __init__(self, bits: int, *, power_of_two: bool = False) -> None:
        super().__init__(bits, power_of_two=power_of_two)
        self.register_buffer("scale", torch.ones(()))

    def begin(self, scale: float) -> None:
        """Make this the step."""
        self.scale.fill_(scale)

    def learned_scale(self) -> Tensor:
        """The step."""
        return self.scale

    def forward(self, x: Tensor) -> Tensor:
        """Real values on the grid, same shape and dtype as x."""
        if not self.active:
            return x
        low, high = self.ends
        return fake_quantize(x, self.effective_scale(), low, high, 1.0, kernels=self.kernels)
