"""The quantized network as a module."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn

from mecq_cli.quantizers import MIN_SCALE, Quantizer
from mecq_cli.quantizers.rounding import quicker
from mecq_cli.sites import DropoutSite, PassSite, ProductSite, Site


class QuantizedModel(nn.Module):
    """The quantized network: a graph of `Site` modules.

    ``model(images)`` gives logits [N, classes]; ``model.graph(images)`` also the tapped values,
    a tuple in the order of ``taps``. In training mode it is the fake-quantized network, in
    evaluation mode the integer one.

    Attributes:
        taps: names of the layers whose (quantized) values the graph returns beside the logits,
            as rows [N, d].
        classifiers: names of the last layers.
        governed: names of the layers whose weights have the bits of the plan, see `assign_bits`.
    """

    def __init__(
        self,
        graph: fx.GraphModule,
        sites: Sequence[Site],
        classifiers: list[str],
        taps: Sequence[str],
        governed: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.graph = graph
        self.site_names = [s.name for s in sites]
        self.classifiers = classifiers
        self.taps = tuple(taps)
        self.governed = tuple(governed)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, classes]."""
        logits: Tensor = self.graph(images)[0]
        return logits

    def sites(self) -> list[Site]:
        """All sites in the order of execution."""
        modules = dict(self.graph.named_modules())
        found = [modules[site_path(name)] for name in self.site_names]
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

    def use_loops(self) -> None:
        """Let compiled training use the backward passes of `mecq_cli.loops`."""
        for module in self.modules():
            if isinstance(module, ProductSite):
                module.in_loops = True
            elif isinstance(module, Quantizer):
                module.quicken(quicker)

    def project(self) -> None:
        """After an optimizer step: bring what quantizers learn back into its range."""
        quantizers = [m for m in self.modules() if isinstance(m, Quantizer)]
        scales = [p for q in quantizers for p in q.positive()]
        with torch.no_grad():
            if scales:
                torch._foreach_clamp_min_(scales, MIN_SCALE)
            for quantizer in quantizers:
                quantizer.project()


def site_path(name: str) -> str:
    """A layer name as a module path; two sites may nest, so each ends in a leaf of its own."""
    return f"{name}.site"
