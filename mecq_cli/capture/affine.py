"""Layers with a factor and a summand for each channel: batch norms that stand alone, and scales.

Each is a depthwise convolution with a kernel of 1 x 1, which has an exact integer form already. The
weight of a batch norm is 1, of one bit; what it does goes into the scale and the bias of the
channel, as everywhere else, so that nothing of it is rounded but the bias. The weight of a scale
has 8 bits.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from mecq_cli.integer.ir import INPUT
from mecq_cli.layers import Layer

FLOATS = ("layer_norm", "group_norm", "softmax", "l2_normalize", "rms_norm")
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
        shaped = bias.detach().reshape(channels)
        module.bias = nn.Parameter(shaped, requires_grad=bias.requires_grad)
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


def to_affine(layers: list[Layer], input_shape: tuple[int, ...]) -> list[Layer]:
    """Products and sums with a constant of each channel, in networks of integers alone.

    Beside norms and attention, which are floats, these stay operations on floats.
    """
    if any(layer.kind in FLOATS for layer in layers):
        return layers
    by_name = {layer.name: layer for layer in layers}
    shapes = {INPUT: input_shape} | {layer.name: layer.shape for layer in layers}
    made: list[Layer] = []
    for layer in layers:
        constants = [by_name[n] for n in layer.inputs if _is_constant(n, by_name)]
        values = [name for name in layer.inputs if not _is_constant(name, by_name)]
        pairs = layer.kind in ("rescale", "add") and len(constants) == len(values) == 1
        if pairs and shapes[values[0]] == layer.shape:  # not several channels made of one
            made += _affine(layer, values[0], constants[0])
        else:
            made.append(layer)
    read = {name for layer in made for name in layer.inputs}
    return [layer for layer in made if layer.kind != "constant" or layer.name in read]


def _is_constant(name: str, by_name: dict[str, Layer]) -> bool:
    return name in by_name and by_name[name].kind == "constant"


def _affine(layer: Layer, value: str, constant: Layer) -> list[Layer]:
    shape, module = layer.shape, constant.module
    axes = [i for i, n in enumerate(constant.shape) if n != 1]
    if len(axes) == 1 and axes[0] > 0:
        return _turned(layer, value, constant, axes[0])
    channels = shape[0]
    if axes not in ([], [0]) or constant.shape[0] not in (1, channels):
        return [layer]  # a map, such as of positions: an operation on values
    assert module is not None
    trained = constant.shape[0] == channels and any(p.requires_grad for p in module.parameters())
    given = module().detach().reshape(-1).expand(channels).clone().requires_grad_(trained)
    scales = layer.kind == "rescale"
    weight = given if scales else torch.ones_like(given, requires_grad=False)
    module = depthwise(weight, None if scales else given)
    kind = attributes(channels, AFFINE_BITS if scales else NORM_BITS)
    return in_a_plane(Layer(layer.name, "affine", [value], shape, kind, module))


def _turned(layer: Layer, value: str, constant: Layer, axis: int) -> list[Layer]:
    """The same where the channels are on another axis than the first, which they come to."""
    order = [axis, *(i for i in range(len(layer.shape)) if i != axis)]
    axes = [i + 1 for i in order]
    back = [axes.index(i + 1) + 1 for i in range(len(axes))]
    turn, inner = f"{layer.name}.turn", f"{layer.name}.turned"
    first = replace(constant, shape=tuple(constant.shape[i] for i in order))
    shape = tuple(layer.shape[i] for i in order)
    affine = _affine(replace(layer, name=inner, shape=shape), turn, first)
    return [
        Layer(turn, "transpose", [value], shape, {"axes": axes}),
        *affine,
        Layer(layer.name, "transpose", [inner], layer.shape, {"axes": back}),
    ]
