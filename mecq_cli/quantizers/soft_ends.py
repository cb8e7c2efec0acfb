"""Activations of 1 and 2 bits whose gradient ends softly.

LSQ's gradient reaches what lies inside the grid, between its first and its last level, and nothing
outside. At 1 bit that is a window of one step around the one threshold, and most values of a
network are outside: they never learn to cross it. Here each threshold passes the gradient within a
whole step to both sides, less with the distance: a triangle, which is the derivative of the
piecewise quadratic function by which Bi-Real Net replaces the sign (Liu et al., arXiv 1808.00278,
section 3.3). Of several thresholds the triangles add up: to 1 between the first and the last, and
to a ramp of one step across each end of the grid, so that half of the gradient passes at the end
itself. Where they end softly the gradients are as large in total as the jumps of the function are
high; a window of the same width without the slope is not better than LSQ's (docs/method.md).

What is ours is the sum at more than one threshold, and that the step is learned beside it: its
gradient is LSQ's with that share in the place of 0 and 1. The values are LSQ's. The ramp reaches
below zero, too: a ReLU in front is part of the grid.
"""

from __future__ import annotations

from mecq_cli.quantizers.lsq import LsqActivation
from mecq_cli.quantizers.rounding import PLAIN, SOFT, Kernels

MOST_BITS = 2
"""With more the ends are far from most values."""


class SoftEndsActivation(LsqActivation):
    """The grid and the step of LSQ; with more than `MOST_BITS` bits its gradient, too."""

    def use_bits(self, bits: int) -> None:
        """With the gradient that suits so many."""
        super().use_bits(bits)
        self.use_kernels(self.suited())

    def suited(self) -> Kernels:
        """To the grid as it is now."""
        return SOFT if self.qmax < 2**MOST_BITS else PLAIN
