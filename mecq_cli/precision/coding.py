"""Sensitivity by coding length: how far the features' geometry moves when a layer is rounded.

For each tapped value, both views standardised feature by feature and at unit length (as in the
regularizer), the Jensen-Bregman LogDet divergence of the Gram matrices of Z (in float) and Z_b
(one layer rounded to b bits),

    eps_d^2 ( L([Z_b, Z] / sqrt 2) - L(Z_b) / 2 - L(Z) / 2 ),

which is what coding both at once costs more than coding each alone; L is the coding length of MEC
(arXiv 2210.11464, Eq. 2). The mean over the tapped values is the very term that the training goes
on to minimise (docs/method.md). In float64: at 8 bits it is a millionth of the lengths.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mecq_cli.entropy import exact_coding_length, normalise, standardise
from mecq_cli.precision.rounding import Outputs


class CodingDistance:
    """The mean divergence of the tapped values from those of the float network."""

    def __init__(self, reference: Outputs, distortion: float) -> None:
        self._distortion = distortion
        rows = reference[1:]
        # The end of the last stage, averaged over the map, is often what the last layer reads.
        self._taps = [
            i for i, row in enumerate(rows) if not any(_same(row, before) for before in rows[:i])
        ]
        self._goals = [_prepared(rows[i]) for i in self._taps]
        self._lengths = [self._length(goal) for goal in self._goals]

    def __call__(self, outputs: Outputs) -> float:
        """Nats, times the distortion; 0 where nothing has moved but by a rotation."""
        total = 0.0
        for tap, goal, goal_length in zip(self._taps, self._goals, self._lengths, strict=True):
            mine = _prepared(outputs[1 + tap])
            joint = self._length(torch.cat((mine, goal), 1) * 0.5**0.5)
            total += joint - 0.5 * (self._length(mine) + goal_length)
        return self._distortion * total / len(self._taps)

    def _length(self, rows: Tensor) -> float:
        return float(exact_coding_length(rows, self._distortion))


def _prepared(rows: Tensor) -> Tensor:
    return normalise(standardise(rows.double()))


def _same(rows: Tensor, others: Tensor) -> bool:
    return rows.shape == others.shape and torch.allclose(rows, others, rtol=1e-4, atol=1e-5)
