"""Handlers of operations that move values and compute none."""

from __future__ import annotations

import torch
import torch.nn.functional as F
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


def reshape(reader: Reader, node: FxNode) -> None:
    """Flatten, view, squeeze and the like, as long as the images of a batch stay apart."""
    source = node.args[0]
    assert isinstance(source, FxNode)
    if source not in reader.alias:
        return  # of a weight; who reads it tells what is wrong
    before, after = source.meta["val"].shape, node.meta["val"].shape
    if [str(n) for n in before] == [str(n) for n in after]:
        reader.alias[node] = reader.source(source)
    elif str(before[0]) != str(after[0]) or len(after) < 2:
        raise UsageError(
            f"layer {module_path(node)}: reshaping {list(before)} to {list(after)} has no "
            "integer form here yet"
        )
    elif len(after) == 2:
        reader.add(node, "flatten", [source])
    else:
        shape = [int(n) for n in after[1:]]
        reader.add(node, "reshape", [source], suffix="reshape", attributes={"shape": shape})


def permute(reader: Reader, node: FxNode) -> None:
    """Permute and transpose; the batch stays first."""
    source = node.args[0]
    assert isinstance(source, FxNode)
    rank = len(source.meta["val"].shape)
    if node.target is torch.ops.aten.transpose.int:
        order = [*range(rank)]
        a, b = (int(axis) % rank for axis in node.args[1:3])  # type: ignore[arg-type]
        order[a], order[b] = b, a
    else:
        order = [int(axis) % rank for axis in node.args[1]]  # type: ignore[union-attr, arg-type]
    if order[0] != 0:
        raise UsageError(f"layer {module_path(node)}: the axis of the batch cannot be moved")
    if order == [*range(rank)]:
        reader.alias[node] = reader.source(source)
        return
    reader.add(node, "transpose", [source], suffix="transpose", attributes={"axes": order[1:]})


def split(reader: Reader, node: FxNode) -> None:
    """Split and chunk; `part` makes the slices of those parts that are used."""
    source = node.args[0]
    assert isinstance(source, FxNode)
    begin, parts = 0, []
    axis = _axis(reader, node, source)
    for value in node.meta["val"]:
        parts.append((begin, begin + int(value.shape[axis])))
        begin = parts[-1][1]
    reader.parts[node] = parts


def part(reader: Reader, node: FxNode) -> None:
    """One part of what `split` noted; items of anything else are no values."""
    whole, index = node.args[0], node.args[1]
    if not isinstance(whole, FxNode) or whole not in reader.parts:
        return
    assert isinstance(index, int)
    source = whole.args[0]
    assert isinstance(source, FxNode)
    axis, (start, stop) = _axis(reader, whole, source), reader.parts[whole][index]
    bounds = {"axes": [axis], "starts": [start], "ends": [stop], "steps": [1]}
    reader.add(node, "slice", [source], suffix="slice", attributes=bounds)


def _axis(reader: Reader, node: FxNode, source: FxNode) -> int:
    axis = int(reader.argument(node, 2, "dim", 0)) % len(source.meta["val"].shape)
    if axis == 0:
        raise UsageError(f"layer {module_path(node)}: images of a batch cannot be split")
    return axis


def expand(reader: Reader, node: FxNode) -> None:
    """A value that is repeated so that it fits another: add and multiply do that by themselves."""
    aten = torch.ops.aten
    fitting = (aten.mul.Tensor, aten.mul_.Tensor, aten.add.Tensor, aten.add_.Tensor)
    source = node.args[0]
    if isinstance(source, FxNode) and source not in reader.alias:
        return
    if any(user.target not in fitting for user in node.users):
        raise UsageError(
            f"layer {module_path(node)}: repeating values has no integer form here yet"
        )
    reader.alias[node] = reader.source(source)


def upsample(reader: Reader, node: FxNode) -> None:
    """Nearest neighbours, of any size where torch takes those that integers give."""
    source = node.args[0]
    assert isinstance(source, FxNode)
    before, after = source.meta["val"].shape, node.meta["val"].shape
    size = [int(n) for n in after[2:]]
    given = reader.argument(node, 2, "scale_factors")
    for n, m, scale in zip(before[2:], size, given or [None, None], strict=True):
        places = torch.arange(int(n), dtype=torch.float32).reshape(1, 1, -1)
        options = {"size": m} if scale is None else {"scale_factor": scale}
        found = F.interpolate(places, mode="nearest", **options).flatten().tolist()
        if found != [i * int(n) // m for i in range(m)]:
            raise UsageError(
                f"layer {module_path(node)}: upsampling by {scale} has no integer form"
            )
    reader.add(node, "upsample", [source], suffix="upsample", attributes={"size": size})


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
