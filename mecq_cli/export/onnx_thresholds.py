"""Writes a threshold operation as ONNX nodes: which of the thresholds a byte reaches, counted.

On a grid without zero each of them counts twice.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from onnx import TensorProto

from mecq_cli.export.onnx_builder import Builder
from mecq_cli.integer.ir import Node


def emit_threshold(builder: Builder, node: Node) -> None:
    """In bytes throughout, which is exact and fast; those out of reach are left out.

    Tried on onnxruntime 1.24.1 and 1.32: a Gather from a table of 256 codes takes 8 ns a value,
    comparisons that are added up 0.1 ns for each threshold, clips twice that.
    """
    assert node.grid is not None
    top, spacing = builder.integer_grid(node).qmax, node.grid.spacing
    reachable = [t for t in node.attributes["thresholds"] if t <= top]
    if not reachable:
        zero = builder.scalar(np.uint8(0))
        builder.emit("Clip", [node.inputs[0], zero, zero], node.name)
    elif builder.tuned:
        _compared(builder, node, reachable, spacing)
    else:
        _clipped(builder, node, reachable, spacing)


def _compared(builder: Builder, node: Node, thresholds: Sequence[int], spacing: int) -> None:
    """Comparisons as bytes, added up. Add knows bytes since opset 14."""
    name, code = node.name, ""
    for number, threshold in enumerate(thresholds, 1):
        final = spacing == 1 and number == len(thresholds)
        inputs = [node.inputs[0], builder.scalar(np.uint8(threshold))]
        reached = builder.emit("GreaterOrEqual", inputs, f"{name}::reached_{number}")
        output = name if final and not code else f"{name}::one_{number}"
        one = builder.emit("Cast", [reached], output, to=TensorProto.UINT8)
        if code:
            one = builder.emit("Add", [code, one], name if final else f"{name}::code_{number}")
        code = one
    if spacing == 2:
        builder.emit("Add", [code, code], name)


def _clipped(builder: Builder, node: Node, thresholds: Sequence[int], spacing: int) -> None:
    """Clips to [t - 1, t], which are t - 1 and, where the threshold is reached, one more.

    For runtimes of any age: nothing but what the other operations need as well. Two are added at a
    time, which makes a QLinearAdd.
    """
    name, value = node.name, ""
    unit, zero = builder.scalar(np.float32(1)), builder.scalar(np.uint8(0))
    distance = builder.scalar(np.float32(spacing))
    for number, threshold in enumerate(thresholds, 1):
        low, high = (builder.scalar(np.uint8(end)) for end in (threshold - 1, threshold))
        clipped = builder.emit("Clip", [node.inputs[0], low, high], f"{name}::clipped_{number}")
        one = builder.emit("DequantizeLinear", [clipped, distance, low], f"{name}::one_{number}")
        if not value:
            value = one
            continue
        value = builder.emit("Add", [value, one], f"{name}::sum_{number}")
        if number < len(thresholds):
            code = [builder.emit("QuantizeLinear", [value, unit, zero], f"{name}::code_{number}")]
            value = builder.emit("DequantizeLinear", [*code, unit, zero], f"{name}::float_{number}")
    builder.emit("QuantizeLinear", [value, unit, zero], name)
