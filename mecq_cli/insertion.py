"""Which tensors get which quantizer, and the quantized network that follows from it.

Every consumer of a value states what it needs: a convolution wants a grid of its activation
bits, a residual add an 8-bit grid with a power-of-two step, the output floats. The producer of
the value takes the most precise of these grids as its own; the others are reached from there by
a requantization, which is shared by all consumers with the same need. Pools, concatenations and
the like pass needs on to whoever feeds them.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, fx, nn

from mecq_cli.capture import capture
from mecq_cli.entropy import as_rows
from mecq_cli.errors import UsageError
from mecq_cli.integer.ir import INPUT
from mecq_cli.layers import Layer
from mecq_cli.quantizers import (
    MIN_SCALE,
    ActivationQuantizer,
    Quantizer,
    quantizers_named,
)
from mecq_cli.sites import (
    AddSite,
    AveragePoolSite,
    ClipSite,
    DequantizeSite,
    DropoutSite,
    GlobalAveragePoolSite,
    PassSite,
    ProductSite,
    QuantizeSite,
    Site,
)

Tap = Literal["penultimate", "stages", "layers"]
PRODUCTS = ("conv2d", "linear")
PASSING = ("max_pool2d", "concat", "flatten", "slice", "pad", "dropout")
EDGE_BITS = 8
"""Bits of the edges that are neither read by a convolution nor residual: pools."""


@dataclass(frozen=True)
class Bits:
    """Bits of one layer: weight and input activation, 32 for FP."""

    wbits: int
    abits: int


@dataclass(frozen=True)
class BitPlan:
    """How many bits each layer gets, and by which quantizers.

    Attributes:
        wbits, abits: of every layer but the first and the last; 1 to 8, or 32.
        first_last_bits: of those two, weights and input.
        residual_bits: 8, or 32 to leave residual adds in float.
        reduce_range: weights of 8 bits get 7, wherever the 8 come from.
        overrides: (pattern on the layer name, wbits or None, abits or None), the last one wins.
        quantizer: name of those of weights and activations, see mecq_cli.quantizers.
    """

    wbits: int
    abits: int
    first_last_bits: int = 8
    residual_bits: int = 8
    reduce_range: bool = False
    overrides: Sequence[tuple[str, int | None, int | None]] = ()
    quantizer: str = "lsq"


@dataclass(frozen=True)
class Need:
    """What a consumer wants of a value: a grid (bits) or a float (bits None).

    ``group`` names the concatenation whose inputs must share one grid.
    """

    bits: int | None
    power_of_two: bool = False
    group: str = ""

    @property
    def rank(self) -> tuple[bool, int, str]:
        """The producer's own grid is the need of the highest rank."""
        return self.power_of_two, self.bits or 0, self.group


FLOAT = Need(None)


class QuantizedModel(nn.Module):
    """The quantized network: a graph of `Site` modules.

    ``model(images)`` gives logits [N, classes]; ``model.graph(images)`` also the tapped values,
    a tuple in the order of ``taps``. In training mode it is the fake-quantized network, in
    evaluation mode the integer one.

    Attributes:
        taps: names of the layers whose (quantized) values the graph returns beside the logits,
            as rows [N, d].
        classifiers: names of the last layers.
    """

    def __init__(
        self,
        graph: fx.GraphModule,
        sites: Sequence[Site],
        classifiers: list[str],
        taps: Sequence[str],
    ) -> None:
        super().__init__()
        self.graph = graph
        self.site_names = [s.name for s in sites]
        self.classifiers = classifiers
        self.taps = tuple(taps)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, classes]."""
        logits: Tensor = self.graph(images)[0]
        return logits

    def sites(self) -> list[Site]:
        """All sites in the order of execution."""
        modules = dict(self.graph.named_modules())
        found = [modules[_path(name)] for name in self.site_names]
        assert all(isinstance(s, Site) for s in found)
        return found

    def convolve_integers(self) -> int:
        """Let convolutions in training be of integers where they are compiled; how many can be.

        Not those that dropout feeds: in training it takes values off their grid.
        """
        modules = dict(self.graph.named_modules())
        unsafe: set[fx.Node] = set()
        count = 0
        for node in self.graph.graph.nodes:
            if node.op != "call_module":
                continue
            site = modules[str(node.target)]
            if isinstance(site, DropoutSite) or (
                isinstance(site, PassSite) and unsafe & set(node.all_input_nodes)
            ):
                unsafe.add(node)
            elif isinstance(site, ProductSite) and not unsafe & set(node.all_input_nodes):
                site.on_integers = site.could_be_on_integers
                count += site.on_integers
        return count

    def project(self) -> None:
        """After an optimizer step: bring what quantizers learn back into its range."""
        quantizers = [m for m in self.modules() if isinstance(m, Quantizer)]
        scales = [p for q in quantizers for p in q.positive()]
        with torch.no_grad():
            if scales:
                torch._foreach_clamp_min_(scales, MIN_SCALE)
            for quantizer in quantizers:
                quantizer.project()


def insert(
    model: nn.Module,
    input_shape: tuple[int, int, int],
    plan: BitPlan,
    taps: Sequence[Tap] = (),
    grid: int = 1,
) -> QuantizedModel:
    """Capture ``model`` and put quantizers in. The parameters are the model's own.

    Args:
        model: FP classifier.
        input_shape: (C, H, W).
        plan: bits and quantizers.
        taps: kinds of values the graph returns beside the logits, see `tapped_layers`.
        grid: they are averaged over grid x grid cells of a map, see `as_rows`.

    Raises:
        UsageError: the model has an operation without an integer form, an override matches no
            layer, or there is no such quantizer.
    """
    layers = capture(model, input_shape)
    bits, classifiers = assign_bits(layers, plan)
    return _Inserter(layers, bits, classifiers, plan, tapped_layers(layers, taps), grid).build()


def tapped_layers(layers: list[Layer], taps: Sequence[Tap]) -> list[str]:
    """Layers whose values are tapped, in the order of execution.

    ``penultimate``: what the last convolution or linear layer reads. ``stages``: the last
    residual add (or concatenation, or convolution) of each spatial resolution. ``layers``: what
    every convolution or linear layer but the first reads.
    """
    by_name = {layer.name: layer for layer in layers}
    products = [layer for layer in layers if layer.kind in PRODUCTS]
    wanted: set[str] = set()
    if "penultimate" in taps:
        wanted.add(products[-1].inputs[0])
    if "layers" in taps:
        wanted |= {p.inputs[0] for p in products if p.inputs[0] != INPUT}
    if "stages" in taps:
        convolved = {p.shape[1:] for p in products if len(p.shape) == 3}
        # Behind the last residual add of a resolution only the next stage's narrow beginning
        # may follow, so an add is the end of a stage where there is one.
        last: dict[tuple[int, ...], str] = {}
        for kinds in (PRODUCTS, ("concat",), ("add",)):
            last |= {
                layer.shape[1:]: layer.name
                for layer in layers
                if layer.shape[1:] in convolved and layer.kind in kinds
            }
        # The logits of a convolutional classifier are no stage.
        wanted |= {name for name in last.values() if name != _first_above(layers[-1].name, by_name)}
    return [layer.name for layer in layers if layer.name in wanted]


def assign_bits(layers: list[Layer], plan: BitPlan) -> tuple[dict[str, Bits], list[str]]:
    """Bits of each conv2d and linear layer, and the names of the last ones."""
    products = [layer for layer in layers if layer.kind in PRODUCTS]
    if not products:
        raise UsageError("this model has no convolution or linear layer to quantize")
    by_name = {layer.name: layer for layer in layers}
    firsts = [p.name for p in products if _first_above(p.inputs[0], by_name) == INPUT]
    last = _first_above(layers[-1].name, by_name)
    ends = {*firsts, last}
    bits = {}
    for layer in products:
        end = layer.name in ends
        # "--wbits 32" means an FP weight everywhere, the ends included.
        wbits = plan.first_last_bits if end and plan.wbits != 32 else plan.wbits
        abits = plan.first_last_bits if end and plan.abits != 32 else plan.abits
        bits[layer.name] = Bits(wbits, abits)
    for pattern, wbits_or_none, abits_or_none in plan.overrides:
        hits = [name for name in bits if fnmatch.fnmatchcase(name, pattern)]
        if not hits:
            raise UsageError(
                f"layer pattern {pattern!r} matches no layer; the layers are {', '.join(bits)}"
            )
        for name in hits:
            old = bits[name]
            bits[name] = Bits(wbits_or_none or old.wbits, abits_or_none or old.abits)
    if plan.reduce_range:
        bits = {name: replace(b, wbits=7) if b.wbits == 8 else b for name, b in bits.items()}
    return bits, [last]


def _first_above(name: str, by_name: dict[str, Layer]) -> str:
    """The first product at or above a value, through operations that only move values."""
    while name != INPUT and by_name[name].kind not in PRODUCTS:
        if by_name[name].kind == "add":
            return name
        name = by_name[name].inputs[0]
    return name


@dataclass
class _Value:
    """A value while the network is being built."""

    node: fx.Node
    quantizer: ActivationQuantizer | None
    need: Need
    reached: dict[Need, tuple[fx.Node, ActivationQuantizer | None]] = field(default_factory=dict)


class _Inserter:
    """Builds the graph of sites, one layer after the other."""

    def __init__(
        self,
        layers: list[Layer],
        bits: dict[str, Bits],
        classifiers: list[str],
        plan: BitPlan,
        taps: list[str],
        grid: int,
    ) -> None:
        self.layers, self.bits, self.classifiers, self.plan = layers, bits, classifiers, plan
        self.quantizers = quantizers_named(plan.quantizer)
        self.root = nn.Module()
        self.graph = fx.Graph()
        self.sites: list[Site] = []
        self.values: dict[str, _Value] = {}
        self.groups: dict[str, ActivationQuantizer] = {}
        self.needs = self._collect_needs()
        self.nonnegative = nonnegative(layers)
        self.taps, self.grid = taps, grid

    def build(self) -> QuantizedModel:
        self.values[INPUT] = _Value(self.graph.placeholder("images"), None, FLOAT)
        for layer in self.layers:
            getattr(self, f"_{self._builder(layer)}")(layer)
        logits, _ = self._reach(self.layers[-1].name, FLOAT)
        self.graph.output((logits, *(self._tapped(name) for name in self.taps)))
        graph = fx.GraphModule(self.root, self.graph)
        return QuantizedModel(graph, self.sites, self.classifiers, self.taps)

    def _tapped(self, name: str) -> fx.Node:
        """A value as its consumers see it, at the fewest bits it is converted to, as rows.

        The mean over positions is part of the graph, so that a compiler fuses it with what made
        the value: done outside, it cost more than the coding length of its rows.
        """
        value = self.values[name]
        forms = {value.need: value.node, **{n: node for n, (node, _) in value.reached.items()}}
        quantized = forms[min(forms, key=lambda need: need.bits or 32)]
        return self.graph.call_function(as_rows, (quantized, self.grid))

    @staticmethod
    def _builder(layer: Layer) -> str:
        if layer.kind in PRODUCTS:
            return "product"
        return "passing" if layer.kind in PASSING else layer.kind

    # -- needs ---------------------------------------------------------------------------------

    def _collect_needs(self) -> dict[str, Need]:
        """The grid each value takes at its producer: its own need of the highest rank."""
        needs: dict[str, set[Need]] = {self.layers[-1].name: {FLOAT}}
        chosen: dict[str, Need] = {}
        for layer in reversed(self.layers):
            mine = max(needs.get(layer.name, {FLOAT}), key=lambda n: n.rank)
            chosen[layer.name] = mine
            for name in layer.inputs:
                needs.setdefault(name, set()).add(self._input_need(layer, mine))
        return chosen

    def _input_need(self, layer: Layer, output: Need) -> Need:
        if layer.kind in PRODUCTS:
            abits = self.bits[layer.name].abits
            return FLOAT if abits == 32 else Need(abits)
        if layer.kind == "add":
            if self.plan.residual_bits == 32 or self.plan.abits == 32:
                return FLOAT
            return Need(self.plan.residual_bits, power_of_two=True)
        if layer.kind in PASSING:
            if layer.kind == "concat" and output.bits is not None and not output.group:
                return Need(output.bits, output.power_of_two, layer.name)
            return output
        if layer.kind == "avg_pool2d" and output.bits is None:
            return FLOAT  # its sums of integers only go to a grid
        return FLOAT if self.plan.abits == 32 else Need(EDGE_BITS)

    def _quantizer(self, name: str, need: Need) -> ActivationQuantizer | None:
        """The quantizer for a need of the value ``name``; one for all inputs of a concatenation."""
        if need.bits is None:
            return None
        if need.group and need.group in self.groups:
            return self.groups[need.group]
        quantizer = self.quantizers.for_values(
            need.bits,
            power_of_two=need.power_of_two,
            nonnegative=(need.group or name) in self.nonnegative,
        )
        if need.group:
            self.groups[need.group] = quantizer
        return quantizer

    # -- the graph -----------------------------------------------------------------------------

    def _place(self, site: Site, inputs: Sequence[fx.Node]) -> fx.Node:
        path = _path(site.name)
        parent = self.root
        *parents, leaf = path.split(".")
        for part in parents:
            if not hasattr(parent, part):
                parent.add_module(part, nn.Module())
            parent = getattr(parent, part)
        parent.add_module(leaf, site)
        self.sites.append(site)
        return self.graph.call_module(path, tuple(inputs))

    def _reach(self, name: str, need: Need) -> tuple[fx.Node, ActivationQuantizer | None]:
        """The value ``name`` in the form ``need``, converted once for all who want it so."""
        value = self.values[name]
        if value.need == need or (need.bits is None and value.quantizer is None):
            return value.node, value.quantizer
        if value.need == replace(need, power_of_two=True):
            return value.node, value.quantizer  # a power of two is as good as any other step
        if need not in value.reached:
            value.reached[need] = self._convert(name, value, need)
        return value.reached[need]

    def _convert(
        self, name: str, value: _Value, need: Need
    ) -> tuple[fx.Node, ActivationQuantizer | None]:
        count = len(value.reached)
        suffix = f"_{count + 1}" if count else ""
        if need.bits is None:
            site: Site = DequantizeSite(f"{name}.dequantize{suffix}", [value.quantizer])
            return self._place(site, [value.node]), None
        quantizer = self._quantizer(name, need)
        site = QuantizeSite(f"{name}.quantize{suffix}", [value.quantizer], quantizer)
        return self._place(site, [value.node]), quantizer

    def _own(self, layer: Layer, integer: bool) -> tuple[ActivationQuantizer | None, float | None]:
        """Quantizer and ceiling that the site of ``layer`` itself carries."""
        quantizer = self._quantizer(layer.name, self.needs[layer.name]) if integer else None
        return quantizer, layer.ceiling if quantizer is not None else None

    def _store(self, layer: Layer, node: fx.Node, quantizer: ActivationQuantizer | None) -> None:
        need = self.needs[layer.name] if quantizer is not None else FLOAT
        if quantizer is None and layer.ceiling is not None:
            site = ClipSite(f"{layer.name}.relu", [None], None, layer.ceiling)
            node = self._place(site, [node])
        self.values[layer.name] = _Value(node, quantizer, need)

    def _product(self, layer: Layer) -> None:
        bits = self.bits[layer.name]
        need = self._input_need(layer, FLOAT)
        node, source = self._reach(layer.inputs[0], need)
        integer = bits.wbits != 32 and source is not None
        if source is not None and not integer:
            # An FP weight on quantized activations: the values go through the grid, as floats.
            dequantize = DequantizeSite(f"{layer.name}.dequantize", [source])
            node, source = self._place(dequantize, [node]), None
        quantizer, ceiling = self._own(layer, integer)
        assert isinstance(layer.module, (nn.Conv2d, nn.Linear))
        weight_quantizer = None
        if bits.wbits != 32:
            weight_quantizer = self.quantizers.weight(bits.wbits, len(layer.module.weight))
            weight_quantizer.initialize(layer.module.weight)
        site = ProductSite(
            layer.name,
            [source],
            quantizer,
            ceiling,
            module=layer.module,
            attributes=layer.attributes,
            norm=layer.norm,
            weight_quantizer=weight_quantizer,
        )
        site.abits = bits.abits
        self._store(layer, self._place(site, [node]), quantizer)

    def _add(self, layer: Layer) -> None:
        need = self._input_need(layer, FLOAT)
        reached = [self._reach(name, need) for name in layer.inputs]
        integer = need.bits is not None
        if integer:
            # The sum is exact only between powers of two; a finer step follows it.
            self.needs[layer.name] = need
        quantizer, ceiling = self._own(layer, integer)
        site = AddSite(layer.name, [q for _, q in reached], quantizer, ceiling)
        self._store(layer, self._place(site, [n for n, _ in reached]), quantizer)

    def _global_avg_pool(self, layer: Layer) -> None:
        self._pool(layer, GlobalAveragePoolSite)

    def _avg_pool2d(self, layer: Layer) -> None:
        self._pool(layer, AveragePoolSite)

    def _pool(self, layer: Layer, kind: type[Site]) -> None:
        need = self._input_need(layer, self.needs[layer.name])
        node, source = self._reach(layer.inputs[0], need)
        quantizer, ceiling = self._own(layer, source is not None)
        extra = {"attributes": layer.attributes} if kind is AveragePoolSite else {}
        site = kind(layer.name, [source], quantizer, ceiling, **extra)
        self._store(layer, self._place(site, [node]), quantizer)

    def _passing(self, layer: Layer) -> None:
        need = self._input_need(layer, self.needs[layer.name])
        reached = [self._reach(name, need) for name in layer.inputs]
        sources = [q for _, q in reached]
        if layer.kind == "dropout":
            assert isinstance(layer.module, nn.Dropout)
            site: Site = DropoutSite(layer.name, sources, layer.module.p)
        else:
            site = PassSite(layer.name, sources, op=layer.kind, attributes=layer.attributes)
        node = self._place(site, [n for n, _ in reached])
        self.values[layer.name] = _Value(node, sources[0], self.needs[layer.name])


def nonnegative(layers: Sequence[Layer]) -> set[str]:
    """Layers whose values cannot be negative: a ReLU, and what moves, adds or averages such."""
    found: set[str] = set()
    for layer in layers:
        keeps = layer.kind in (*PASSING, "add", "avg_pool2d", "global_avg_pool")
        if layer.ceiling is not None or (keeps and found.issuperset(layer.inputs)):
            found.add(layer.name)
    return found


def _path(name: str) -> str:
    """A layer name as a module path; two sites may nest, so each ends in a leaf of its own."""
    return f"{name}.site"
