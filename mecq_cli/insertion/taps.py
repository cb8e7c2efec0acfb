"""Values that the network returns beside its logits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from mecq_cli.insertion.needs import POOLS, PRODUCTS
from mecq_cli.insertion.plan import dense_logits, first_above
from mecq_cli.integer.ir import INPUT
from mecq_cli.layers import Layer, axis_before

Tap = Literal["penultimate", "stages", "layers"]


def tapped_layers(layers: list[Layer], taps: Sequence[Tap]) -> list[str]:
    """Layers whose values are tapped, in the order of execution.

    ``penultimate``: what the last convolution or linear layer reads (of a network that detects the
    last of its stages). ``stages``: the last residual add (or concatenation, or convolution) of
    each spatial resolution; of a network of tokens the last residual add for each number of tokens
    or, where that is one number, those at a third, two thirds and the end of the depth; of one
    without stages what the last layer reads. ``layers``: what every convolution or linear layer but
    the first reads.
    """
    products = [layer for layer in layers if layer.kind in PRODUCTS]
    wanted: set[str] = set()
    if "penultimate" in taps:
        wanted.add(_penultimate(layers, products))
    if "layers" in taps:
        wanted |= {p.inputs[0] for p in products if p.inputs[0] != INPUT}
    if "stages" in taps:
        stages = _token_stages(layers) or _map_stages(layers, products)
        wanted |= set(stages or [_penultimate(layers, products)])
    return [layer.name for layer in layers if layer.name in wanted]


def _penultimate(layers: list[Layer], products: list[Layer]) -> str:
    """What the last product reads; of a network that detects, the end of its backbone."""
    inner = _of_backbone(layers)
    if inner is not layers:
        return _map_stages(layers, products)[-1]
    return products[-1].inputs[0]


def _map_stages(layers: list[Layer], products: list[Layer]) -> list[str]:
    by_name = {layer.name: layer for layer in layers}
    inner = _of_backbone(layers)
    # Of a network that segments neither its logits are a stage nor the gates of its head.
    dense = dense_logits(layers)
    convolved = {p.shape[1:] for p in products if p.kind == "conv2d"}
    # Behind the last residual add of a resolution only the next stage's narrow beginning
    # may follow, so an add is the end of a stage where there is one.
    last: dict[tuple[int, ...], str] = {}
    # The logits of a convolutional classifier are no stage.
    logits = first_above(layers[-1].name, by_name)
    for kinds in (PRODUCTS, ("concat",), ("add",)):
        last |= {
            layer.shape[1:]: layer.name
            for layer in inner
            if len(layer.shape) == 3 and layer.shape[1:] in convolved and layer.kind in kinds
            if layer.name not in dense and not (dense and layer.shape[1:] == (1, 1))
            if layer.name != logits
        }
    return list(last.values())


def _of_backbone(layers: list[Layer]) -> list[Layer]:
    """Of a network that detects, which puts out a row of values for each anchor: its backbone.

    torchvision calls it so, and what is below its pyramid its body: the sums of a pyramid are of
    maps that were resized, and end no stage.
    """
    if len(layers[-1].shape) != 2:
        return layers
    for path in ("backbone.body.", "backbone."):
        found = [layer for layer in layers if layer.name.startswith(path)]
        if found:
            return found
    return layers


def _token_stages(layers: list[Layer]) -> list[str]:
    """Of a network whose residual adds are all of tokens; of others none."""
    axes, by_name = channel_axes(layers), {layer.name: layer for layer in layers}
    adds = [
        layer
        for layer in layers
        if layer.kind == "add"
        and len(layer.shape) > 1
        and layer.name in axes
        and not any(_is_constant(by_name, name) for name in layer.inputs)
    ]
    if not adds or any(axes[add.name] != len(add.shape) for add in adds):
        return []
    last = {math.prod(add.shape[:-1]): add.name for add in adds}
    if len(last) > 1:
        return list(last.values())
    count = len(adds)
    return [adds[max(-(-count * third // 3) - 1, 0)].name for third in (1, 2, 3)]


def _is_constant(by_name: dict[str, Layer], name: str) -> bool:
    return name in by_name and by_name[name].kind == "constant"


def channel_axes(layers: list[Layer]) -> dict[str, int]:
    """Which axis of a value, counted from 1, are its channels, where that is known."""
    shapes = {layer.name: layer.shape for layer in layers}
    axes: dict[str, int] = {}
    for layer in layers:
        known = [axes[name] for name in layer.inputs if name in axes]
        if layer.kind in ("linear", "layer_norm"):
            axes[layer.name] = len(layer.shape)
        elif layer.kind in ("conv2d", "group_norm", *POOLS):
            axes[layer.name] = 1
        elif not known or layer.kind in ("matmul", "softmax", "log_softmax"):
            continue
        elif layer.kind == "transpose":
            axes[layer.name] = list(layer.attributes["axes"]).index(known[0]) + 1
        elif layer.kind == "reshape":
            axis = axis_before(layer.shape, shapes[layer.inputs[0]], known[0])
            if axis is not None:
                axes[layer.name] = axis
        elif len(layer.shape) == len(shapes.get(layer.inputs[0], layer.shape)):
            axes[layer.name] = known[0]
    return axes
