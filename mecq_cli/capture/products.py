"""Handlers of convolutions, linear layers and batch norm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node as FxNode

from mecq_cli.capture.names import module_path
from mecq_cli.capture.reader import Reader, pair
from mecq_cli.errors import UsageError


def _four_sides(padding: Any, kernel: tuple[int, int], dilation: list[int]) -> list[int]:
    """Padding of a convolution as (top, left, bottom, right)."""
    if not isinstance(padding, str):
        return pair(padding) * 2
    # "same" (its odd element comes last) or "valid"
    total = [d * (k - 1) if padding == "same" else 0 for k, d in zip(kernel, dilation, strict=True)]
    return [t // 2 for t in total] + [t - t // 2 for t in total]


def set_parameter(module: nn.Module, name: str, tensor: Tensor | None) -> None:
    """Make a tensor a parameter of a module, the very one where it is a parameter.

    A buffer, such as a fixed filter, is not trained here either.
    """
    if tensor is not None and not isinstance(tensor, nn.Parameter):
        tensor = nn.Parameter(tensor, requires_grad=False)
    module.register_parameter(name, tensor)


def conv2d(reader: Reader, node: FxNode) -> None:
    """A convolution of the image plane, with its bias."""
    weight = reader.parameter(node.args[1])
    bias = reader.parameter(reader.argument(node, 2, "bias"))
    assert weight is not None
    stride = pair(reader.argument(node, 3, "stride", [1, 1]))
    dilation = pair(reader.argument(node, 5, "dilation", [1, 1]))
    groups = int(reader.argument(node, 6, "groups", 1))
    o, i, kh, kw = weight[1].shape
    padding = _four_sides(reader.argument(node, 4, "padding", [0, 0]), (kh, kw), dilation)
    with torch.device("meta"):
        module = nn.Conv2d(i * groups, o, (kh, kw), groups=groups, bias=bias is not None)
    set_parameter(module, "weight", weight[1])
    set_parameter(module, "bias", bias[1] if bias else None)
    attributes = {
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "groups": groups,
    }
    reader.add(node, "conv2d", [node.args[0]], attributes=attributes, module=module)


def conv1d(reader: Reader, node: FxNode) -> None:
    """A convolution along one axis, as one of an image with a single row."""
    weight = reader.parameter(node.args[1])
    bias = reader.parameter(reader.argument(node, 2, "bias"))
    assert weight is not None
    numbers = [reader.argument(node, i, name, d) for i, name, d in _CONV1D]
    if isinstance(numbers[1], str):
        raise UsageError(f"layer {module_path(node)}: conv1d with padding {numbers[1]!r}")
    stride, padding, dilation = (int(n[0] if isinstance(n, (list, tuple)) else n) for n in numbers)
    groups = int(reader.argument(node, 6, "groups", 1))
    source = node.args[0]
    assert isinstance(source, FxNode)
    reader.require_plain(node, source)
    outputs, inputs, kernel = weight[1].shape
    with torch.device("meta"):
        module = nn.Conv2d(inputs * groups, outputs, (1, kernel), groups=groups, bias=False)
    rows = weight[1].detach().unsqueeze(2)
    set_parameter(module, "weight", nn.Parameter(rows, requires_grad=weight[1].requires_grad))
    set_parameter(module, "bias", bias[1] if bias else None)
    channels, length = (int(n) for n in source.meta["val"].shape[1:])
    row = {"shape": [channels, 1, length]}
    reader.add(source, "reshape", [source], suffix="row", attributes=row, owner=node)
    reader.layers[-1].shape = (channels, 1, length)
    attributes = {
        "stride": [1, stride],
        "padding": [0, padding, 0, padding],
        "dilation": [1, dilation],
        "groups": groups,
    }
    row_name = reader.layers[-1].name
    reader.add(node, "conv2d", [row_name], attributes=attributes, module=module)
    layer = reader.layers[-1]
    shape = layer.shape
    layer.shape = (shape[0], 1, shape[1])
    back = {"shape": list(shape)}
    reader.add(node, "reshape", [layer.name], suffix="column", attributes=back)


_CONV1D = ((3, "stride", 1), (4, "padding", 0), (5, "dilation", 1))


def linear(reader: Reader, node: FxNode) -> None:
    """A linear layer."""
    weight = reader.parameter(node.args[1])
    bias = reader.parameter(reader.argument(node, 2, "bias"))
    assert weight is not None
    if weight[1].dim() != 2:
        raise UsageError(f"layer {module_path(node)}: a linear layer of one row without an axis")
    with torch.device("meta"):
        module = nn.Linear(weight[1].shape[1], weight[1].shape[0], bias=bias is not None)
    set_parameter(module, "weight", weight[1])
    set_parameter(module, "bias", bias[1] if bias else None)
    reader.add(node, "linear", [node.args[0]], module=module)


def batch_norm(reader: Reader, node: FxNode) -> None:
    """A batch norm, which `fuse` will fold."""
    weight, bias = reader.parameter(node.args[1]), reader.parameter(node.args[2])
    mean, var = reader.parameter(node.args[3]), reader.parameter(node.args[4])
    if mean is None or var is None:
        raise UsageError(
            f"layer {module_path(node)}: batch norm without running statistics cannot be folded"
        )
    kind = nn.BatchNorm1d if len(node.meta["val"].shape) == 2 else nn.BatchNorm2d
    with torch.device("meta"):
        module = kind(mean[1].numel(), eps=float(node.args[7]))  # type: ignore[arg-type]
    device = mean[1].device
    set_parameter(module, "weight", weight[1] if weight else torch.ones_like(mean[1]))
    set_parameter(module, "bias", bias[1] if bias else torch.zeros_like(mean[1]))
    # The captured network owns its statistics: the FP model it came from stays as it is.
    module.register_buffer("running_mean", mean[1].detach().clone())
    module.register_buffer("running_var", var[1].detach().clone())
    module.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.long, device=device))
    reader.add(node, "batch_norm", [node.args[0]], module=module)
