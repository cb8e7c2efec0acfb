"""Functions of a single value by name, and the table each becomes between two grids."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mecq_cli.integer.ir import Grid

Array = NDArray[Any]


class Function(NamedTuple):
    """A function, and how many numbers it has beside its argument."""

    call: Callable[..., Array]
    parameters: int = 0


def _sigmoid(x: Array) -> Array:
    positive: Array = np.exp(-np.abs(x))
    value: Array = np.where(x >= 0, 1, positive) / (1 + positive)
    return value


def _softplus(x: Array) -> Array:
    above: Array = np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x)))
    return above


def _gelu(x: Array) -> Array:
    erf = np.asarray(np.frompyfunc(math.erf, 1, 1)(x / math.sqrt(2.0)), x.dtype)
    value: Array = 0.5 * x * (1.0 + erf)
    return value


def _gelu_tanh(x: Array) -> Array:
    value: Array = 0.5 * x * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))
    return value


def _hard_sigmoid(x: Array) -> Array:
    value: Array = np.clip(x + 3.0, 0.0, 6.0) / 6.0
    return value


FUNCTIONS = {
    "silu": Function(lambda x: x * _sigmoid(x)),
    "gelu": Function(_gelu),
    "gelu_tanh": Function(_gelu_tanh),
    "sigmoid": Function(_sigmoid),
    "tanh": Function(np.tanh),
    "hardswish": Function(lambda x: x * _hard_sigmoid(x)),
    "hardsigmoid": Function(_hard_sigmoid),
    "leaky_relu": Function(lambda x, slope: np.where(x >= 0, x, slope * x), 1),
    "elu": Function(lambda x, alpha: np.where(x >= 0, x, alpha * np.expm1(np.minimum(x, 0))), 1),
    "softplus": Function(_softplus),
    "mish": Function(lambda x: x * np.tanh(_softplus(x))),
    "clamp": Function(lambda x, low, high: np.clip(x, low, high), 2),
    "negative": Function(np.negative),
    "abs": Function(np.abs),
}
"""On arrays of any float type, in that type. mecq_cli.functions has the same for torch."""


def table(name: str, parameters: Sequence[float], source: Grid, target: Grid) -> NDArray[np.uint8]:
    """What a lookup holds: rne(f(x) / s_y) + z_y, clipped, for each of 256 integers on ``source``.

    Computed in float64. A function that is not exact may round otherwise on another machine, which
    does no harm: it is the table that is stored and run.
    """
    x = (np.arange(256, dtype=np.float64) - source.zero_point) * source.scale
    # What the range of the input leaves out is never read; it shall not overflow either.
    x = np.clip(x, *(np.array([source.qmin, source.qmax]) - source.zero_point) * source.scale)
    steps = np.rint(FUNCTIONS[name].call(x, *parameters) / target.scale) + target.zero_point
    entries: NDArray[np.uint8] = np.clip(steps, target.qmin, target.qmax).astype(np.uint8)
    return entries
