"""Activations with learned thresholds: N2UQ (Liu et al., arXiv 2111.14826).

The output stays a uniform code times a step, which is what integer arithmetic wants. What is
learned beside the step is where one code ends and the next begins: 2^b - 1 widths a_1, a_2, ...
with the edges e_0 = 0, e_i = a_1 + ... + a_i, and the threshold T_i in the middle between e_(i-1)
and e_i. The code of a value is the number of thresholds it reaches.

The gradient is that of the paper's generalized straight-through estimator: backwards, the code
counts as the line that rises from i - 1 to i between e_(i-1) and e_i, and is level outside. So in
interval i the gradient to x is step / a_i. Where all widths are equal to the step, the values and
the gradient to x are those of LSQ, and the gradients to the step and to the widths add up to that
of LSQ to the step.

Departures: there is no learned place for e_0 and no learned factor of x, since a batch norm in
front and the widths do the same. The step is learned as in LSQ, and so scaled are all gradients
here. Thresholds are rounded, with a straight-through gradient, to what the integer network compares
with: the half-integers of a grid of 8 bits that ends at the last one. No width gets smaller than a
sixteenth of the largest, so that no two thresholds fall on one integer and no gradient grows beyond
all bounds. Values that can be negative, and those of more bits than 4, are rounded as by LSQ. The
paper's weights are in entropy_preserving.py.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from mecq_cli.integer.ir import MOST_THRESHOLD_BITS, Grid
from mecq_cli.quantizers.base import MIN_SCALE, ActivationQuantizer
from mecq_cli.quantizers.rounding import Kernels, dense, shaped
from mecq_cli.quantizers.search import best_activation_grid

_NARROWEST = 1 / 16
"""Of the widths, as a share of the widest."""

_TOP = 255
"""The largest integer of the grid that thresholds lie on."""


def code_forward(x: Tensor, scale: Tensor, widths: Tensor, thresholds: Tensor) -> Tensor:
    """Code times step; shape and dtype of x.

    Args:
        x: of any shape.
        scale: the step, a scalar.
        widths: not used here; [K].
        thresholds: [K], ascending.
    """
    return (_code(x.float(), thresholds) * scale).to(x.dtype)


def code_backward(
    grad: Tensor, x: Tensor, scale: Tensor, widths: Tensor, thresholds: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to x and, not yet scaled, to the step and the widths, of the output's gradient."""
    grad, x32 = grad.float(), x.float()
    grad_scale = _total(grad * _code(x32, thresholds))
    grad_x = torch.zeros_like(x32)
    inside, partial = [], []
    low = torch.zeros_like(scale)
    last = len(widths) - 1
    for i, width in enumerate(widths.unbind()):
        high = low + width
        within = (x32 >= low) & ((x32 <= high) if i == last else (x32 < high))
        own = torch.where(within, grad, 0.0)
        grad_x = grad_x + own * (scale / width)
        inside.append(_total(own))
        partial.append(_total(own * (x32 - low)))
        low = high
    # A width moves the line of its own interval, and shifts those of all behind it.
    slopes = torch.stack(inside) / widths
    behind = slopes.sum() - slopes.cumsum(0)
    grad_widths = -scale * (torch.stack(partial) / widths.square() + behind)
    return grad_x.to(x.dtype), grad_scale.reshape(scale.shape), grad_widths


def _code(x: Tensor, thresholds: Tensor) -> Tensor:
    code = torch.zeros_like(x)
    for threshold in thresholds.unbind():
        code = code + (x >= threshold)
    return code


def _total(values: Tensor) -> Tensor:
    """By image and channel first, in the order in which the batch norm in front sums too."""
    if values.dim() == 4:
        values = values.sum((2, 3)).sum(0)
    return values.sum()


PLAIN = Kernels(code_forward, code_backward, dense=False)


class _Codes(torch.autograd.Function):
    """`code_forward` with `code_backward`; only x and the parameters are kept."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        widths: Tensor,
        thresholds: Tensor,
        grad_scale: float,
        kernels: Kernels,
    ) -> Tensor:
        ctx.save_for_backward(x, scale, widths, thresholds)
        ctx.settings = (grad_scale, kernels)
        if not kernels.dense:
            return kernels.forward(x, scale, widths, thresholds)
        vector, _ = dense(x, scale)
        return shaped(kernels.forward(vector, scale, widths, thresholds), x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, widths, thresholds = ctx.saved_tensors
        grad_scale, kernels = ctx.settings
        if not kernels.dense:
            grad_x, *others = kernels.backward(grads[0], x, scale, widths, thresholds)
        else:
            vector, _ = dense(x, scale)
            grad, _ = dense(grads[0], scale, like=x)
            flat, *others = kernels.backward(grad, vector, scale, widths, thresholds)
            grad_x = shaped(flat, x)
        return grad_x, *(other * grad_scale for other in others), None, None, None


class N2uqActivation(ActivationQuantizer):
    """Codes 0 to 2^b - 1 by learned thresholds, for values that are not negative.

    Args:
        bits: 1 to `MOST_THRESHOLD_BITS`; with more, a uniform grid is fine enough.

    Attributes:
        widths: of the intervals that the thresholds halve, [2^b - 1], a parameter.
    """

    def __init__(self, bits: int) -> None:
        super().__init__(bits)
        if bits > MOST_THRESHOLD_BITS:
            raise ValueError(f"thresholds are for 1 to {MOST_THRESHOLD_BITS} bits, not {bits}")
        self.use_kernels(PLAIN)
        self.qmax = 2**bits - 1
        self.scale = nn.Parameter(torch.ones(()))
        self.widths = nn.Parameter(torch.ones(self.qmax))
        # Of an odd number of integers in a step the half-integers between them hit (i - 1/2) steps.
        most = (_TOP - 0.5) / (self.qmax - 0.5)
        integers = 2 * math.floor((most - 1) / 2) + 1
        self._last = integers * self.qmax - integers // 2

    def initialize(self, values: Tensor) -> None:
        """The uniform grid of least squared error on a flat sample of the values."""
        sample = values.detach().float().clamp_min(0.0)
        scale, _ = best_activation_grid(sample, self.qmax, power_of_two=False)
        with torch.no_grad():
            self.scale.fill_(scale)
            self.widths.fill_(scale)

    @property
    def offset(self) -> int | None:
        """0: it is the zero point."""
        return 0

    @property
    def grid_is_unsigned(self) -> bool:
        """Always."""
        return True

    def effective_scale(self) -> Tensor:
        """The step in use."""
        return self.scale

    def positive(self) -> list[Tensor]:
        """The step and the widths."""
        return [self.scale, self.widths]

    @torch.no_grad()
    def project(self) -> None:
        """Keep the widths comparable, and so the thresholds in order."""
        floor = (self.widths.amax() * _NARROWEST).clamp_min(MIN_SCALE)
        self.widths.clamp_min_(floor)

    def forward(self, x: Tensor) -> Tensor:
        """Codes times the step, same shape and dtype as x."""
        if not self.active:
            return x
        integers, unit = self._integers()
        thresholds = ((integers - 0.5) * unit).float()
        grad_scale = 1.0 / (math.sqrt(x[0].numel()) * self.qmax)
        out: Tensor = _Codes.apply(x, self.scale, self.widths, thresholds, grad_scale, self.kernels)
        return out

    def _integers(self) -> tuple[Tensor, Tensor]:
        """Thresholds [K] as ascending integers m, and the unit in which T = m - 1/2; float64."""
        widths = self.widths.detach().double()
        thresholds = widths.cumsum(0) - widths / 2
        unit = thresholds[-1] / (self._last - 0.5)
        return torch.round(thresholds / unit + 0.5).clamp_min(1.0), unit

    def grid(self) -> Grid:
        """The grid of the codes."""
        return Grid(float(self.scale.detach()), 0, self.bits, 0, self.qmax)

    def threshold_grid(self) -> Grid:
        """8 bits, of which the last threshold is near the end."""
        _, unit = self._integers()
        return Grid(float(unit.float()), 0, 8, 0, _TOP)

    def thresholds(self, source: Grid | None) -> tuple[int, ...]:
        """The least integers of each code, on the grid ``source`` or else on `threshold_grid`."""
        integers, unit = self._integers()
        if source is not None:
            real = (integers - 0.5) * unit
            integers = torch.ceil(real / source.scale) + source.zero_point
        return tuple(int(m) for m in integers.clamp(1, _TOP + 1))
