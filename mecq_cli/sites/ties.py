"""Factors of whole values, kept away from those at which many values lie on a half.

Where a value is multiplied by one number, all its elements share at most 256 products. The steps
before and behind it were found on the same values by the same search, so their ratio is often a
fraction of small numbers, and then some of these products are exactly halves of an output step.
Which way those go depends on the order of float32 multiplications, and every element that has one
of them goes the same way: hundreds would differ between two runtimes, where a sum of many terms
has one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mecq_cli.integer.ir import Grid

_NEAR = 2.0**-21
"""Relative distance to a half that a few float32 roundings, of 2^-24 each, cannot bridge."""

_NUDGE = 2.0**-18
"""Relative change of the factor that is tried, and tried again; twice the width of `_NEAR`'s zone
on both sides, and a five-hundredth of what eight bits of a weight resolve."""

_TRIES = 16


def away_from_halves(
    tensors: dict[str, NDArray[Any]], multiplier: int, source: Grid, target: Grid
) -> dict[str, NDArray[Any]]:
    """Tensors of a depthwise 1 x 1 convolution, with another scale where that is needed.

    Args:
        tensors: weight int8 [C, 1, 1, 1], weight_scale float32 [C], bias int32 [C], of which the
            channels may be all alike; else nothing is changed.
        multiplier: of the weight, where it meets integers.
        source, target: grids of input and output.
    """
    weight, scale, bias = (tensors[name].reshape(-1) for name in _NAMES)
    if not all((values == values[0]).all() for values in (weight, scale, bias)):
        return tensors
    places = np.arange(source.qmin, source.qmax + 1, dtype=np.float64) - source.zero_point
    sums = float(weight[0]) * multiplier * places + float(bias[0])
    unit = float(np.float32(source.scale)) / float(np.float32(target.scale))
    found = float(scale[0])
    for attempt in range(_TRIES):
        found = float(np.float32(scale[0] * (1.0 + attempt * _NUDGE)))
        steps = sums * found * unit
        distance = np.abs(steps - np.floor(steps) - 0.5)
        if not (distance < _NEAR * np.maximum(np.abs(steps), 1.0)).any():
            break
    return {**tensors, "weight_scale": np.full_like(tensors["weight_scale"], found)}


_NAMES = ("weight", "weight_scale", "bias")
