"""LSQ: learned step size quantization (Esser et al., arXiv 1902.08153).

Departures: the gradient of the step is scaled by 1/(sqrt(N) Qp) instead of 1/sqrt(N Qp): a
clipped value contributes qmax to it, which drives the steps of 8-bit layers, with their large
qmax, far off within a few updates. The first step minimises the squared rounding error instead
of 2<|v|>/sqrt(Qp) (at 1 bit it is mean|w|, the optimum in closed form). Activations with
negative values have an integer zero point inside the grid, so that a padded zero stays exactly
zero.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from mecq_cli.loops import Rounding
from mecq_cli.quantizers.rounding import ENDS_SOFTLY, fake_quantize
from mecq_cli.quantizers.uniform import UniformActivation, UniformWeight, per_channel


class LsqWeight(UniformWeight):
    """Signed grid [-2^(b-1), 2^(b-1) - 1]; at 1 bit {-1, +1}. One step per output channel."""

    def forward(self, weight: Tensor) -> Tensor:
        """Weight [O, ...] on its grid, same shape and dtype."""
        if not self.active:
            return weight
        return fake_quantize(
            weight,
            per_channel(self.steps(weight), weight),
            self.qmin,
            self.qmax,
            1.0 / (math.sqrt(weight[0].numel()) * self.qmax),
            self.mid_rise,
            self.kernels,
        )


class LsqActivation(UniformActivation):
    """Grid [0, 2^b - 1] with an integer zero point, which is 0 for non-negative values.

    Attributes:
        scale: the learned step; in use is the nearest power of two where it must be one.
    """

    def __init__(self, bits: int, *, power_of_two: bool = False) -> None:
        super().__init__(bits, power_of_two=power_of_two)
        self.scale = nn.Parameter(torch.ones(()))

    def positive(self) -> list[Tensor]:
        """The step."""
        return [self.scale]

    def begin(self, scale: float) -> None:
        """Make this the step."""
        self.scale.fill_(scale)

    def learned_scale(self) -> Tensor:
        """The step before it is rounded to a power of two."""
        return self.scale

    def forward(self, x: Tensor) -> Tensor:
        """Real values on the grid, same shape and dtype as x."""
        if not self.active:
            return x
        scale, (low, high) = self.effective_scale(), self.ends
        return fake_quantize(x, scale, low, high, self._grad_scale(x), self.mid_rise, self.kernels)

    def rounding(self, x: Tensor) -> Rounding | None:
        """What `forward` does."""
        soft = ENDS_SOFTLY.get(self.kernels)
        if soft is None or not self.active:
            return None
        return Rounding(self.effective_scale(), *self.ends, soft, self._grad_scale(x))

    def _grad_scale(self, x: Tensor) -> float:
        factor: float = 1.0 / (math.sqrt(x[0].numel()) * self.qmax)
        return factor
