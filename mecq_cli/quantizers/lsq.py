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

from mecq_cli.integer.ir import Grid
from mecq_cli.quantizers.base import ActivationQuantizer, WeightQuantizer, fake_quantize
from mecq_cli.quantizers.search import best_activation_grid, best_weight_scale


class LsqWeight(WeightQuantizer):
    """Signed grid [-2^(b-1), 2^(b-1) - 1]; at 1 bit {-1, +1}. One step per output channel."""

    def __init__(self, bits: int, channels: int) -> None:
        super().__init__(bits)
        self.binary = bits == 1
        self.qmin = -1 if self.binary else -(2 ** (bits - 1))
        self.qmax = 1 if self.binary else 2 ** (bits - 1) - 1
        self.scale = nn.Parameter(torch.ones(channels))

    def initialize(self, weight: Tensor) -> None:
        """First steps from the FP weight [O, ...]."""
        rows = weight.detach().float().flatten(1)
        if self.binary:
            scale = rows.abs().mean(1).clamp_min(1e-8)
        else:
            scale = best_weight_scale(rows, self.qmin, self.qmax)
        with torch.no_grad():
            self.scale.copy_(scale)

    def forward(self, weight: Tensor) -> Tensor:
        """Weight [O, ...] on its grid, same shape and dtype."""
        if not self.active:
            return weight
        scale = self.scale.reshape(-1, *([1] * (weight.dim() - 1)))
        grad_scale = 1.0 / (math.sqrt(weight[0].numel()) * self.qmax)
        return fake_quantize(
            weight, scale, self.qmin, self.qmax, grad_scale, self.binary, self.kernels
        )

    def integers(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """int8 weight [O, ...] and float32 step [O]."""
        scale = self.scale.detach().float()
        v = weight.detach().float() / scale.reshape(-1, *([1] * (weight.dim() - 1)))
        if self.binary:
            q = torch.where(v >= 0, 1.0, -1.0)
        else:
            q = torch.round(torch.clamp(v, self.qmin, self.qmax))
        return q.to(torch.int8), scale.clone()


class LsqActivation(ActivationQuantizer):
    """Grid [0, 2^b - 1] with an integer zero point, which is 0 for non-negative values.

    Args:
        bits: 1 to 8.
        power_of_two: the step used is the nearest power of two of the learned one, so that sums
            of such activations are exact in every runtime (see integer/ir.py, `add`).
    """

    zero_point: Tensor

    def __init__(self, bits: int, *, power_of_two: bool = False) -> None:
        super().__init__(bits)
        self.power_of_two = power_of_two
        self.qmax = 2**bits - 1
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer("zero_point", torch.zeros((), dtype=torch.int32))
        self._offset = 0

    def initialize(self, values: Tensor) -> None:
        """First step and zero point from a flat sample of the values."""
        scale, zero_point = best_activation_grid(
            values.detach().float(), self.qmax, self.power_of_two
        )
        with torch.no_grad():
            self.scale.fill_(scale)
            self.zero_point.fill_(zero_point)
        self._offset = zero_point

    def _load_from_state_dict(self, *args: object, **kwargs: object) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._offset = int(self.zero_point)

    @property
    def offset(self) -> int:
        """The zero point as a plain number: a constant to the compiler."""
        return self._offset

    @property
    def grid_is_unsigned(self) -> bool:
        """Whether the zero point is 0."""
        return self._offset == 0

    def effective_scale(self) -> Tensor:
        """The step in use; the gradient passes straight through the power of two."""
        if not self.power_of_two:
            return self.scale
        learned = self.scale.detach()
        exact = torch.exp2(torch.round(torch.log2(learned)))
        return exact + (self.scale - learned)

    def forward(self, x: Tensor) -> Tensor:
        """Real values on the grid, same shape and dtype as x."""
        if not self.active:
            return x
        grad_scale = 1.0 / (math.sqrt(x[0].numel()) * self.qmax)
        low, high = -self.offset, self.qmax - self.offset
        return fake_quantize(x, self.effective_scale(), low, high, grad_scale, kernels=self.kernels)

    def grid(self) -> Grid:
        """The integer grid, as it will be exported."""
        scale = float(self.scale.detach())
        if self.power_of_two:
            scale = 2.0 ** round(math.log2(scale))
        return Grid(scale, self.offset, self.bits, 0, self.qmax)
