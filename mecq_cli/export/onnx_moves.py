"""Writes operations that move or clip values, or act on floats, the same in every profile."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from mecq_cli.errors import ArtifactError
from mecq_cli.export.onnx_builder import GraphBuilder
from mecq_cli.export.onnx_functions import emit_function
from mecq_cli.integer.geometry import Windows, nearest, windows
from mecq_cli.integer.ir import Node


def pads(axes: tuple[Windows, Windows]) -> list[int]:
    """Top, left, bottom, right; what ceil_mode needs is in it."""
    rows, columns = axes
    return [rows.padding, columns.padding, rows.end_padding, columns.end_padding]


def _clip(builder: GraphBuilder, node: Node) -> None:
    bounds = [node.attributes["min"], node.attributes["max"]]
    if bounds == [0.0, None]:
        builder.emit("Relu", node.inputs, node.name)
        return
    scalars = [builder.scalar(np.float32(bound)) for bound in bounds if bound is not None]
    builder.emit("Clip", [node.inputs[0], *scalars], node.name)


def _max_pool2d(builder: GraphBuilder, node: Node) -> None:
    axes = windows(node, builder.shapes[node.inputs[0]])
    if any(axis.end_padding >= axis.kernel for axis in axes):
        raise ArtifactError(
            f"{node.name}: onnxruntime has no max pooling with kernel {node.attributes['kernel']}, "
            f"dilation {node.attributes['dilation']} and that much padding; use another model"
        )
    builder.passed(
        "MaxPool",
        node,
        kernel_shape=[axis.kernel for axis in axes],
        strides=[axis.stride for axis in axes],
        dilations=[axis.dilation for axis in axes],
        pads=pads(axes),
    )


def _concat(builder: GraphBuilder, node: Node) -> None:
    builder.passed("Concat", node, axis=1)


def _flatten(builder: GraphBuilder, node: Node) -> None:
    builder.passed("Flatten", node, axis=1)


def _slice(builder: GraphBuilder, node: Node) -> None:
    names = ("starts", "ends", "axes", "steps")
    vectors = [np.array(node.attributes[name], np.int64) for name in names]
    stored = [
        builder.constant(vector, f"{node.name}::{name}")
        for name, vector in zip(names, vectors, strict=True)
    ]
    builder.passed("Slice", node, stored)


def _reshape(builder: GraphBuilder, node: Node) -> None:
    shape = [-1, *node.attributes["shape"]]  # -1: the batch
    builder.passed(
        "Reshape", node, [builder.constant(np.array(shape, np.int64), f"int64::{shape}")]
    )


def _transpose(builder: GraphBuilder, node: Node) -> None:
    builder.passed("Transpose", node, perm=[0, *node.attributes["axes"]])


def _upsample(builder: GraphBuilder, node: Node) -> None:
    """Resize where it repeats each value as often; it finds places in floats, which may err."""
    shape, size = builder.shapes[node.inputs[0]], node.attributes["size"]
    if all(m % n == 0 for n, m in zip(shape[1:], size, strict=True)):
        factors = [1.0, 1.0, *(m / n for n, m in zip(shape[1:], size, strict=True))]
        scales = builder.constant(np.array(factors, np.float32), f"{node.name}::scales")
        how = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
        builder.passed("Resize", node, ["", scales], mode="nearest", **how)
        return
    rows, columns = (
        builder.constant(np.array(places, np.int64), f"{node.name}::{name}")
        for name, places in zip(("rows", "columns"), nearest(node, shape), strict=True)
    )
    tall = (1, shape[0], size[0], shape[2])
    value = builder.emit("Gather", [node.inputs[0], rows], f"{node.name}::tall", axis=2, shape=tall)
    builder.passed("Gather", node, [columns], value, axis=3)


def _pad(builder: GraphBuilder, node: Node) -> None:
    widths = [0, *node.attributes["before"], 0, *node.attributes["after"]]
    stored = builder.constant(np.array(widths, np.int64), f"{node.name}::pads")
    builder.passed("Pad", node, [stored, builder.zero(builder.input_grid(node))])


def _roll(builder: GraphBuilder, node: Node) -> None:
    """ONNX has no such operator: the two parts of each axis change places."""
    value, name = node.inputs[0], node.name
    shape = builder.shapes[node.inputs[0]]
    pairs = list(zip(node.attributes["axes"], node.attributes["shifts"], strict=True))
    for index, (axis, shift) in enumerate(pairs):
        size = shape[axis - 1]
        cut = -shift % size
        parts = []
        for part, bounds in enumerate(((cut, size), (0, cut))):
            stored = [
                builder.constant(np.array([bound], np.int64), f"{name}::{key}_{index}_{part}")
                for key, bound in zip(("start", "end", "axis"), (*bounds, axis), strict=True)
            ]
            cut_shape = (1, *shape[: axis - 1], bounds[1] - bounds[0], *shape[axis:])
            parts.append(
                builder.emit(
                    "Slice", [value, *stored], f"{name}::part_{index}_{part}", shape=cut_shape
                )
            )
        last = index == len(pairs) - 1
        value = builder.emit("Concat", parts, name if last else f"{name}::axis_{index}", axis=axis)


def _function(builder: GraphBuilder, node: Node) -> None:
    """Of operators that opset 13 has; on floats, so not to the last bit as anywhere else."""
    a = node.attributes
    emit_function(builder, node.inputs[0], a["name"], a["parameters"], node.name)


MOVES: dict[str, Callable[[GraphBuilder, Node], None]] = {
    "clip": _clip,
    "function": _function,
    "max_pool2d": _max_pool2d,
    "concat": _concat,
    "flatten": _flatten,
    "slice": _slice,
    "reshape": _reshape,
    "transpose": _transpose,
    "upsample": _upsample,
    "pad": _pad,
    "roll": _roll,
}
