"""LSQ+: learned step and offset of activations (Bhalgat et al., arXiv 2004.09576).

With v = (x - beta) / s the value is ``round(clip(v, 0, Qp)) * s + beta``. Inside the gradients are
those of LSQ; a clipped value passes 1 to beta, and 0 (below) or Qp (above) to s.

Departures: the offset in use is -z s with z = round(-beta / s) inside the grid, its gradient passes
straight through: zero stays exactly zero, which padding needs. Where the step is a power of two, z
is even. What is never negative in the calibration, as after a ReLU, keeps the offset 0 and is
LSQ's. Both gradients are scaled by LSQ's factor as it is here (`mecq_cli.quantizers.lsq`), and the
first step and offset are found as there. Weights are those of LSQ, as in the paper.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mecq_cli.integer.ir import Grid
from mecq_cli.loops import Rounding
from mecq_cli.quantizers.lsq import LsqActivation
from mecq_cli.quantizers.rounding import summed, units


class LsqPlusActivation(LsqActivation):
    """Grid [0, 2^b - 1] whose integer zero point is learned where values are negative.

    Attributes:
        beta: the offset, a real number; where the grid has no negative values it has no part.
    """

    def __init__(self, bits: int, *, power_of_two: bool = False) -> None:
        super().__init__(bits, power_of_two=power_of_two)
        self.beta = nn.Parameter(torch.zeros(()))

    def begin(self, scale: float) -> None:
        """Make this the step, and the zero point the offset."""
        super().begin(scale)
        self.beta.fill_(-float(self.zero_point) * scale)

    def learned_scale(self) -> Tensor:
        """The step before it is rounded to a power of two."""
        if not self.grid_is_unsigned:
            return self.scale
        # Of several processes each waits for a gradient of every parameter, if only zero.
        return self.scale + 0.0 * self.beta

    @property
    def offset(self) -> int | None:
        """0, or None where it is learned."""
        return 0 if self.grid_is_unsigned else None

    def forward(self, x: Tensor) -> Tensor:
        """Real values on the grid, same shape and dtype as x."""
        if not self.active:
            return x
        if self.grid_is_unsigned:
            return super().forward(x)
        scale, grad_scale = self.effective_scale(), self._grad_scale(x)
        low = -self._zero_point(scale)
        out: Tensor = _FakeQuantize.apply(x, scale, self.beta, low, low + self.qmax, grad_scale)
        return out

    def rounding(self, x: Tensor) -> Rounding | None:
        """LSQ's only where the offset is not learned."""
        return super().rounding(x) if self.grid_is_unsigned else None

    @torch.no_grad()
    def _zero_point(self, scale: Tensor) -> Tensor:
        """The zero point in use, of no dimensions."""
        unit = 2 if self.power_of_two else 1
        nearest = torch.round(-self.beta / (scale * unit)) * unit
        return torch.clamp(nearest, 0, self.qmax - self.qmax % unit)

    def grid(self) -> Grid:
        """The integer grid, as it will be exported."""
        grid = super().grid()
        if self.grid_is_unsigned:
            return grid
        zero_point = int(self._zero_point(self.effective_scale().detach()))
        return Grid(grid.scale, zero_point, grid.bits, grid.qmin, grid.qmax)


class _FakeQuantize(torch.autograd.Function):
    """``round(clip(x / s, low, high)) * s`` where the ends follow a learned offset beta."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        beta: Tensor,
        low: Tensor,
        high: Tensor,
        grad_scale: float,
    ) -> Tensor:
        """``x`` of any shape, the other tensors of no dimensions."""
        ctx.save_for_backward(x, scale, low, high)
        ctx.grad_scale = grad_scale
        return (torch.round(torch.clamp(units(x, scale), low, high)) * scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients to x, s and beta."""
        x, scale, low, high = ctx.saved_tensors
        grad, v = grads[0].float(), units(x, scale)
        clipped = torch.clamp(v, low, high)
        grad_x = torch.where(clipped == v, grad, 0.0)
        # Counted from beta: round(v) - v inside, 0 below, Qp above.
        from_beta = torch.where(clipped == v, torch.round(v) - v, clipped - low)
        of_scale = summed(grad * from_beta, scale) * ctx.grad_scale
        of_beta = summed(grad - grad_x, scale) * ctx.grad_scale
        return grad_x.to(x.dtype), of_scale, of_beta, None, None, None
