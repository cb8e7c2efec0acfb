"""Layers with a factor and a summand for each channel: batch norms that stand alone, and scales.

Each is a depthwise convolution with a kernel of 1 x 1, which has an exact integer form already. The
weight of a batch norm is 1, of one bit; what it does goes into the scale and the bias of the
channel, as everywhere else, so that nothing of it is rounded but the bias. The weight of a scale
has 8 bits.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node as FxNode

from mecq_cli.capture.reader import Reader, module_path
from mecq_cli.errors import UsageError
from mecq_cli.layers import Layer

AFFINE_BITS = 8
NORM_BITS = 1


def depthwise(weight: Tensor, bias: Tensor | None) -> nn.Conv2d:
    """The module of an affine layer; ``weight`` [C] is trained where it is a parameter."""
    channels = weight.numel()
    with torch.device("meta"):
        module = nn.Conv2d(channels, channels, 1, groups=channels, bias=False)
    shaped = weight.detach().reshape(channels, 1, 1, 1)
    module.weight = nn.Parameter(shaped, requires_grad=weight.requires_grad)
    if bias is not None:
        module.bias = nn.Parameter(bias.detach().reshape(channels))
    return module


def attributes(channels: int, wbits: int) -> dict[str, Any]:
    """Of an affine layer: those of its convolution, and how many bits its weight has."""
    geometry = {"stride": [1, 1], "padding": [0, 0, 0, 0], "dilation": [1, 1], "groups": channels}
    return {**geometry, "wbits": wbits}


def lone_batch_norm(layer: Layer) -> list[Layer]:
    """A batch norm of any shape [N, C, ...] as an affine layer between two reshapes, or none."""
    old = layer.module
    assert isinstance(old, (nn.BatchNorm1d, nn.BatchNorm2d))
    channels = old.num_features
    with torch.device("meta"):
        norm = nn.BatchNorm2d(channels, eps=old.eps)
    norm.weight, norm.bias = old.weight, old.bias
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        norm.register_buffer(name, getattr(old, name))
    module = depthwise(torch.ones(channels, device=old.weight.device), None)
    shape = layer.shape
    affine = Layer(
        layer.name,
        "affine",
        layer.inputs,
        shape,
        attributes(channels, NORM_BITS),
        module,
        norm,
    )
    return in_a_plane(affine)


def in_a_plane(affine: Layer) -> list[Layer]:
    """An affine layer of a value that is no [C, H, W], with the reshapes it takes."""
    shape = affine.shape
    if len(shape) == 3:
        return [affine]
    name, plane = affine.name, (shape[0], math.prod(shape[1:]), 1)
    before = Layer(f"{name}.plane", "reshape", affine.inputs, plane, {"shape": list(plane)})
    after = Layer(name, "reshape", [f"{name}.affine"], shape, {"shape": list(shape)})
    affine.name, affine.inputs, affine.shape = f"{name}.affine", [before.name], plane
    return [before, affine, after]


def scaled(reader: Reader, node: FxNode, value: FxNode, factor: Any, summand: Any) -> None:
    """A value times ``factor`` plus ``summand``: numbers, or parameters of one value a channel."""
    shape = tuple(int(n) for n in node.meta["val"].shape[1:])
    if tuple(value.meta["val"].shape[1:]) != shape or not shape:
        raise UsageError(
            f"layer {module_path(node)}: scaling {list(value.meta['val'].shape)} to "
            f"{list(node.meta['val'].shape)} has no integer form here yet"
        )
    like = next(reader.graph.parameters(), torch.zeros(()))
    weight = _per_channel(reader, node, factor, shape, like)
    bias = None if summand is None else _per_channel(reader, node, summand, shape, like)
    wbits = NORM_BITS if factor is None else AFFINE_BITS
    module = depthwise(weight, bias)
    kind = attributes(shape[0], wbits)
    reader.add(node, "affine", [value], suffix="scale", attributes=kind, module=module)
    layer = reader.layers.pop()
    reader.layers += in_a_plane(layer)
    reader.names |= {new.name for new in reader.layers[-3:]}


def _per_channel(
    reader: Reader, node: FxNode, given: Any, shape: tuple[int, ...], like: Tensor
) -> Tensor:
    """[C] of what is given; 1 where nothing is."""
    channels = shape[0]
    if given is None or isinstance(given, (int, float)):
        return torch.full((channels,), 1.0 if given is None else float(given), device=like.device)
    found = reader.parameter(given)
    assert found is not None
    tensor = found[1]
    whole = [1] * (len(shape) + 1 - tensor.dim()) + list(tensor.shape)
    if tensor.dim() > len(shape) + 1 or whole[0] != 1 or whole[2:] != [1] * (len(shape) - 1):
        raise UsageError(
            f"layer {module_path(node)}: a parameter {list(tensor.shape)} that has more than one "
            f"value for each channel of {list(shape)} has no integer form here yet"
        )
    if tensor.numel() == channels:
        return tensor.reshape(channels)
    return tensor.reshape(1).expand(channels).clone().detach().requires_grad_(tensor.requires_grad)
