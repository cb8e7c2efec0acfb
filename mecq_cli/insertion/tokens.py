"""Needs and sites of what transformers are made of; see `mecq_cli.insertion.builders`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from torch import nn

from mecq_cli.insertion.needs import EDGE_BITS, FLOAT, FLOATING, Need
from mecq_cli.layers import Layer
from mecq_cli.sites import (
    ConstantSite,
    LogSoftmaxSite,
    MatmulSite,
    MulSite,
    NormalizeSite,
    NormSite,
    ResizeSite,
    RmsNormSite,
    Site,
    SoftmaxSite,
)

if TYPE_CHECKING:
    from mecq_cli.insertion.inserter import Inserter


def _matmul_need(inserter: Inserter, layer: Layer, output: Need) -> Need:
    abits = inserter.bits[layer.name].abits
    return FLOAT if abits == 32 else Need(abits)


def _norm_need(inserter: Inserter, layer: Layer, output: Need) -> Need:
    """What is not float anyway goes to bytes first: products with a grid are the fast ones."""
    source = inserter.origin(layer.inputs[0])
    if inserter.plan.abits == 32 or source is None or source.name in inserter.floats:
        return FLOAT
    return Need(EDGE_BITS)


def _resize_need(inserter: Inserter, layer: Layer, output: Need) -> Need:
    """Floats for the logits; else steps that are powers of two.

    On these, resizing by a power of two is exact in every order of operations.
    """
    source = inserter.origin(layer.inputs[0])
    floats = source is None or source.name in inserter.floats
    if inserter.plan.abits == 32 or floats or layer is inserter.layers[-1]:
        return FLOAT
    return Need(EDGE_BITS, power_of_two=True)


def _float_need(inserter: Inserter, layer: Layer, output: Need) -> Need:
    return FLOAT


TOKEN_NEEDS: Mapping[str, Callable[[Inserter, Layer, Need], Need]] = {
    "matmul": _matmul_need,
    "layer_norm": _norm_need,
    "group_norm": _norm_need,
    "l2_normalize": _norm_need,
    "rms_norm": _norm_need,
    "softmax": _float_need,
    "log_softmax": _float_need,
    "resize": _resize_need,
    "rescale": _float_need,
    "constant": _float_need,
}


def _matmul(inserter: Inserter, layer: Layer) -> None:
    need = inserter.input_need(layer)
    reached = [inserter.reach(name, need) for name in layer.inputs]
    quantizer, _ = inserter.own(layer, need.bits is not None)
    site = MatmulSite(
        layer.name, [q for _, q in reached], quantizer, factor=layer.attributes["factor"]
    )
    inserter.store(layer, inserter.place(site, [node for node, _ in reached]), quantizer)


def _float(inserter: Inserter, layer: Layer) -> None:
    nodes = [inserter.reach(name, FLOAT)[0] for name in layer.inputs]
    inserter.store(layer, inserter.place(_site(layer), nodes), None)


def _site(layer: Layer) -> Site:
    if layer.kind == "constant":
        assert layer.module is not None
        return ConstantSite(layer.name, module=layer.module)
    if layer.kind == "softmax":
        return SoftmaxSite(layer.name)
    if layer.kind == "log_softmax":
        return LogSoftmaxSite(layer.name)
    if layer.kind == "rms_norm":
        return RmsNormSite(layer.name, eps=layer.attributes["eps"])
    if layer.kind == "l2_normalize":
        return NormalizeSite(layer.name, eps=layer.attributes["eps"])
    if layer.kind == "rescale":
        return MulSite(layer.name, [None, None])
    if layer.kind == "resize":
        return ResizeSite(layer.name, **layer.attributes)
    assert isinstance(layer.module, (nn.LayerNorm, nn.GroupNorm))
    return NormSite(layer.name, module=layer.module)


TOKEN_BUILDERS: Mapping[str, Callable[[Inserter, Layer], None]] = {
    "matmul": _matmul,
    **dict.fromkeys(FLOATING, _float),
}
