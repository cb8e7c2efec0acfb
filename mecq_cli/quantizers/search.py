"""First steps: the one with the least squared rounding error on a sample."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mecq_cli.quantizers.rounding import to_integers

CANDIDATES = 60
"""Fractions of the largest value that are tried; finer grids changed nothing we measured."""

ENOUGH = 30_000
"""Values that decide where the zero point is one more choice."""

ZERO_POINTS = 16
"""So many are tried at each step, and some more."""


def best_weight_scale(weight: Tensor, qmin: int, qmax: int, mid_rise: bool = False) -> Tensor:
    """Step of least squared error for each row.

    Args:
        weight: [O, K], float32.
        qmin, qmax: ends of the grid.
        mid_rise: it consists of the odd integers.

    Returns:
        [O], float32, positive also for rows of zeros.
    """
    largest = weight.abs().amax(1).clamp_min(1e-8)
    best_error = torch.full_like(largest, float("inf"))
    best = largest / max(-qmin, qmax)
    for i in range(1, CANDIDATES + 1):
        scale = largest * (i / CANDIDATES) / max(qmax, 1)
        v = weight / scale[:, None]
        rounded = to_integers(v, torch.clamp(v, qmin, qmax), mid_rise) * scale[:, None]
        error = (rounded - weight).square().sum(1)
        better = error < best_error
        best = torch.where(better, scale, best)
        best_error = torch.where(better, error, best_error)
    return best


def best_activation_grid(values: Tensor, qmax: int, power_of_two: bool) -> tuple[float, int]:
    """Step and zero point of least squared error on the grid [0, qmax].

    A sample with negative values may get the zero point 0: of the few levels that 2 bits have, the
    small negative values of a GELU are seldom worth one.

    Args:
        values: sample of one activation, flat, float32.
        qmax: largest integer.
        power_of_two: only steps of that kind.

    Returns:
        (scale, zero_point); zero_point is 0 where the sample has no negative value, and even
        where the step is a power of two (see `add` in integer/ir.py). A sample of zeros gets a
        grid up to 1.
    """
    low = min(float(values.min()), 0.0)
    high = max(float(values.max()), 0.0)
    if low == high:
        # Dead so far. Other images, or training, may wake it: not the smallest of the steps, at
        # which every value would be clipped.
        scale = 1.0 / qmax
        return (2.0 ** round(math.log2(scale)) if power_of_two else scale), 0
    if low < 0.0:
        values = _some(values)
    span = max(high - low, 1e-6)
    steps = [span * (i / CANDIDATES) / qmax for i in range(1, CANDIDATES + 1)]
    if power_of_two:
        # Up to the one that holds the largest value: the nearest may end at 0.71 of it, which is
        # the middle of what a gate puts out, or below.
        steps = [2.0 ** round(math.log2(step)) for step in steps]
        steps.append(2.0 ** math.ceil(math.log2(span / qmax)))
    grids: dict[tuple[float, int], None] = {}  # each once, in this order
    for scale in steps:
        for zero_point in _zero_points(low / scale, high / scale, qmax):
            # Even, so that halves round alike before and after the zero point is added.
            even = min(zero_point + zero_point % 2, qmax - 1) if power_of_two else zero_point
            grids[scale, even] = None
    return min(grids, key=lambda grid: squared_error(values, grid[0], grid[1], qmax))


def _zero_points(low: float, high: float, qmax: int) -> list[int]:
    """From the one that clips only above to the one that clips only below, but not too many.

    Args:
        low, high: the least and the largest value, in units of the step.
        qmax: largest integer.

    Returns:
        Of equally good ones the first is to be taken: it leaves room on both sides.
    """
    if low == 0.0:
        return [0]
    ends = min(round(-low), qmax), max(qmax - round(high), 0)
    least, most = min(ends), max(ends)
    stride = max(-(-(most - least) // ZERO_POINTS), 1)
    middle = min(max(round(-low / (high - low) * qmax), 0), qmax)
    return sorted({*range(least, most, stride), most, middle}, key=lambda z: abs(z - middle))


def best_grid_without_zero(values: Tensor, qmax: int) -> tuple[float, int]:
    """The same on a grid without zero, of the integers 0, 2, ..., 2 qmax and an odd zero point.

    Args:
        values: sample of one activation, flat, float32, not all of them zero.
        qmax: how many levels there are, less one.

    Returns:
        (half the distance between two levels, zero_point).
    """
    span = float(values.max() - values.min())
    values = _some(values)
    grids = [
        (span * (i / CANDIDATES) / (2 * qmax), zero_point)
        for i in range(1, CANDIDATES + 1)
        for zero_point in range(1, 2 * qmax, 2)
    ]
    return min(grids, key=lambda g: squared_error(values, g[0], g[1], 2 * qmax, mid_rise=True))


def _some(values: Tensor) -> Tensor:
    """At random, but always the same: a step may fall into the rhythm of the channels."""
    if len(values) <= ENOUGH:
        return values
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(0))
    return values[order[:ENOUGH].to(values.device)]


def squared_error(
    values: Tensor, scale: float, zero_point: int, top: int, *, mid_rise: bool = False
) -> float:
    """Of rounding to a grid of the integers 0 to ``top``, or every second one of them."""
    v = values / scale
    clipped = torch.clamp(v, -zero_point, top - zero_point)
    return float((to_integers(v, clipped, mid_rise) * scale - values).square().sum())
