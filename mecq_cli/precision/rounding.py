"""The network in float, but for the weights of one layer, which are rounded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx

from mecq_cli.insertion import QuantizedModel
from mecq_cli.precision.choices import Choice
from mecq_cli.quantizers import WeightQuantizer
from mecq_cli.sites import ProductSite

MakeQuantizer = Callable[[int, int], WeightQuantizer]
"""(bits, channels) -> what will round such weights."""

Outputs = tuple[Tensor, ...]
"""Logits [N, classes], and the rows [N, d] of each tapped value."""


def quantizer_for(weight: Tensor, bits: int, make: MakeQuantizer) -> WeightQuantizer:
    """A quantizer with its first steps, as a training begins with it."""
    quantizer = make(bits, len(weight)).to(weight.device)
    quantizer.initialize(weight)
    return quantizer


@torch.no_grad()
def rounded(weight: Tensor, bits: int, make: MakeQuantizer) -> Tensor:
    """The weight [O, ...] on its grid."""
    found: Tensor = quantizer_for(weight, bits, make)(weight)
    return found


@torch.no_grad()
def outputs_of(model: QuantizedModel, images: Tensor) -> Outputs:
    """Of the network as it is."""
    outputs: Outputs = model.graph(images)
    return outputs


@torch.no_grad()
def outputs_rounded(
    model: QuantizedModel, images: Tensor, choices: Sequence[Choice], make: MakeQuantizer
) -> Iterator[tuple[Choice, int, Outputs]]:
    """The outputs with one weight at a time rounded to each of its candidates.

    What lies before its first layer is computed once: the walk goes through the graph, and from
    there on to the end. Of the values before it, only those that are still read are kept.

    Args:
        model: in float (`mecq_cli.calibration.float_mode`).
        images: [N, C, H, W], all in one batch.
        choices: the layers; the others stay in float.
        make: the quantizers.
    """
    by_name = {choice.name: choice for choice in choices}
    sites = {site.name: site for site in model.sites() if isinstance(site, ProductSite)}
    modules = dict(model.graph.named_modules())
    walk = _Walk(model.graph, images)
    for place, node in enumerate(walk.nodes):
        site = modules.get(str(node.target)) if node.op == "call_module" else None
        if isinstance(site, ProductSite) and site.name in by_name:
            choice = by_name[site.name]
            sharing = [sites[place] for place in choice.places]
            for bits in choice.bits:
                with _rounding(sharing, quantizer_for(site.weight, bits, make)):
                    yield choice, bits, walk.from_here(place)
        walk.step(place)


@contextmanager
def _rounding(sites: Sequence[ProductSite], quantizer: WeightQuantizer) -> Iterator[None]:
    before = [site.weight_quantizer for site in sites]
    try:
        for site in sites:
            site.weight_quantizer = quantizer
        yield
    finally:
        for site, old in zip(sites, before, strict=True):
            site.weight_quantizer = old


class _Walk(fx.Interpreter):
    """Runs a graph node by node, or from any node to its end."""

    def __init__(self, graph: fx.GraphModule, images: Tensor) -> None:
        super().__init__(graph, garbage_collect_values=False)
        self.nodes = list(graph.graph.nodes)
        self._images = images
        places = {node: place for place, node in enumerate(self.nodes)}
        self._dead_after: dict[int, list[fx.Node]] = {}
        for node in self.nodes:
            last = max((places[user] for user in node.users), default=places[node])
            self._dead_after.setdefault(last, []).append(node)

    def step(self, place: int) -> Any:
        """Run one node, all before which have run; what nobody reads any more is let go."""
        node = self.nodes[place]
        value = self._images if node.op == "placeholder" else self.run_node(node)
        self.env[node] = value
        for dead in self._dead_after.get(place, ()):
            self.env.pop(dead, None)
        return value

    def from_here(self, place: int) -> Outputs:
        """The outputs, from the values that are there."""
        before = dict(self.env)
        for later in range(place, len(self.nodes)):
            outputs = self.step(later)
        self.env = before
        return tuple(outputs)
