"""The operations of the integer model: what each takes, and the shape of what it yields."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mecq_cli.integer.functions import FUNCTIONS
from mecq_cli.integer.ir import LARGEST_SPREAD, MOST_THRESHOLD_BITS, Grid, Node, spread


@dataclass(frozen=True)
class Value:
    """What a node reads or yields: the shape without the batch axis; no grid means float."""

    shape: tuple[int, ...]
    grid: Grid | None

    def __str__(self) -> str:
        kind = "float" if self.grid is None else "integers"
        return f"{kind} [{', '.join(['N', *map(str, self.shape)])}]"


@dataclass(frozen=True)
class Ints:
    """An attribute of ``count`` integers in [low, high]; 1: a bare one, None: 1 to ``most``."""

    count: int | None
    low: int
    high: int = 2**16
    most: int = 3


Kind = Ints | Literal["bool", "number", "number or None", "name", "numbers"]
"""What an attribute may be; numbers are finite."""


@dataclass(frozen=True)
class Rule:
    """What an operation takes.

    Attributes:
        shape: yields the shape of the output; raises ValueError where the inputs do not fit.
        inputs: how many; None for any number.
        reads: "grid", "float" or "any"; several inputs are all on grids or all float.
        yields: "grid", "float", "same" (as the inputs), or "any"; from float inputs read as
            "any" always float.
        attributes: by name: several integers, or the type of a single value.
        weight_dims: of the weight, if it has one.
        tensors: that an operation without a weight has, by name.
    """

    shape: Callable[[Node, list[Value]], tuple[int, ...]]
    inputs: int | None
    reads: str
    yields: str
    attributes: Mapping[str, Kind]
    weight_dims: int | None = None
    tensors: tuple[str, ...] = ()


def _conv2d(node: Node, inputs: list[Value]) -> tuple[int, ...]:
    weight = node.tensors["weight"]
    channels, height, width = _plane(inputs[0])
    groups = node.attributes["groups"]
    if weight.shape[1] * groups != channels or weight.shape[0] % groups:
        raise ValueError(
            f"a weight {list(weight.shape)} in {groups} groups does not fit {channels} channels"
        )
    kernel = weight.shape[2:]
    top, left, bottom, right = node.attributes["padding"]
    reach = [d * (k - 1) + 1 for d, k in zip(node.attributes["dilation"], kernel, strict=True)]
    height, width = height + top + bottom, width + left + right
    if channels * height * width > MOST_ELEMENTS:
        raise ValueError("its padded input is too large")
    return (
        weight.shape[0],
        _windows(height, reach[0], node.attributes["stride"][0]),
        _windows(width, reach[1], node.attributes["stride"][1]),
    )


def _linear(node: Node, inputs: list[Value]) -> tuple[int, ...]:
    weight = node.tensors["weight"]
    if inputs[0].shape[-1:] != weight.shape[1:]:
        raise ValueError(f"a weight {list(weight.shape)} does not fit {inputs[0]}")
    return *inputs[0].shape[:-1], weight.shape[0]


def _max_pool2d(node: Node, inputs: list[Value]) -> tuple[int, ...]:
    _same_values(node, inputs)
    return _pool(node, inputs[0], node.attributes["dilation"])


def _avg_pool2d(node: Node, inputs: list[Value]) -> tuple[int, ...]:
    return _pool(node, inputs[0], (1, 1))


def _pool(node: Node, value: Value, dilation: tuple[int, int]) -> tuple[int, ...]:
    channels, *sizes = _plane(value)
    shape = [channels]
    names = ("kernel", "stride", "padding")
    for axis, size in enumerate(sizes):
        kernel, stride, padding = (node.attributes[name][axis] for name in names)
        reach = dilation[axis] * (kernel - 1) + 1
        if 2 * padding > kernel:
            raise ValueError(f"padding {padding} is more than half of the kernel {kernel}")
        count = _windows(size + 2 * padding, reach, stride)
        if node.attributes["ceil_mode"] and count * stride < min(
            size + padding, size + 2 * padding - reach + stride
        ):
            # One more, as in PyTorch, unless it would begin in the padding on the far side.
            count += 1
        if count < 1:
            raise ValueError(f"a window of {reach} does not fit {value}")
        shape.append(count)
    return tuple(shape)


def _windows(size: int, reach: int, stride: int) -> int:
    """How many windows fit; 0 or less where none does."""
    return (size - reach) // stride + 1


def _global_avg_pool(node: Node, inputs: list[Value]) -> tuple[int, ...]:
    return _plane(inputs[0])[0], 1, 1


def _unchanged(node: Node, inputs: list[Value]) -> tuple[int, ...]:
    return inputs[0].shape


def _threshold(node: Node, inputs: list[Value]) -> tuple[int, ...]:
    thresholds, grid = node.attributes["thresholds"], node.grid
    if grid is None or grid.bits > MOST_THRESHOLD_BITS:
        raise ValueError(f"its output has at most {MOST_THRESHOLD_BITS} bits")
    codes = 2**grid.bits
    top = grid.spacing * (codes - 1)
    if (grid.qmin, grid.qmax) != (0, top) or (grid.spacing == 1 and grid.zero_point != 0):
        raise ValueError(f"the zero point of its grid must be 0, the range [0, {top}]")
    if len(thresholds) != codes - 1:
        raise ValueError(f"{len(thresholds)} thresholds are given, {codes} codes take {codes - 1}")
    if list(thresholds) != sorted(thresholds):
        raise ValueError("the thresholds do not ascend")
    return inputs[0].shape


def _clip(node: Node, inputs: list[Value]) -> tuple[int, ...]:
    low, high = node.attributes["min"], node.attributes["max"]
    if high is not None and low > high:
        raise ValueError(f"min {low} is more than max {high}")
    return inputs[0].shape


def _lookup(node: Node, inputs: list[Value]) -> tuple[int, ...]:
    table, grid = node.tensors["table"], node.grid
    if table.shape != (256,) or str(table.dtype) != "uint8":
        raise ValueError("its table has 256 bytes")
    if grid is not None and (table.min() < grid.qmin or table.max() > grid.qmax):
        raise ValueError(f"its table leaves the range [{grid.qmin}, {grid.qmax}]")
    return inputs[0].shape


def _function(node: Node, inputs: list[Value]) -> tuple[int, ...]:
    name, given = node.attributes["name"], node.attributes["parameters"]
    function = FUNCTIONS.get(name)
    if function is None:
        raise ValueError(f"unknown function; known are {', '.join(FUNCTIONS)}")
    if len(given) != function.parameters:
        raise ValueError(f"{len(given)} parameters are given, {name} has {function.parameters}")
    return inputs[0].shape


def _mul(node: Node, inputs: list[Value]) -> tuple[int, ...]:
    for grid in (node.grid, *(value.grid for value in inputs)):
        if grid is not None and not 2.0**-LARGEST_EXPONENT <= grid.scale <= 2.0**LARGEST_EXPONENT:
            raise ValueError(f"the scale {grid.scale!r} is of no usual size")
    return _add(node, inputs)


def _broadcast(inputs: list[Value]) -> tuple[int, ...]:
    first, second = (value.shape for value in inputs)
    pairs = list(zip(first, second, strict=False))
    if len(first) != len(second) or any(a != b and 1 not in (a, b) for a, b in pairs):
        raise ValueError(f"{inputs[0]} and {inputs[1]} differ in shape")
    return tuple(max(pair) for pair in pairs)


def _add(node: Node, inputs: list[Value]) -> tuple[int, ...]:
    shape = _broadcast(inputs)
    for grid in (node.grid, *(value.grid for value in inputs)):
        if grid is not None and math.frexp(grid.scale)[0] != 0.5:
            raise ValueError(f"the scale {grid.scale!r} is not a power of two")
    if node.grid is not None and node.grid.zero_point % 2:
        raise ValueError(f"the zero point {node.grid.zero_point} is odd")
    grids = [grid for grid in (node.grid, *(value.grid for value in inputs)) if grid is not None]
    if node.op == "add" and grids and spread(*grids) > LARGEST_SPREAD:
        raise ValueError("the scales lie too far apart")
    return shape


def _concat(node: Node, inputs: list[Value]) -> tuple[int, ...]:
    _same_values(node, inputs)
    if len({value.shape[1:] for value in inputs}) > 1:
        raise ValueError("the inputs differ in more than their channels")
    return sum(value.shape[0] for value in inputs), *inputs[0].shape[1:]


def _flatten(node: Node, inputs: list[Value]) -> tuple[int, ...]:
    _same_values(node, inputs)
    return (math.prod(inputs[0].shape),)


def _slice(node: Node, inputs: list[Value]) -> tuple[int, ...]:
    _same_values(node, inputs)
    axes, starts, ends, steps = (
        node.attributes[name] for name in ("axes", "starts", "ends", "steps")
    )
    if len({len(axes), len(starts), len(ends), len(steps)}) > 1 or len({*axes}) < len(axes):
        raise ValueError("axes, starts, ends and steps are of one length, each axis once")
    if max(axes) > len(inputs[0].shape):
        raise ValueError(f"{inputs[0]} has no axis {max(axes)}")
    shape = list(inputs[0].shape)
    for axis, *bounds in zip(axes, starts, ends, steps, strict=True):
        shape[axis - 1] = len(range(*slice(*bounds).indices(shape[axis - 1])))
    return tuple(shape)


def _reshape(node: Node, inputs: list[Value]) -> tuple[int, ...]:
    _same_values(node, inputs)
    shape = tuple(node.attributes["shape"])
    if math.prod(shape) != math.prod(inputs[0].shape):
        raise ValueError(f"{inputs[0]} cannot have the shape {list(shape)}")
    return shape


def _transpose(node: Node, inputs: list[Value]) -> tuple[int, ...]:
    _same_values(node, inputs)
    axes, shape = node.attributes["axes"], inputs[0].shape
    if sorted(axes) != list(range(1, len(shape) + 1)):
        raise ValueError(f"the axes {list(axes)} are no order of those of {inputs[0]}")
    return tuple(shape[axis - 1] for axis in axes)


def _upsample(node: Node, inputs: list[Value]) -> tuple[int, ...]:
    _same_values(node, inputs)
    return _sized(node, inputs)


def _sized(node: Node, inputs: list[Value]) -> tuple[int, ...]:
    channels, *sizes = _plane(inputs[0])
    wanted = node.attributes["size"]
    if any(n * m > MOST_ELEMENTS for n, m in zip(sizes, wanted, strict=True)):
        raise ValueError(f"from {sizes} to {list(wanted)} is too far")
    return channels, *wanted


def _pad(node: Node, inputs: list[Value]) -> tuple[int, ...]:
    _same_values(node, inputs)
    sizes = zip(_plane(inputs[0]), node.attributes["before"], node.attributes["after"], strict=True)
    return tuple(map(sum, sizes))


def _roll(node: Node, inputs: list[Value]) -> tuple[int, ...]:
    _same_values(node, inputs)
    axes, shape = node.attributes["axes"], inputs[0].shape
    if len(axes) != len(node.attributes["shifts"]) or len({*axes}) < len(axes):
        raise ValueError("axes and shifts are of one length, each axis once")
    if max(axes) > len(shape):
        raise ValueError(f"{inputs[0]} has no axis {max(axes)}")
    return shape


def _matmul(node: Node, inputs: list[Value]) -> tuple[int, ...]:
    a, b = (value.shape for value in inputs)
    if len(a) < 2 or len(a) != len(b) or a[:-2] != b[:-2] or a[-1] != b[-2]:
        raise ValueError(f"{inputs[0]} and {inputs[1]} cannot be multiplied")
    factor = node.attributes["factor"]
    if float(np.float32(factor)) != factor or not factor:
        raise ValueError(f"the factor {factor!r} is zero or not a float32 number")
    worst = float(a[-1])
    for grid in (value.grid for value in inputs):
        if grid is not None:
            worst *= grid.reach
    if worst >= 2**31:
        raise ValueError("its int32 sums may overflow")
    return *a[:-1], b[-1]


def _constant(node: Node, inputs: list[Value]) -> tuple[int, ...]:
    return node.tensors["value"].shape


def _layer_norm(node: Node, inputs: list[Value]) -> tuple[int, ...]:
    _check_affine(node, inputs[0].shape[-1])
    return inputs[0].shape


def _group_norm(node: Node, inputs: list[Value]) -> tuple[int, ...]:
    channels = inputs[0].shape[0]
    if channels % node.attributes["groups"]:
        raise ValueError(f"{channels} channels are not {node.attributes['groups']} equal groups")
    _check_affine(node, channels)
    return inputs[0].shape


def _normalized(node: Node, inputs: list[Value]) -> tuple[int, ...]:
    if not 0 < node.attributes["eps"] < 1:
        raise ValueError("eps is a small positive number")
    return inputs[0].shape


def _check_affine(node: Node, channels: int) -> None:
    if any(node.tensors[name].shape != (channels,) for name in ("weight", "bias")):
        raise ValueError(f"weight and bias have one value for each of {channels} channels")
    if not 0 < node.attributes["eps"] < 1:
        raise ValueError("eps is a small positive number")


def _same_values(node: Node, inputs: list[Value]) -> None:
    for value in inputs:
        if value.grid and node.grid and not node.grid.same_values(value.grid):
            raise ValueError("the output must have the scale and zero point of every input")


def _plane(value: Value) -> tuple[int, int, int]:
    if len(value.shape) != 3:
        raise ValueError(f"it needs an input [N, C, H, W], not {value}")
    return value.shape[0], value.shape[1], value.shape[2]


MOST_ELEMENTS = 2**26
"""Of one activation of one image, and of what is needed to compute it."""
_INT64 = 2**63 - 1
MOST_AXES = 6
"""Beside the batch."""
LARGEST_EXPONENT = 32
"""Of the powers of two between which a product is exact, and far from the ends of float32."""
LARGEST_WINDOW = 256
"""Of a pool, in either direction."""
_KERNEL: dict[str, Kind] = {
    "kernel": Ints(2, 1, LARGEST_WINDOW),
    "stride": Ints(2, 1),
    "padding": Ints(2, 0),
    "ceil_mode": "bool",
}
_CONV: dict[str, Kind] = {
    "stride": Ints(2, 1),
    "padding": Ints(4, 0),
    "dilation": Ints(2, 1),
    "groups": Ints(1, 1),
}
_CUT = {
    "axes": Ints(None, 1),
    "starts": Ints(None, -_INT64, _INT64),
    "ends": Ints(None, -_INT64, _INT64),
    "steps": Ints(None, 1),
}
RULES = {
    "quantize": Rule(_unchanged, 1, "float", "grid", {}),
    "dequantize": Rule(_unchanged, 1, "grid", "float", {}),
    "requantize": Rule(_unchanged, 1, "grid", "grid", {}),
    "threshold": Rule(
        _threshold,
        1,
        "grid",
        "grid",
        {"thresholds": Ints(None, 1, 256, most=2**MOST_THRESHOLD_BITS - 1)},
    ),
    "conv2d": Rule(_conv2d, 1, "any", "any", _CONV, weight_dims=4),
    "linear": Rule(_linear, 1, "any", "any", {}, weight_dims=2),
    "add": Rule(_add, 2, "any", "same", {}),
    "mul": Rule(_mul, 2, "any", "same", {}),
    "lookup": Rule(_lookup, 1, "grid", "grid", {}, tensors=("table",)),
    "function": Rule(_function, 1, "float", "float", {"name": "name", "parameters": "numbers"}),
    "clip": Rule(_clip, 1, "float", "float", {"min": "number", "max": "number or None"}),
    "max_pool2d": Rule(_max_pool2d, 1, "any", "same", {**_KERNEL, "dilation": Ints(2, 1)}),
    "avg_pool2d": Rule(_avg_pool2d, 1, "any", "same", {**_KERNEL, "count_include_pad": "bool"}),
    "adaptive_avg_pool2d": Rule(_sized, 1, "any", "same", {"size": Ints(2, 1)}),
    "global_avg_pool": Rule(_global_avg_pool, 1, "any", "any", {}),
    "concat": Rule(_concat, None, "any", "same", {}),
    "flatten": Rule(_flatten, 1, "any", "same", {}),
    "slice": Rule(_slice, 1, "any", "same", _CUT),
    "reshape": Rule(_reshape, 1, "any", "same", {"shape": Ints(None, 1, 2**26, most=MOST_AXES)}),
    "transpose": Rule(
        _transpose, 1, "any", "same", {"axes": Ints(None, 1, MOST_AXES, most=MOST_AXES)}
    ),
    "upsample": Rule(_upsample, 1, "any", "same", {"size": Ints(2, 1)}),
    "resize": Rule(_sized, 1, "float", "float", {"size": Ints(2, 1), "align_corners": "bool"}),
    "pad": Rule(_pad, 1, "any", "same", {"before": Ints(3, 0), "after": Ints(3, 0)}),
    "roll": Rule(
        _roll,
        1,
        "any",
        "same",
        {"axes": Ints(None, 1, most=MOST_AXES), "shifts": Ints(None, -(2**16), most=MOST_AXES)},
    ),
    "matmul": Rule(_matmul, 2, "any", "any", {"factor": "number"}),
    "constant": Rule(_constant, 1, "float", "float", {}, tensors=("value",)),
    "layer_norm": Rule(
        _layer_norm, 1, "float", "float", {"eps": "number"}, tensors=("weight", "bias")
    ),
    "group_norm": Rule(
        _group_norm,
        1,
        "float",
        "float",
        {"groups": Ints(1, 1), "eps": "number"},
        tensors=("weight", "bias"),
    ),
    "softmax": Rule(_unchanged, 1, "float", "float", {}),
    "log_softmax": Rule(_unchanged, 1, "float", "float", {}),
    "l2_normalize": Rule(_normalized, 1, "float", "float", {"eps": "number"}),
    "rms_norm": Rule(_normalized, 1, "float", "float", {"eps": "number"}),
}
"""By the name of the operation; integer/ir.py says what they compute."""
