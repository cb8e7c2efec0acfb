"""Handlers of operations between values."""

from __future__ import annotations

from torch.fx import Node as FxNode

from mecq_cli.capture.reader import Reader, module_path
from mecq_cli.errors import UsageError


def add(reader: Reader, node: FxNode) -> None:
    """The sum of two values of one shape."""
    a, b = node.args[0], node.args[1]
    if isinstance(a, FxNode) and a.op == "get_attr" and "num_batches_tracked" in str(a.target):
        return
    if not (isinstance(a, FxNode) and isinstance(b, FxNode)) or node.kwargs.get("alpha", 1) != 1:
        raise UsageError(f"layer {module_path(node)}: adding a constant has no integer form yet")
    shapes = [list(value.meta["val"].shape[1:]) for value in (a, b)]
    if shapes[0] != shapes[1]:
        raise UsageError(
            f"layer {module_path(node)}: adding values of different shapes, {shapes[0]} and "
            f"{shapes[1]}, has no integer form here yet; this model cannot be quantized"
        )
    reader.add(node, "add", [a, b], suffix="add")
