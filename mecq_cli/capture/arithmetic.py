"""Handlers of operations between values."""

from __future__ import annotations

from torch.fx import Node as FxNode

from mecq_cli.capture.layout import layout
from mecq_cli.capture.reader import Reader, module_path
from mecq_cli.errors import UsageError


def add(reader: Reader, node: FxNode) -> None:
    """The sum of two values of one shape, or of a value and a constant."""
    a, b = node.args[0], node.args[1]
    if isinstance(a, FxNode) and a.op == "get_attr" and "num_batches_tracked" in str(a.target):
        return
    if node.kwargs.get("alpha", 1) != 1:
        raise UsageError(f"layer {module_path(node)}: a sum with a factor is not supported")
    if not (reader.is_constant(a) or reader.is_constant(b)):
        shapes = [list(layout(value).shape) for value in (a, b) if isinstance(value, FxNode)]
        if shapes[0] != shapes[1]:
            raise UsageError(
                f"layer {module_path(node)}: adding values of different shapes, {shapes[0]} and "
                f"{shapes[1]}, has no integer form here yet; this model cannot be quantized"
            )
    reader.add(node, "add", [a, b], suffix="add")
