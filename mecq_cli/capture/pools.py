"""Handlers of pools and means."""

from __future__ import annotations

from typing import Any

from torch.fx import Node as FxNode

from mecq_cli.capture.layout import layout
from mecq_cli.capture.names import module_path
from mecq_cli.capture.reader import Reader, pair
from mecq_cli.capture.token_moves import axes_of_mean
from mecq_cli.capture.token_moves import mean as token_mean
from mecq_cli.errors import UsageError
from mecq_cli.layers import Layer


def _window(reader: Reader, node: FxNode) -> dict[str, Any]:
    """What both pools say first: kernel, stride (the kernel's where it is left out), padding."""
    kernel, stride = pair(node.args[1]), reader.argument(node, 2, "stride")
    padding = pair(reader.argument(node, 3, "padding", 0))
    return {"kernel": kernel, "stride": pair(stride) if stride else kernel, "padding": padding}


def max_pool(reader: Reader, node: FxNode) -> None:
    """Maxima of windows."""
    attributes = {
        **_window(reader, node),
        "dilation": pair(reader.argument(node, 4, "dilation", 1)),
        "ceil_mode": bool(reader.argument(node, 5, "ceil_mode", False)),
    }
    reader.add(node, "max_pool2d", [node.args[0]], attributes=attributes)


def avg_pool(reader: Reader, node: FxNode) -> None:
    """Means of windows."""
    attributes = {
        **_window(reader, node),
        "ceil_mode": bool(reader.argument(node, 4, "ceil_mode", False)),
        "count_include_pad": bool(reader.argument(node, 5, "count_include_pad", True)),
    }
    if reader.argument(node, 6, "divisor_override") is not None:
        raise UsageError(f"layer {module_path(node)}: avg_pool2d with a divisor of its own")
    reader.add(node, "avg_pool2d", [node.args[0]], attributes=attributes)


def adaptive_avg_pool(reader: Reader, node: FxNode) -> None:
    """The mean over the plane, or over windows that share it out."""
    source = node.args[0]
    assert isinstance(source, FxNode)
    size = list(source.meta["val"].shape[2:])
    if pair(node.args[1]) == [1, 1]:
        reader.add(node, "global_avg_pool", [source])
    elif pair(node.args[1]) == size:
        reader.alias[node] = reader.source(source)
    else:
        reader.add(node, "adaptive_avg_pool2d", [source], attributes={"size": pair(node.args[1])})


def mean(reader: Reader, node: FxNode) -> None:
    """A mean over the plane, written as a mean over axes."""
    source = node.args[0]
    assert isinstance(source, FxNode)
    plane = len(source.meta["val"].shape) == 4 and axes_of_mean(reader, node) == [2, 3]
    if not plane or not layout(source).plain:
        token_mean(reader, node)
        return
    reader.add(node, "global_avg_pool", [source])
    if not reader.argument(node, 2, "keepdim", False):
        pooled = reader.alias[node]
        reader.names.add(f"{pooled}.flatten")
        shape = (int(source.meta["val"].shape[1]),)
        reader.layers.append(Layer(f"{pooled}.flatten", "flatten", [pooled], shape))
        reader.alias[node] = f"{pooled}.flatten"
