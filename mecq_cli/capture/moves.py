"""Handlers of operations that move values and compute none."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.fx import Node as FxNode

from mecq_cli.capture.reader import Reader, module_path
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
    """Zeros around a value."""
    widths = [int(w) for w in node.args[1]]  # type: ignore[union-attr, arg-type]
    if not any(widths):
        reader.alias[node] = reader.source(node.args[0])
        return
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
