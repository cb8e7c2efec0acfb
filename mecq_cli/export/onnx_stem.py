"""Rewrites the convolution that reads the image so that onnxruntime has a fast kernel for it.

Its integer convolution without copies (im2col) wants a multiple of four input channels, and images
have three. So

* with a stride s, blocks of s x s pixels become channels: [C, H, W] -> [s * s * C, H/s, W/s], and
  the convolution has stride 1 and a kernel s times smaller. The blocks are aligned to the kernel's
  first position, not to the image, so that the image needs no padding;
* otherwise channels that hold the zero point are added.

New weights are zero. The sums are the same integers, in another order.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mecq_cli.export.onnx_builder import Builder
from mecq_cli.integer.ir import Node

MULTIPLE = 4
"""Bytes that one instruction multiplies and adds up: the channels must be a multiple."""


def rewrite_stem(builder: Builder, node: Node) -> tuple[Node, str | None]:
    """An operation that computes the same integers as ``node``, and its input tensor (uint8).

    Everything but a convolution that reads the image stays as it is, without a new input.
    """
    a = node.attributes
    if node.op != "conv2d" or not builder.reads_image(node) or a["groups"] != 1:
        return node, None
    channels, height, width = builder.shapes[node.inputs[0]]
    stride = a["stride"][0]
    if (
        stride % 2 == 0
        and a["stride"][1] == stride
        and height % stride == width % stride == 0
        and tuple(a["dilation"]) == (1, 1)
    ):
        return _blocks(node, (channels, height, width)), _to_blocks(builder, node, stride)
    if channels % MULTIPLE == 0:
        return node, None
    return _widened(builder, node, -channels % MULTIPLE)


def _blocks(node: Node, shape: tuple[int, int, int]) -> Node:
    """The convolution of blocks, with stride 1."""
    a, weight = node.attributes, node.tensors["weight"]
    stride = int(a["stride"][0])
    outputs, channels = weight.shape[:2]
    before, after, padding = [], [], []
    for axis, size in enumerate(shape[1:]):
        first, kernel = int(a["padding"][axis]), int(weight.shape[2 + axis])
        length = (size + first + int(a["padding"][2 + axis]) - kernel) // stride + 1
        lead = -first % stride  # zeros before the kernel, so that it begins where a block does
        taps = -(-(lead + kernel) // stride)
        before.append(lead)
        after.append(taps * stride - lead - kernel)
        blocks = (first + lead) // stride
        padding.append((blocks, length - 1 + taps - blocks - size // stride))
    widths = [(0, 0), (0, 0), *zip(before, after, strict=True)]
    padded: NDArray[Any] = np.pad(weight, widths)
    rows, columns = padded.shape[2] // stride, padded.shape[3] // stride
    split = padded.reshape(outputs, channels, rows, stride, columns, stride)
    # The order in which `_to_blocks` leaves the channels.
    moved = split.transpose(0, 5, 1, 3, 2, 4).reshape(outputs, -1, rows, columns)
    attributes = {
        **a,
        "stride": (1, 1),
        "padding": (padding[0][0], padding[1][0], padding[0][1], padding[1][1]),
    }
    tensors = {**node.tensors, "weight": np.ascontiguousarray(moved)}
    return replace(node, attributes=attributes, tensors=tensors)


def _to_blocks(builder: Builder, node: Node, stride: int) -> str:
    """Pixels of a block -> channels, in steps that are each fast in onnxruntime.

    Rows are moved whole. With the channels last, neighbours in a row need not be moved at all; the
    last transposition meets its inverse, which onnxruntime puts before its convolution.
    """
    channels, height, width = builder.shapes[node.inputs[0]]
    rows, columns = height // stride, width // stride
    steps: list[tuple[str, list[int]]] = [
        ("Reshape", [0, channels, rows, stride, width]),
        ("Transpose", [0, 1, 3, 2, 4]),
        ("Reshape", [0, channels * stride, rows, width]),
        ("Transpose", [0, 2, 3, 1]),
        ("Reshape", [0, rows, columns, channels * stride * stride]),
        ("Transpose", [0, 3, 1, 2]),
    ]
    value = node.inputs[0]
    for number, (op, numbers) in enumerate(steps):
        name = f"{node.name}::blocks_{number}"
        if op == "Reshape":
            shape = builder.constant(np.array(numbers, np.int64), f"{name}_shape")
            value = builder.emit(op, [value, shape], name)
        else:
            value = builder.emit(op, [value], name, perm=numbers)
    return value


def _widened(builder: Builder, node: Node, count: int) -> tuple[Node, str]:
    """With ``count`` more channels, which hold the zero point."""
    grid, name = builder.integer_grid(node), node.name
    widths = np.array([0, 0, 0, 0, 0, count, 0, 0], np.int64)
    pads = builder.constant(widths, f"{name}::more_channels")
    fill = builder.scalar(np.uint8(grid.zero_point))
    value = builder.emit("Pad", [node.inputs[0], pads, fill], f"{name}::widened")
    weight = np.pad(node.tensors["weight"], [(0, 0), (0, count), (0, 0), (0, 0)])
    return replace(node, tensors={**node.tensors, "weight": weight}), value
