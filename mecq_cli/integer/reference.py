"""Executes an `IntegerModel` with NumPy, exactly as the table in `mecq_cli.integer.ir` says.

Sums of integers run through floating point matrix products, which are fast and still exact:
in float32 where no partial sum can reach 2**24, else in float64 (2**53).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any, Literal, overload

import numpy as np
from numpy.typing import NDArray

from mecq_cli.errors import ArtifactError, UsageError
from mecq_cli.integer.float_operations import FLOAT_OPERATIONS
from mecq_cli.integer.functions import FUNCTIONS
from mecq_cli.integer.geometry import adaptive_windows, nearest, shapes, taps, windows
from mecq_cli.integer.ir import EXACT, INPUT, MOVES, Grid, IntegerModel, Node, multiplied_weight

Array = NDArray[Any]
Float = NDArray[np.float32]

_WORKSPACE_BYTES = 8 * 2**20
"""For the unfolded input of a convolution: what stays in the caches is twice as fast."""


@overload
def run(model: IntegerModel, images: Array, *, keep: Literal[False] = False) -> Float: ...


@overload
def run(model: IntegerModel, images: Array, *, keep: Literal[True]) -> dict[str, Array]: ...


def run(model: IntegerModel, images: Array, *, keep: bool = False) -> Float | dict[str, Array]:
    """The logits of a batch.

    Args:
        model: a valid model.
        images: float32 [N, C, H, W], preprocessed; any N, worked off in bounded parts.
        keep: return the output of every node by its name instead (uint8 on a grid, else
            float32), which takes memory for all of them.

    Returns:
        Logits float32 [N, classes], dequantized if the last node has a grid; or that dict.

    Raises:
        UsageError: the images have another shape than the model wants.
        ArtifactError: an operation is unknown or its shapes do not fit.
    """
    if images.ndim != 4 or images.shape[1:] != tuple(model.input_shape) or not len(images):
        raise UsageError(
            f"images have the shape {list(images.shape)}, the model wants "
            f"[N, {', '.join(map(str, model.input_shape))}] with N of at least 1"
        )
    step = _batch_size(model)
    parts = [
        _run_part(model, np.asarray(images[start : start + step], np.float32), keep)
        for start in range(0, len(images), step)
    ]
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    if keep:
        return joined
    output = model.output
    logits = joined[output.name]
    return logits if output.grid is None else _dequantize(logits, output.grid)


def execute(node: Node, inputs: Sequence[Array], grids: Sequence[Grid | None]) -> Array:
    """The output of one operation, uint8 if it has a grid, else float32.

    Args:
        node: the operation.
        inputs: the values it reads, with the batch axis.
        grids: their grids, None for float values.

    Raises:
        ArtifactError: the operation is unknown or the inputs do not fit it.
    """
    if node.op in FLOAT_OPERATIONS:
        return FLOAT_OPERATIONS[node.op](node, inputs)
    operation = _OPERATIONS.get(node.op)
    if operation is None:
        known = ", ".join((*_OPERATIONS, *FLOAT_OPERATIONS))
        raise ArtifactError(f"{node.name}: unknown operation '{node.op}'; known are {known}")
    output = operation(node, inputs, grids)
    if node.op in MOVES and node.grid is not None:
        return np.clip(output, np.uint8(node.grid.qmin), np.uint8(node.grid.qmax))
    return output


def _batch_size(model: IntegerModel) -> int:
    """Images at a time, so that the unfolded input of no convolution outgrows the workspace."""
    known = shapes(model)
    largest = max(int(np.prod(shape)) for shape in known.values())
    for node in model.nodes:
        if node.op == "conv2d":
            unfolded = (*node.tensors["weight"].shape[1:], *known[node.name][1:])
            largest = max(largest, int(np.prod(unfolded)) * int(node.attributes["groups"]))
    return max(1, _WORKSPACE_BYTES // (4 * largest))


def _run_part(model: IntegerModel, images: Float, keep: bool) -> dict[str, Array]:
    grids: dict[str, Grid | None] = {node.name: node.grid for node in model.nodes}
    grids[INPUT] = None
    uses = Counter(name for node in model.nodes for name in node.inputs)
    values: dict[str, Array] = {INPUT: images}
    for node in model.nodes:
        inputs = [values[name] for name in node.inputs]
        values[node.name] = execute(node, inputs, [grids[name] for name in node.inputs])
        if not keep:
            uses.subtract(node.inputs)
            for name in set(node.inputs):
                if not uses[name]:
                    del values[name]
    wanted = [node.name for node in model.nodes] if keep else [model.output.name]
    return {name: values[name] for name in wanted}


def _dequantize(q: Array, grid: Grid) -> Float:
    values: Float = _centred(q, grid, np.float32) * np.float32(grid.scale)
    return values


def _to_grid(steps: Array, grid: Grid) -> Array:
    """Round what is counted in steps of a grid, move it by the zero point and clip it."""
    shifted = np.rint(steps) + np.asarray(grid.zero_point, steps.dtype)
    q: Array = np.clip(shifted, grid.qmin, grid.qmax).astype(np.uint8)
    return q


def _centred(q: Array, grid: Grid, dtype: type[np.floating[Any]]) -> Array:
    """The integers without their zero point, in a float type that holds them exactly."""
    centred: Array = q.astype(dtype) - dtype(grid.zero_point)
    return centred


def _accumulator(node: Node, grid: Grid) -> type[np.floating[Any]]:
    """float32 where every partial sum of ``|q - z| |w| + |b|`` is below 2**24."""
    weight, bias = multiplied_weight(node), node.tensors["bias"]
    sums = np.abs(weight.astype(np.int64)).reshape(len(weight), -1).sum(1) * grid.reach
    largest = int((sums + np.abs(bias.astype(np.int64))).max())
    return np.float32 if largest < EXACT else np.float64


def _quantize(node: Node, inputs: Sequence[Array], grids: Sequence[Grid | None]) -> Array:
    output = _grid(node.grid, node)
    values = inputs[0] if grids[0] is None else _dequantize(inputs[0], grids[0])
    return _to_grid(values / np.float32(output.scale), output)


def _dequantize_node(node: Node, inputs: Sequence[Array], grids: Sequence[Grid | None]) -> Array:
    return _dequantize(inputs[0], _grid(grids[0], node))


def _threshold(node: Node, inputs: Sequence[Array], grids: Sequence[Grid | None]) -> Array:
    reached = np.searchsorted(node.attributes["thresholds"], inputs[0], side="right")
    codes: Array = (reached * _grid(node.grid, node).spacing).astype(np.uint8)
    return codes


def _lookup(node: Node, inputs: Sequence[Array], grids: Sequence[Grid | None]) -> Array:
    found: Array = node.tensors["table"][inputs[0]]
    return found


def _function(node: Node, inputs: Sequence[Array], grids: Sequence[Grid | None]) -> Array:
    call = FUNCTIONS[node.attributes["name"]].call
    value: Array = call(inputs[0], *node.attributes["parameters"]).astype(np.float32)
    return value


def _mul(node: Node, inputs: Sequence[Array], grids: Sequence[Grid | None]) -> Array:
    if node.grid is None:
        return np.multiply(*inputs)
    a, b = (
        _centred(q, _grid(grid, node), np.float64) * _grid(grid, node).scale
        for q, grid in zip(inputs, grids, strict=True)
    )
    steps = np.rint(a * b / node.grid.scale + node.grid.zero_point)
    clipped: Array = np.clip(steps, node.grid.qmin, node.grid.qmax).astype(np.uint8)
    return clipped


def _matmul(node: Node, inputs: Sequence[Array], grids: Sequence[Grid | None]) -> Array:
    factor = np.float32(node.attributes["factor"])
    if grids[0] is None:
        scaled: Array = np.matmul(*inputs) * factor
        return scaled
    a, b = (_grid(grid, node) for grid in grids)
    exact = inputs[0].shape[-1] * a.reach * b.reach < EXACT
    dtype = np.float32 if exact else np.float64
    acc = np.matmul(_centred(inputs[0], a, dtype), _centred(inputs[1], b, dtype))
    multiplier = np.float32(a.scale) * factor * np.float32(b.scale)
    if node.grid is None:
        product: Array = acc.astype(np.float32) * multiplier
        return product
    return _to_grid(acc.astype(np.float32) * (multiplier / np.float32(node.grid.scale)), node.grid)


def _roll(node: Node, inputs: Sequence[Array], grids: Sequence[Grid | None]) -> Array:
    return np.roll(inputs[0], node.attributes["shifts"], node.attributes["axes"])


def _add(node: Node, inputs: Sequence[Array], grids: Sequence[Grid | None]) -> Array:
    if node.grid is None:
        return np.add(*inputs)
    steps = np.full(1, float(node.grid.zero_point))
    for q, grid in zip(inputs, grids, strict=True):
        ratio = _grid(grid, node).scale / node.grid.scale
        steps = steps + _centred(q, _grid(grid, node), np.float64) * ratio
    # The zero point goes in before the rounding, as in QLinearAdd; for an even one it is equal.
    clipped: Array = np.clip(np.rint(steps), node.grid.qmin, node.grid.qmax).astype(np.uint8)
    return clipped


def _clip(node: Node, inputs: Sequence[Array], grids: Sequence[Grid | None]) -> Array:
    low, high = (
        None if bound is None else np.float32(bound)
        for bound in (node.attributes["min"], node.attributes["max"])
    )
    return np.clip(inputs[0], low, high)


def _max_pool2d(node: Node, inputs: Sequence[Array], grids: Sequence[Grid | None]) -> Array:
    x = inputs[0]
    # No window is all padding, so the least uint8 does for -inf.
    fill = -np.inf if grids[0] is None else 0
    return reduce(np.maximum, taps(x, *windows(node, x.shape[1:]), fill))


def _avg_pool2d(node: Node, inputs: Sequence[Array], grids: Sequence[Grid | None]) -> Array:
    x, grid = inputs[0], grids[0]
    rows, columns = windows(node, x.shape[1:])
    include = bool(node.attributes["count_include_pad"])
    counts = np.outer(rows.counts(include), columns.counts(include)).astype(np.float32)
    values = x if grid is None else _centred(x, grid, np.float32)
    total = reduce(np.add, taps(values, rows, columns))
    return total / counts if grid is None else _average(node, total, grid, counts)


def _adaptive_avg_pool2d(
    node: Node, inputs: Sequence[Array], grids: Sequence[Grid | None]
) -> Array:
    x, grid = inputs[0], grids[0]
    rows, columns = adaptive_windows(node, x.shape[1:])
    values = x if grid is None else _centred(x, grid, np.float64)
    total = np.stack([values[:, :, a:b].sum(2) for a, b in rows], 2)
    total = np.stack([total[:, :, :, a:b].sum(3) for a, b in columns], 3)
    tall, wide = ([b - a for a, b in axis] for axis in (rows, columns))
    counts = np.outer(tall, wide).astype(np.float32)
    if grid is None:
        mean: Array = (total / counts).astype(np.float32)
        return mean
    return _average(node, total, grid, counts)


def _global_avg_pool(node: Node, inputs: Sequence[Array], grids: Sequence[Grid | None]) -> Array:
    x, grid = inputs[0], grids[0]
    if grid is None:
        mean: Array = x.mean((2, 3), keepdims=True)
        return mean
    total = _centred(x, grid, np.float64).sum((2, 3), keepdims=True)
    return _average(node, total, grid, np.float32(x.shape[2] * x.shape[3]))


def _average(node: Node, total: Array, grid: Grid, counts: Float | np.float32) -> Array:
    scale = np.float32(grid.scale)
    if node.grid is None:
        return total.astype(np.float32) * (scale / counts)
    multiplier = scale / (np.float32(node.grid.scale) * counts)
    return _to_grid(total.astype(np.float32) * multiplier, node.grid)


def _concat(node: Node, inputs: Sequence[Array], grids: Sequence[Grid | None]) -> Array:
    return np.concatenate(list(inputs), axis=1)


def _flatten(node: Node, inputs: Sequence[Array], grids: Sequence[Grid | None]) -> Array:
    return inputs[0].reshape(len(inputs[0]), -1)


def _slice(node: Node, inputs: Sequence[Array], grids: Sequence[Grid | None]) -> Array:
    index = [slice(None)] * inputs[0].ndim
    bounds = (node.attributes[name] for name in ("starts", "ends", "steps"))
    for axis, *bound in zip(node.attributes["axes"], *bounds, strict=True):
        index[axis] = slice(*bound)
    return inputs[0][tuple(index)]


def _reshape(node: Node, inputs: Sequence[Array], grids: Sequence[Grid | None]) -> Array:
    return inputs[0].reshape(len(inputs[0]), *node.attributes["shape"])


def _transpose(node: Node, inputs: Sequence[Array], grids: Sequence[Grid | None]) -> Array:
    return np.ascontiguousarray(inputs[0].transpose(0, *node.attributes["axes"]))


def _upsample(node: Node, inputs: Sequence[Array], grids: Sequence[Grid | None]) -> Array:
    rows, columns = nearest(node, inputs[0].shape[1:])
    return inputs[0][:, :, rows][:, :, :, columns]


def _pad(node: Node, inputs: Sequence[Array], grids: Sequence[Grid | None]) -> Array:
    widths = zip(node.attributes["before"], node.attributes["after"], strict=True)
    fill = 0 if grids[0] is None else grids[0].zero_point
    return np.pad(inputs[0], [(0, 0), *widths], constant_values=fill)


def _weighted(node: Node, inputs: Sequence[Array], grids: Sequence[Grid | None]) -> Array:
    """conv2d and linear."""
    x, grid, tensors = inputs[0], grids[0], node.tensors
    axis = 1 if node.op == "conv2d" else -1
    if grid is None:
        weight = tensors["weight"].astype(np.float32)
        weight = weight * _channels(tensors["weight_scale"], weight.ndim)
        return _product(node, x, weight) + _channels(tensors["bias"], x.ndim, axis)
    dtype = _accumulator(node, grid)
    acc = _product(node, _centred(x, grid, dtype), multiplied_weight(node).astype(dtype))
    acc = (acc + _channels(tensors["bias"].astype(dtype), x.ndim, axis)).astype(np.float32)
    multiplier = np.float32(grid.scale) * tensors["weight_scale"].astype(np.float32)
    if node.grid is None:
        return acc * _channels(multiplier, x.ndim, axis)
    multiplier = multiplier / np.float32(node.grid.scale)
    return _to_grid(acc * _channels(multiplier, x.ndim, axis), node.grid)


def _product(node: Node, x: Array, weight: Array) -> Array:
    """[N, C, H, W] with [O, C/groups, kh, kw], or [N, ..., I] with [O, I]; of one float type."""
    product: Array
    if node.op == "linear":
        product = x @ weight.T
        return product
    rows, columns = windows(node, x.shape[1:])
    views = taps(x, rows, columns)
    groups, outputs = int(node.attributes["groups"]), len(weight)
    if groups == x.shape[1]:
        # Depthwise: too little to multiply for a matrix product.
        acc = np.zeros((len(x), outputs, rows.outputs, columns.outputs), x.dtype)
        repeats = outputs // groups
        for factor, view in zip(weight.reshape(outputs, -1).T, views, strict=True):
            repeated = view if repeats == 1 else np.repeat(view, repeats, axis=1)
            acc += repeated * factor[:, None, None]
        return acc
    unfolded = np.stack(views, axis=2)  # [N, C, taps, rows, columns]
    unfolded = unfolded.reshape(len(x), groups, -1, rows.outputs * columns.outputs)
    product = np.matmul(weight.reshape(groups, outputs // groups, -1), unfolded)
    return product.reshape(len(x), outputs, rows.outputs, columns.outputs)


def _channels(vector: Array, ndim: int, axis: int = 0) -> Array:
    """[C] shaped so that it broadcasts along one axis of an array with ``ndim`` axes."""
    shape = [1] * ndim
    shape[axis] = -1
    return vector.reshape(shape)


def _grid(grid: Grid | None, node: Node) -> Grid:
    if grid is None:
        raise ArtifactError(f"{node.name}: {node.op} needs a grid and got a float")
    return grid


_Operation = Callable[[Node, Sequence[Array], Sequence[Grid | None]], Array]

_OPERATIONS: dict[str, _Operation] = {
    "quantize": _quantize,
    "requantize": _quantize,
    "threshold": _threshold,
    "dequantize": _dequantize_node,
    "conv2d": _weighted,
    "linear": _weighted,
    "lookup": _lookup,
    "add": _add,
    "mul": _mul,
    "clip": _clip,
    "function": _function,
    "max_pool2d": _max_pool2d,
    "avg_pool2d": _avg_pool2d,
    "global_avg_pool": _global_avg_pool,
    "adaptive_avg_pool2d": _adaptive_avg_pool2d,
    "concat": _concat,
    "flatten": _flatten,
    "slice": _slice,
    "reshape": _reshape,
    "transpose": _transpose,
    "upsample": _upsample,
    "pad": _pad,
    "roll": _roll,
    "matmul": _matmul,
}
