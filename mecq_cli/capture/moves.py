"""Handlers of operations that move values and compute none."""

from __future__ import annotations

from torch.fx import Node as FxNode

from mecq_cli.capture.reader import Reader, module_path
from mecq_cli.errors import UsageError


def concat(reader: Reader, node: FxNode) -> None:
    """A concatenation of channels."""
    values = node.args[0]
    assert isinstance(values, (list, tuple))
    if int(reader.argument(node, 1, "dim", 0)) not in (1, -3):
        raise UsageError(f"layer {module_path(node)}: only channels can be concatenated")
    reader.add(node, "concat", list(values), suffix="concat")


def flatten(reader: Reader, node: FxNode) -> None:
    """flatten, view and reshape to [N, -1]; anything else is refused."""
    source = node.args[0]
    assert isinstance(source, FxNode)
    before, after = source.meta["val"].shape, node.meta["val"].shape
    if len(before) == len(after):
        reader.alias[node] = reader.source(source)
    elif len(after) == 2 and str(before[0]) == str(after[0]):
        reader.add(node, "flatten", [source])
    else:
        raise UsageError(
            f"layer {module_path(node)}: reshaping {list(before)} to {list(after)} has no "
            "integer form here yet"
        )


def slice(reader: Reader, node: FxNode) -> None:
    """A part of a value."""
    source = node.args[0]
    assert isinstance(source, FxNode)
    shape = source.meta["val"].shape
    axis = int(reader.argument(node, 1, "dim", 0)) % len(shape)
    start = int(reader.argument(node, 2, "start", 0) or 0)
    end = reader.argument(node, 3, "end")
    step = int(reader.argument(node, 4, "step", 1))
    whole = end is None or (isinstance(end, int) and end >= 2**62)
    if start == 0 and whole and step == 1:
        reader.alias[node] = reader.source(source)
        return
    if axis == 0:
        raise UsageError(f"layer {module_path(node)}: images of a batch cannot be split")
    length = int(shape[axis])
    stop = length if whole else min(int(end), length)
    attributes = {"axes": [axis], "starts": [start], "ends": [stop], "steps": [step]}
    reader.add(node, "slice", [source], suffix="slice", attributes=attributes)


def pad(reader: Reader, node: FxNode) -> None:
    """Zeros around a value."""
    widths = [int(w) for w in node.args[1]]  # type: ignore[union-attr, arg-type]
    mode = reader.argument(node, 2, "mode", "constant")
    value = reader.argument(node, 3, "value", 0.0) or 0.0
    if mode != "constant" or float(value) != 0.0:
        raise UsageError(f"layer {module_path(node)}: only padding with zeros has an integer form")
    if min(widths) < 0:
        raise UsageError(
            f"layer {module_path(node)}: padding by {widths} has no integer form; cut with a slice"
        )
    pairs = list(zip(widths[::2], widths[1::2], strict=True))
    pairs += [(0, 0)] * (3 - len(pairs))
    attributes = {"before": [p[0] for p in pairs[::-1]], "after": [p[1] for p in pairs[::-1]]}
    reader.add(node, "pad", [node.args[0]], suffix="pad", attributes=attributes)


def identity(reader: Reader, node: FxNode) -> None:
    """An operation that does nothing to the values."""
    reader.alias[node] = reader.source(node.args[0])
