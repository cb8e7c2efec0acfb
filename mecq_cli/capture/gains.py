"""Factors that belong to a product: folded into it, where that is the same function.

A number before or behind the product of two values (the 1 / sqrt(d) of attention) becomes its
factor. A factor for each channel behind a convolution or linear layer (LayerScale) becomes its
gain, which multiplies the scales of its weights and its bias later, as a batch norm does.
"""

from __future__ import annotations

from mecq_cli.capture.constants import Number
from mecq_cli.layers import Layer, Users, axis_before

_MOVING = ("reshape", "transpose", "dropout", "roll")


def fold_gains(layers: list[Layer]) -> list[Layer]:
    """Fold what can be folded; other multiplications by constants stay as they are."""
    users = Users(layers)
    for layer in list(layers):
        if layer.kind != "rescale":
            continue
        factors = [users.by_name[n] for n in layer.inputs if _is_constant(users, n)]
        values = [n for n in layer.inputs if not _is_constant(users, n)]
        if len(factors) != 1 or len(values) != 1:
            continue
        if _fold(users, layer, values[0], factors[0]):
            users.bypass(layer, values[0])
    return users.alive()


def _is_constant(users: Users, name: str) -> bool:
    return name in users.by_name and users.by_name[name].kind == "constant"


def _fold(users: Users, layer: Layer, value: str, factor: Layer) -> bool:
    axes = [axis for axis, size in enumerate(factor.shape, 1) if size != 1]
    if isinstance(factor.module, Number):
        product = _matmul_above(users, value) or _matmul_below(users, layer)
        if product is not None:
            product.attributes["factor"] *= float(factor.module.value.flatten()[0])
            return True
    if len(axes) > 1:
        return False
    if value not in users.by_name:
        return False  # the image
    if axes and users.shape(value)[axes[0] - 1] != factor.shape[axes[0] - 1]:
        return False  # it makes several channels of one
    found = _product_above(users, value, axes[0] if axes else None)
    if found is None or found.gain is not None or found.ceiling is not None:
        return False
    found.gain = factor.module
    return True


def _matmul_above(users: Users, name: str) -> Layer | None:
    while users.only_one(name):
        layer = users.by_name[name]
        if layer.kind == "matmul":
            return layer
        if layer.kind not in ("reshape", "transpose"):
            return None
        name = layer.inputs[0]
    return None


def _matmul_below(users: Users, layer: Layer) -> Layer | None:
    while users.only_one(layer.name):
        (layer,) = users.of[layer.name]
        if layer.kind == "matmul":
            # The square of a value would be multiplied twice.
            return layer if layer.inputs[0] != layer.inputs[1] else None
        if layer.kind not in ("reshape", "transpose"):
            return None
    return None


def _product_above(users: Users, name: str, axis: int | None) -> Layer | None:
    """The convolution or linear layer whose channels an axis of a value are, if no one else
    reads what it puts out; with no axis, whatever its channels are."""
    while users.only_one(name):
        layer = users.by_name[name]
        if layer.kind in ("conv2d", "linear"):
            channels = 1 if layer.kind == "conv2d" else len(layer.shape)
            return layer if axis in (None, channels) else None
        if layer.kind not in _MOVING or layer.inputs[0] not in users.by_name:
            return None
        if axis is not None and layer.kind == "roll" and axis in layer.attributes["axes"]:
            return None
        if axis is not None and layer.kind == "transpose":
            axis = int(layer.attributes["axes"][axis - 1])
        elif axis is not None and layer.kind == "reshape":
            axis = axis_before(users.shape(layer.inputs[0]), layer.shape, axis)
            if axis is None:
                return None
        name = layer.inputs[0]
    return None
