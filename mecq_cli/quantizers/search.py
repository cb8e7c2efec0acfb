"""First steps: the one with the least squared rounding error on a sample."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mecq_cli.quantizers.rounding import to_integers

CANDIDATES = 60
"""Fractions of the largest value that are tried; finer grids changed nothing we measured."""

ENOUGH = 30_000
"""Values that decide among grids without zero, of which there are three times as many."""


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
    span = max(high - low, 1e-6)
    best = (span / qmax, 0)
    best_error = float("inf")
    tried: set[tuple[float, int]] = set()
    steps = [span * (i / CANDIDATES) / qmax for i in range(1, CANDIDATES + 1)]
    if power_of_two:
        # Up to the one that holds the largest value: the nearest may end at 0.71 of it, which is
        # the middle of what a gate puts out, or below.
        steps = [2.0 ** round(math.log2(step)) for step in steps]
        steps.append(2.0 ** math.ceil(math.log2(span / qmax)))
    for scale in steps:
        share = -low / span
        zero_point = min(max(round(share * qmax), 0), qmax)
        if low < 0.0 and zero_point == 0 and qmax > 1:
            zero_point = 1
        if power_of_two:
            # Even, so that halves round alike before and after the zero point is added.
            zero_point = min(zero_point + zero_point % 2, qmax - 1)
        if (scale, zero_point) in tried:
            continue
        tried.add((scale, zero_point))
        error = squared_error(values, scale, zero_point, qmax)
        if error < best_error:
            best, best_error = (scale, zero_point), error
    return best


def best_grid_without_zero(values: Tensor, qmax: int) -> tuple[float, int]:
    """The same on a grid without zero, of the integers 0, 2, ..., 2 qmax and an odd zero point.

    Args:
        values: sample of one activation, flat, float32, not all of them zero.
        qmax: how many levels there are, less one.

    Returns:
        (half the distance between two levels, zero_point).
    """
    span = float(values.max() - values.min())
    values = values[:: len(values) // ENOUGH + 1]
    grids = [
        (span * (i / CANDIDATES) / (2 * qmax), zero_point)
        for i in range(1, CANDIDATES + 1)
        for zero_point in range(1, 2 * qmax, 2)
    ]
    return min(grids, key=lambda g: squared_error(values, g[0], g[1], 2 * qmax, mid_rise=True))


def squared_error(
    values: Tensor, scale: float, zero_point: int, top: int, *, mid_rise: bool = False
) -> float:
    """Of rounding to a grid of the integers 0 to ``top``, or every second one of them."""
    v = values / scale
    clipped = torch.clamp(v, -zero_point, top - zero_point)
    return float((to_integers(v, clipped, mid_rise) * scale - values).square().sum())
