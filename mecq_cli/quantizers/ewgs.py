"""EWGS: gradients scaled by the rounding error (Lee, Kim and Ham, arXiv 2104.00903).

A gradient g of a rounded value becomes g (1 + delta sign(g) e), where e = x - round(x) in units of
the whole range: larger the farther x is from the next level in the direction it is sent. Only the
backward pass differs from LSQ.

Departures: the paper learns the two ends of the range of each layer; here the step is learned, as
in LSQ. It derives delta of each layer from the trace of the Hessian; here delta is fixed to 1e-3,
as in the variant of the authors' program that does without the Hessian.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mecq_cli.quantizers.lsq import LsqActivation, LsqWeight
from mecq_cli.quantizers.rounding import Kernels, passing_backward, round_forward

DELTA = 1e-3


def scaled_backward(
    grad: Tensor, x: Tensor, scale: Tensor, qmin: float, qmax: float, mid_rise: bool
) -> tuple[Tensor, Tensor]:
    """As `round_backward`, with the gradient of each element scaled by its rounding error."""

    def passing(grad: Tensor, v: Tensor, clipped: Tensor, q: Tensor) -> Tensor:
        scaled = grad + grad.abs() * (clipped - q) * (DELTA / (qmax - qmin))
        return torch.where(clipped == v, scaled, 0.0)

    return passing_backward(grad, x, scale, qmin, qmax, mid_rise, passing)


KERNELS = Kernels(round_forward, scaled_backward, dense=False)


class EwgsWeight(LsqWeight):
    """The grid and the step of LSQ."""

    def __init__(self, bits: int, channels: int) -> None:
        super().__init__(bits, channels)
        self.use_kernels(KERNELS)


class EwgsActivation(LsqActivation):
    """The grid and the step of LSQ."""

    def __init__(self, bits: int, *, power_of_two: bool = False) -> None:
        super().__init__(bits, power_of_two=power_of_two)
        self.use_kernels(KERNELS)
