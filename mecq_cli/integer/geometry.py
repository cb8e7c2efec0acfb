"""How windows lie over an image: how many, what padding they need, how many values they hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from mecq_cli.errors import ArtifactError
from mecq_cli.integer.ir import INPUT, IntegerModel, Node
from mecq_cli.integer.operations import RULES, Value

Shape = tuple[int, ...]
"""Of one sample: without the batch axis."""


@dataclass(frozen=True)
class Windows:
    """The windows of a convolution or pooling along one axis.

    Attributes:
        size: of the input, without padding.
        kernel, stride, dilation: as in PyTorch.
        padding: before the input (and after it, where windows count padding).
        outputs: the number of windows.
    """

    size: int
    kernel: int
    stride: int
    dilation: int
    padding: int
    outputs: int

    @property
    def end_padding(self) -> int:
        """Values that must follow the input so that the last window is complete, at least 0.

        More than ``padding`` where ceil_mode added a window, less where the stride leaves a rest.
        """
        reach = (self.outputs - 1) * self.stride + self.dilation * (self.kernel - 1) + 1
        return max(reach - self.size - self.padding, 0)

    def counts(self, include_padding: bool) -> NDArray[np.int64]:
        """Values in each window, [outputs], as PyTorch's average pooling counts them.

        What a window of ceil_mode covers beyond the padding never counts.
        """
        start = np.arange(self.outputs) * self.stride - self.padding
        end = start + self.kernel
        if include_padding:
            return np.minimum(end, self.size + self.padding) - start
        return np.minimum(end, self.size) - np.maximum(start, 0)


def windows(node: Node, shape: Shape) -> tuple[Windows, Windows]:
    """The windows of a conv2d, max_pool2d or avg_pool2d over an input [C, H, W]: rows, columns.

    Raises:
        ArtifactError: the node does not fit the input.
    """
    attributes = node.attributes
    kernel = node.tensors["weight"].shape[2:] if node.op == "conv2d" else attributes["kernel"]
    dilation = attributes.get("dilation", (1, 1))
    outputs = _output_shape(node, [Value(shape, None)])[1:]
    rows, columns = (
        Windows(
            size=shape[1 + axis],
            kernel=kernel[axis],
            stride=attributes["stride"][axis],
            dilation=dilation[axis],
            padding=attributes["padding"][axis],
            outputs=outputs[axis],
        )
        for axis in (0, 1)
    )
    return rows, columns


def adaptive_windows(node: Node, shape: Shape) -> tuple[list[tuple[int, int]], ...]:
    """First and end of each window of an adaptive_avg_pool2d, of rows and of columns."""
    return tuple(
        [(i * n // m, -(-(i + 1) * n // m)) for i in range(m)]
        for n, m in zip(shape[1:], node.attributes["size"], strict=True)
    )


def adaptive_places(
    node: Node, shape: Shape
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    """An adaptive_avg_pool2d as matrices, rows @ x @ columns.T being the sums of its windows.

    Returns:
        rows [H', H] and columns [W', W] of zeros and ones, and how many values are in each window,
        [H', W'].
    """
    rows, columns = (
        np.array([(np.arange(size) >= a) & (np.arange(size) < b) for a, b in found], np.float32)
        for size, found in zip(shape[1:], adaptive_windows(node, shape), strict=True)
    )
    counts = np.outer(rows.sum(1), columns.sum(1)).astype(np.float32)
    return rows, columns, counts


def nearest(node: Node, shape: Shape) -> tuple[list[int], list[int]]:
    """Which row and which column of the input each one of an upsample repeats."""
    rows, columns = (
        [i * n // m for i in range(m)]
        for n, m in zip(shape[1:], node.attributes["size"], strict=True)
    )
    return rows, columns


def shapes(model: IntegerModel) -> dict[str, Shape]:
    """The shape of every node's output (and of the input) for one image.

    Raises:
        ArtifactError: the shapes of a model do not fit together.
    """
    known = {INPUT: Value(tuple(model.input_shape), None)}
    for node in model.nodes:
        inputs = [known[name] for name in node.inputs]
        known[node.name] = Value(_output_shape(node, inputs), node.grid)
    return {name: value.shape for name, value in known.items()}


def _output_shape(node: Node, inputs: list[Value]) -> Shape:
    rule = RULES.get(node.op)
    if rule is None:
        raise ArtifactError(
            f"{node.name}: unknown operation '{node.op}'; known are {', '.join(RULES)}"
        )
    try:
        return rule.shape(node, inputs)
    except ValueError as reason:
        raise ArtifactError(f"{node.name} ({node.op}): {reason}") from reason


def taps(x: NDArray[Any], rows: Windows, columns: Windows, fill: float = 0) -> list[NDArray[Any]]:
    """What each place of the kernel meets: views [N, C, rows, columns] of the padded input.

    Args:
        x: [N, C, H, W].
        rows, columns: the windows along H and W.
        fill: what to pad with.
    """
    margins = [(axis.padding, axis.end_padding) for axis in (rows, columns)]
    padded = np.pad(x, [(0, 0), (0, 0), *margins], constant_values=fill)
    n, c, h, w = padded.strides
    shape = (*x.shape[:2], rows.outputs, columns.outputs)
    strides = (n, c, h * rows.stride, w * columns.stride)
    return [
        as_strided(
            padded[:, :, i * rows.dilation :, j * columns.dilation :],
            shape,
            strides,
            writeable=False,
        )
        for i in range(rows.kernel)
        for j in range(columns.kernel)
    ]
