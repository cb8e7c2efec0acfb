"""Handlers of operations that move values and compute none."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.fx import Node as FxNode

from mecq_cli.capture.layout import layout
from mecq_cli.capture.names import module_path
from mecq_cli.capture.reader import Reader
from mecq_cli.capture.token_moves import joined, sliced
from mecq_cli.errors import UsageError


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


def resize(reader: Reader, node: FxNode) -> None:
    """Bilinear; a single value is repeated, and a size that is there already stays."""
    source = node.args[0]
    assert isinstance(source, FxNode)
    before, size = ([int(n) for n in v.meta["val"].shape[2:]] for v in (source, node))
    corners = bool(reader.argument(node, 2, "align_corners", False))
    scales = reader.argument(node, 3, "scale_factors")
    if scales and not corners and [n * s for n, s in zip(before, scales, strict=True)] != size:
        raise UsageError(
            f"layer {module_path(node)}: bilinear resizing of {before} by {scales} does not give a "
            "whole size, and has no form here; give interpolate a size"
        )
    if size == before:
        reader.alias[node] = reader.source(source)
    elif before == [1, 1]:
        reader.add(node, "upsample", [source], suffix="upsample", attributes={"size": size})
    else:
        attributes = {"size": size, "align_corners": corners}
        reader.add(node, "resize", [source], suffix="resize", attributes=attributes)


def pad(reader: Reader, node: FxNode) -> None:
    """Zeros around a value, or its own values, mirrored or repeated."""
    widths = [int(w) for w in node.args[1]]  # type: ignore[union-attr, arg-type]
    if not any(widths):
        reader.alias[node] = reader.source(node.args[0])
        return
    mode = reader.argument(node, 2, "mode", "constant")
    value = reader.argument(node, 3, "value", 0.0) or 0.0
    if min(widths) < 0:
        raise UsageError(
            f"layer {module_path(node)}: padding by {widths} has no integer form; cut with a slice"
        )
    pairs = list(zip(widths[::2], widths[1::2], strict=True))
    if mode in _SOURCES:
        _pad_with_values(reader, node, pairs, _SOURCES[mode])
        return
    if mode != "constant" or float(value) != 0.0:
        raise UsageError(
            f"layer {module_path(node)}: only padding with zeros or with the value's own values "
            f"({', '.join(_SOURCES)}) has an integer form"
        )
    while pairs[-1] == (0, 0):
        pairs.pop()
    shape = layout(node).shape
    if len(shape) != 3 or len(pairs) > 3:
        raise UsageError(
            f"layer {module_path(node)}: padding {list(shape)} by {widths} has no integer form; "
            "what can be padded is [C, H, W]"
        )
    pairs += [(0, 0)] * (3 - len(pairs))
    attributes = {"before": [p[0] for p in pairs[::-1]], "after": [p[1] for p in pairs[::-1]]}
    reader.add(node, "pad", [node.args[0]], suffix="pad", attributes=attributes)


_SOURCES: dict[str, Callable[[int, int], int]] = {
    "reflect": lambda i, size: size - 1 - abs(size - 1 - abs(i)),
    "replicate": lambda i, size: min(max(i, 0), size - 1),
    "circular": lambda i, size: i % size,
}
"""Which of ``size`` places has the value of place i, which may lie outside, by the mode."""


def _pad_with_values(
    reader: Reader, node: FxNode, pairs: list[tuple[int, int]], place: Callable[[int, int], int]
) -> None:
    """Slices of the value, joined; the last axis has the first pair, as torch counts them."""
    source, base = node.args[0], module_path(node)
    assert isinstance(source, FxNode)
    reader.require_plain(node, source)
    name, shape = reader.source(source), layout(source).shape
    for back, (before, after) in enumerate(pairs):
        axis = len(shape) - back
        size = shape[axis - 1]
        runs = _runs([place(i, size) for i in range(-before, size + after)])
        if len(runs) == 1:
            continue
        parts = [
            name if len(run) == size else sliced(reader, base, name, shape, axis, run)
            for run in runs
        ]
        shape = (*shape[: axis - 1], size + before + after, *shape[axis:])
        name = joined(reader, base, parts, shape, axis)
    reader.alias[node] = name


def _runs(places: list[int]) -> list[range]:
    """Places as ranges of step 1, in their order."""
    runs = [range(places[0], places[0] + 1)]
    for i in places[1:]:
        if i == runs[-1].stop:
            runs[-1] = range(runs[-1].start, i + 1)
        else:
            runs.append(range(i, i + 1))
    return runs


def identity(reader: Reader, node: FxNode) -> None:
    """An operation that does nothing to the values."""
    reader.alias[node] = reader.source(node.args[0])
