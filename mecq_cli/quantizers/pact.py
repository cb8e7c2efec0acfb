"""PACT: activations clipped at a learned level alpha (Choi et al., arXiv 1805.06085).

Only clipped values pass a gradient to alpha: 1 each, neither averaged nor scaled. The paper adds an
L2 penalty on alpha with the factor of the weights; here alpha is in a parameter group with the
weight decay of the weights (with AdamW, as theirs, apart from the gradient).

Departures: the first alpha is the end of the grid with the least squared rounding error.
Activations with negative values have a zero point inside the grid: the grid is clipped at both
ends, alpha is the one farther from zero, and a value clipped at the other passes its share of
alpha. Where the step must be a power of two it is the nearest one to alpha's, with a
straight-through gradient. Weights are those of DoReFa, as in the paper.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mecq_cli.quantizers.rounding import Kernels, fake_quantize, round_forward, summed, units
from mecq_cli.quantizers.uniform import UniformActivation


def clipped_backward(
    grad: Tensor, x: Tensor, scale: Tensor, qmin: float, qmax: float, mid_rise: bool
) -> tuple[Tensor, Tensor]:
    """As `round_backward`; the step gets the ends of the grid from clipped values, else nothing."""
    grad = grad.float()
    v = units(x, scale)
    clipped = torch.clamp(v, qmin, qmax)
    inside = clipped == v
    products = torch.where(inside, 0.0, grad * clipped)
    return torch.where(inside, grad, 0.0).to(x.dtype), summed(products, scale)


class PactActivation(UniformActivation):
    """Grid [0, 2^b - 1] that ends at a learned alpha.

    Attributes:
        alpha: the value of the end of the grid that is farther from zero.
    """

    decays = True

    def __init__(self, bits: int, *, power_of_two: bool = False) -> None:
        super().__init__(bits, power_of_two=power_of_two)
        self.alpha = nn.Parameter(torch.ones(()))
        self.use_kernels(Kernels(round_forward, clipped_backward, dense=False))

    @property
    def reach(self) -> int:
        """Alpha in units of the step."""
        low, high = self.ends
        return max(-low, high)

    def positive(self) -> list[Tensor]:
        """Alpha."""
        return [self.alpha]

    def begin(self, scale: float) -> None:
        """Make this the step."""
        self.alpha.fill_(scale * self.reach)

    def learned_scale(self) -> Tensor:
        """The step before it is rounded to a power of two."""
        return self.alpha / self.reach

    def forward(self, x: Tensor) -> Tensor:
        """Real values on the grid, same shape and dtype as x."""
        if not self.active:
            return x
        low, high = self.ends
        return fake_quantize(x, self.effective_scale(), low, high, 1.0, kernels=self.kernels)
