"""Builds the quantized network from the captured layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, fx, nn

from mecq_cli.entropy import as_rows
from mecq_cli.insertion.builders import BUILDERS, NEEDS
from mecq_cli.insertion.model import QuantizedModel, site_path
from mecq_cli.insertion.needs import FLOAT, Need
from mecq_cli.insertion.plan import Assigned, BitPlan
from mecq_cli.insertion.streams import float_values, of_images, origin
from mecq_cli.insertion.taps import channel_axes
from mecq_cli.insertion.values import nonnegative
from mecq_cli.integer.ir import INPUT
from mecq_cli.layers import Layer, Users
from mecq_cli.quantizers import ActivationQuantizer, WeightQuantizer, quantizers_named
from mecq_cli.sites import ClipSite, DequantizeSite, QuantizeSite, Site

BITS_OF_PIXELS = 8
"""A grid of as many values as images have is found once. To learn its step the first convolution
would need the gradient of the images: up to a fifth of the time that a step of training takes."""


@dataclass
class _Value:
    """A value while the network is being built."""

    node: fx.Node
    quantizer: ActivationQuantizer | None
    need: Need
    reached: dict[Need, tuple[fx.Node, ActivationQuantizer | None]] = field(default_factory=dict)


class Inserter:
    """Builds the graph of sites, one layer after the other."""

    def __init__(
        self,
        layers: list[Layer],
        assigned: Assigned,
        plan: BitPlan,
        taps: list[str],
        grid: int,
    ) -> None:
        self.layers, self.plan = layers, plan
        self.bits, self.classifiers, self.governed = assigned
        self.quantizers = quantizers_named(plan.quantizer)
        self.root = nn.Module()
        self.graph = fx.Graph()
        self.sites: list[Site] = []
        self.values: dict[str, _Value] = {}
        self.groups: dict[str, ActivationQuantizer] = {}
        self._of_weights: dict[tuple[int, int], WeightQuantizer] = {}
        self._users = Users(layers)
        self.floats = float_values(layers)
        self.needs = self._collect_needs()
        self.nonnegative = nonnegative(layers)
        self.taps, self.grid = taps, grid

    def build(self) -> QuantizedModel:
        """The whole network."""
        self.values[INPUT] = _Value(self.graph.placeholder("images"), None, FLOAT)
        for layer in self.layers:
            BUILDERS[layer.kind](self, layer)
        logits, _ = self.reach(self.layers[-1].name, FLOAT)
        self.graph.output((logits, *(self._tapped(name) for name in self.taps)))
        graph = fx.GraphModule(self.root, self.graph)
        return QuantizedModel(graph, self.sites, self.classifiers, self.taps, self.governed)

    def _tapped(self, name: str) -> fx.Node:
        """A value as its consumers see it, at the fewest bits it is converted to, as rows.

        The mean over positions is part of the graph, so that a compiler fuses it with what made
        the value: done outside, it cost more than the coding length of its rows.
        """
        value = self.values[name]
        forms = {value.need: value.node, **{n: node for n, (node, _) in value.reached.items()}}
        quantized = forms[min(forms, key=lambda need: need.bits or 32)]
        layer = self._users.by_name[name]
        if len(layer.shape) > 1 and channel_axes(self.layers).get(name) == len(layer.shape):
            # Tokens, however they are arranged.
            tokens = self.graph.call_function(torch.flatten, (quantized, 1, -2))
            return self.graph.call_function(as_rows, (tokens, 1))
        return self.graph.call_function(as_rows, (quantized, self.grid))

    def origin(self, name: str) -> Layer | None:
        """The layer that computed a value, above operations that only move it."""
        return origin(self._users, name)

    # -- needs ---------------------------------------------------------------------------------

    def _collect_needs(self) -> dict[str, Need]:
        """The grid each value takes at its producer: its own need of the highest rank."""
        needs: dict[str, set[Need]] = {self.layers[-1].name: {FLOAT}}
        chosen: dict[str, Need] = {}
        for layer in reversed(self.layers):
            mine = max(needs.get(layer.name, {FLOAT}), key=lambda n: n.rank)
            chosen[layer.name] = mine
            for name in layer.inputs:
                needs.setdefault(name, set()).add(self.input_need(layer, mine))
        return chosen

    def input_need(self, layer: Layer, output: Need = FLOAT) -> Need:
        """What a layer wants of its inputs, where its own value is wanted as ``output``."""
        return NEEDS[layer.kind](self, layer, output)

    def quantizer(self, name: str, need: Need) -> ActivationQuantizer | None:
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

    def weight_quantizer(self, weight: Tensor, bits: int) -> WeightQuantizer:
        """The quantizer of a weight; one for all layers that share it, so that they have the same
        integers."""
        key = (id(weight), bits)
        if key not in self._of_weights:
            self._of_weights[key] = self.quantizers.weight(bits, len(weight))
            self._of_weights[key].initialize(weight)
        return self._of_weights[key]

    # -- the graph -----------------------------------------------------------------------------

    def place(self, site: Site, inputs: Sequence[fx.Node]) -> fx.Node:
        """Make a site part of the network."""
        path = site_path(site.name)
        parent = self.root
        *parents, leaf = path.split(".")
        for part in parents:
            if not hasattr(parent, part):
                parent.add_module(part, nn.Module())
            parent = getattr(parent, part)
        parent.add_module(leaf, site)
        self.sites.append(site)
        return self.graph.call_module(path, tuple(inputs))

    def reach(self, name: str, need: Need) -> tuple[fx.Node, ActivationQuantizer | None]:
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
            return self.place(site, [value.node]), None
        quantizer = self.quantizer(name, need)
        fine = need.bits >= BITS_OF_PIXELS and not need.group
        if quantizer is not None and fine and of_images(self._users, name):
            quantizer.requires_grad_(False)
        site = QuantizeSite(f"{name}.quantize{suffix}", [value.quantizer], quantizer)
        return self.place(site, [value.node]), quantizer

    def own(self, layer: Layer, integer: bool) -> tuple[ActivationQuantizer | None, float | None]:
        """Quantizer and ceiling that the site of ``layer`` itself carries."""
        quantizer = self.quantizer(layer.name, self.needs[layer.name]) if integer else None
        return quantizer, layer.ceiling if quantizer is not None else None

    def store(self, layer: Layer, node: fx.Node, quantizer: ActivationQuantizer | None) -> None:
        """Note what makes the value of a layer; a float one is clipped by a site of its own."""
        need = self.needs[layer.name] if quantizer is not None else FLOAT
        if quantizer is None and layer.ceiling is not None:
            site = ClipSite(f"{layer.name}.relu", [None], None, layer.ceiling)
            node = self.place(site, [node])
        self.values[layer.name] = _Value(node, quantizer, need)

    def keep(self, layer: Layer, node: fx.Node, quantizer: ActivationQuantizer | None) -> None:
        """Note what makes the value of a layer, which has the grid of its input."""
        self.values[layer.name] = _Value(node, quantizer, self.needs[layer.name])
