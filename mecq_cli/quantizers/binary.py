"""Weights of 1 bit whose gradients reach every one of them.

The value is LSQ's at 1 bit: sign(w) times a learned step for each output channel. LSQ's gradient
reaches a weight only within one step of zero, and since the step is about mean|w|, two fifths of
the weights of a bell curve are outside and keep their sign for ever. Here the gradient passes to
all of them, as in the binary networks of Rastegari et al. (XNOR-Net, arXiv 1603.05279, section
3.1, without its factor for the layer), and the gradient to the step is that of sign(w) times a step
alone: the sum of upstream gradient times sign.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mecq_cli.quantizers.lsq import LsqWeight
from mecq_cli.quantizers.rounding import PLAIN, Kernels, round_forward, summed, to_integers, units


def unclipped_backward(
    grad: Tensor, x: Tensor, scale: Tensor, qmin: float, qmax: float, mid_rise: bool
) -> tuple[Tensor, Tensor]:
    """As `round_backward`, but the gradient passes to every element of x."""
    grad32 = grad.float()
    v = units(x, scale)
    q = to_integers(v, torch.clamp(v, qmin, qmax), mid_rise)
    return grad32.to(x.dtype), summed(grad32 * q, scale)


PASSING = Kernels(round_forward, unclipped_backward, dense=False)


class BinaryWeight(LsqWeight):
    """{-1, +1} times one learned step per output channel; with more bits (lowering) it is LSQ."""

    def use_bits(self, bits: int) -> None:
        """At 1 bit with the gradient of this module."""
        super().use_bits(bits)
        self.use_kernels(PASSING if bits == 1 else PLAIN)
