"""What each kind of layer wants of its inputs, and the sites it becomes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from torch import nn

from mecq_cli.insertion.needs import EDGE_BITS, FLOAT, PASSING, POOLS, PRODUCTS, Need
from mecq_cli.insertion.tokens import TOKEN_BUILDERS, TOKEN_NEEDS
from mecq_cli.layers import Layer
from mecq_cli.sites import (
    AdaptivePoolSite,
    AddSite,
    AveragePoolSite,
    DequantizeSite,
    DropoutSite,
    FunctionSite,
    GlobalAveragePoolSite,
    MulSite,
    PassSite,
    ProductSite,
    QuantizeSite,
    Site,
)

if TYPE_CHECKING:
    from mecq_cli.insertion.inserter import Inserter

# -- needs -------------------------------------------------------------------------------------


def _product_need(inserter: Inserter, layer: Layer, output: Need) -> Need:
    abits = inserter.bits[layer.name].abits
    return FLOAT if abits == 32 else Need(abits)


def _add_need(inserter: Inserter, layer: Layer, output: Need) -> Need:
    plan = inserter.plan
    if layer.name in inserter.floats:
        return FLOAT
    if plan.residual_bits == 32 or plan.abits == 32:
        return FLOAT
    return Need(plan.residual_bits, power_of_two=True)


def _mul_need(inserter: Inserter, layer: Layer, output: Need) -> Need:
    return FLOAT if inserter.plan.abits == 32 else Need(EDGE_BITS, power_of_two=True)


def _passing_need(inserter: Inserter, layer: Layer, output: Need) -> Need:
    return output


def _concat_need(inserter: Inserter, layer: Layer, output: Need) -> Need:
    if output.bits is not None and not output.group:
        return Need(output.bits, output.power_of_two, layer.name)
    return output


def _average_need(inserter: Inserter, layer: Layer, output: Need) -> Need:
    source = inserter.origin(layer.inputs[0])
    while source is not None and source.kind in POOLS:
        source = inserter.origin(source.inputs[0])
    if source is not None and source.name in inserter.floats:
        return FLOAT
    return FLOAT if inserter.plan.abits == 32 else Need(EDGE_BITS)


def _window_need(inserter: Inserter, layer: Layer, output: Need) -> Need:
    if output.bits is None:
        return FLOAT  # its sums of integers only go to a grid
    return _average_need(inserter, layer, output)


NEEDS: Mapping[str, Callable[[Inserter, Layer, Need], Need]] = {
    **dict.fromkeys(PRODUCTS, _product_need),
    **dict.fromkeys(PASSING, _passing_need),
    "add": _add_need,
    "concat": _concat_need,
    "global_avg_pool": _average_need,
    "avg_pool2d": _window_need,
    "adaptive_avg_pool2d": _window_need,
    "mul": _mul_need,
    "affine": _average_need,
    "function": _window_need,
    "relu": _window_need,
    **TOKEN_NEEDS,
}

# -- sites -------------------------------------------------------------------------------------


def _product(inserter: Inserter, layer: Layer) -> None:
    bits = inserter.bits[layer.name]
    need = inserter.input_need(layer, FLOAT)
    node, source = inserter.reach(layer.inputs[0], need)
    integer = bits.wbits != 32 and source is not None
    if source is not None and not integer:
        # An FP weight on quantized activations: the values go through the grid, as floats.
        dequantize = DequantizeSite(f"{layer.name}.dequantize", [source])
        node, source = inserter.place(dequantize, [node]), None
    quantizer, ceiling = inserter.own(layer, integer)
    assert isinstance(layer.module, (nn.Conv2d, nn.Linear))
    weight_quantizer = None
    if bits.wbits != 32:
        weight_quantizer = inserter.weight_quantizer(layer.module.weight, bits.wbits)
    site = ProductSite(
        layer.name,
        [source],
        quantizer,
        ceiling,
        module=layer.module,
        attributes=layer.attributes,
        norm=layer.norm,
        gain=layer.gain,
        weight_quantizer=weight_quantizer,
    )
    site.abits = bits.abits
    inserter.store(layer, inserter.place(site, [node]), quantizer)


def _add(inserter: Inserter, layer: Layer) -> None:
    need = inserter.input_need(layer, FLOAT)
    reached = [inserter.reach(name, need) for name in layer.inputs]
    integer = need.bits is not None
    if integer:
        # The sum is exact only between powers of two; a finer step follows it.
        inserter.needs[layer.name] = need
    quantizer, ceiling = inserter.own(layer, integer)
    site = AddSite(layer.name, [q for _, q in reached], quantizer, ceiling)
    inserter.store(layer, inserter.place(site, [n for n, _ in reached]), quantizer)


def _mul(inserter: Inserter, layer: Layer) -> None:
    need = inserter.input_need(layer)
    reached = [inserter.reach(name, need) for name in layer.inputs]
    integer = need.bits is not None
    if integer:
        inserter.needs[layer.name] = need  # exact between powers of two, as a sum
    quantizer, ceiling = inserter.own(layer, integer)
    site = MulSite(layer.name, [q for _, q in reached], quantizer, ceiling)
    inserter.store(layer, inserter.place(site, [n for n, _ in reached]), quantizer)


def _affine(inserter: Inserter, layer: Layer) -> None:
    """A depthwise convolution with bits of its own, see `mecq_cli.capture.affine`."""
    node, source = inserter.reach(layer.inputs[0], inserter.input_need(layer))
    assert isinstance(layer.module, nn.Conv2d)
    attributes = dict(layer.attributes)
    bits, weight_quantizer = attributes.pop("wbits"), None
    if source is not None:
        weight_quantizer = inserter.quantizers.weight(bits, len(layer.module.weight))
        weight_quantizer.initialize(layer.module.weight)
    quantizer, ceiling = inserter.own(layer, source is not None)
    site = ProductSite(
        layer.name,
        [source],
        quantizer,
        ceiling,
        module=layer.module,
        attributes=attributes,
        norm=layer.norm,
        weight_quantizer=weight_quantizer,
    )
    inserter.store(layer, inserter.place(site, [node]), quantizer)


def _function(inserter: Inserter, layer: Layer) -> None:
    need = inserter.input_need(layer, inserter.needs[layer.name])
    node, source = inserter.reach(layer.inputs[0], need)
    quantizer, ceiling = inserter.own(layer, source is not None)
    a = layer.attributes
    name, parameters = a["name"], a["parameters"]
    site = FunctionSite(
        layer.name, [source], quantizer, ceiling, function=name, parameters=parameters
    )
    inserter.store(layer, inserter.place(site, [node]), quantizer)


def _relu(inserter: Inserter, layer: Layer) -> None:
    """A ReLU that no layer before it could take over: a grid that begins at zero."""
    need = inserter.input_need(layer, inserter.needs[layer.name])
    node, source = inserter.reach(layer.inputs[0], need)
    quantizer, ceiling = inserter.own(layer, source is not None)
    if quantizer is not None:
        site = QuantizeSite(layer.name, [source], quantizer, ceiling)
        node = inserter.place(site, [node])
    inserter.store(layer, node, quantizer)


def _adaptive_avg_pool2d(inserter: Inserter, layer: Layer) -> None:
    _pool(inserter, layer, AdaptivePoolSite)


def _global_avg_pool(inserter: Inserter, layer: Layer) -> None:
    _pool(inserter, layer, GlobalAveragePoolSite)


def _avg_pool2d(inserter: Inserter, layer: Layer) -> None:
    _pool(inserter, layer, AveragePoolSite)


def _pool(inserter: Inserter, layer: Layer, kind: type[Site]) -> None:
    need = inserter.input_need(layer, inserter.needs[layer.name])
    node, source = inserter.reach(layer.inputs[0], need)
    quantizer, ceiling = inserter.own(layer, source is not None)
    extra = {} if kind is GlobalAveragePoolSite else {"attributes": layer.attributes}
    site = kind(layer.name, [source], quantizer, ceiling, **extra)
    inserter.store(layer, inserter.place(site, [node]), quantizer)


def _passing(inserter: Inserter, layer: Layer) -> None:
    need = inserter.input_need(layer, inserter.needs[layer.name])
    reached = [inserter.reach(name, need) for name in layer.inputs]
    sources = [q for _, q in reached]
    if layer.kind == "dropout":
        assert isinstance(layer.module, nn.Dropout)
        axes = layer.attributes.get("axes")
        site: Site = DropoutSite(layer.name, sources, layer.module.p, axes=axes)
    else:
        site = PassSite(layer.name, sources, op=layer.kind, attributes=layer.attributes)
    node = inserter.place(site, [n for n, _ in reached])
    inserter.keep(layer, node, sources[0])


BUILDERS: Mapping[str, Callable[[Inserter, Layer], None]] = {
    **dict.fromkeys(PRODUCTS, _product),
    **dict.fromkeys(PASSING, _passing),
    "add": _add,
    "global_avg_pool": _global_avg_pool,
    "avg_pool2d": _avg_pool2d,
    "adaptive_avg_pool2d": _adaptive_avg_pool2d,
    "mul": _mul,
    "affine": _affine,
    "function": _function,
    "relu": _relu,
    **TOKEN_BUILDERS,
}
