"""Quantized network -> `IntegerModel`: integers, scales and the graph, nothing of training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from mecq_cli.insertion import QuantizedModel
from mecq_cli.integer.ir import INPUT, IntegerModel, Node
from mecq_cli.kernels import run_model
from mecq_cli.sites import DropoutSite, Site


@torch.no_grad()
def integerize(
    model: QuantizedModel, input_shape: tuple[int, int, int], metadata: Mapping[str, Any]
) -> IntegerModel:
    """The integer model of a trained network; the same integers evaluation mode computes with.

    Args:
        model: trained or calibrated.
        input_shape: (C, H, W) of an image.
        metadata: JSON-able description, see `IntegerModel`.
    """
    graph = model.graph
    names: dict[fx.Node, str] = {}
    nodes: list[Node] = []
    for fx_node in graph.graph.nodes:
        if fx_node.op == "placeholder":
            names[fx_node] = INPUT
        elif fx_node.op == "call_module":
            site = graph.get_submodule(str(fx_node.target))
            assert isinstance(site, Site)
            inputs = tuple(names[a] for a in fx_node.args if isinstance(a, fx.Node))
            if isinstance(site, DropoutSite):
                names[fx_node] = inputs[0]
                continue
            nodes.append(site.node(inputs))
            names[fx_node] = site.name
    return IntegerModel(tuple(nodes), input_shape, dict(metadata))


class IntegerModule(nn.Module):
    """An `IntegerModel` as a torch module: normalised float images in, logits out.

    It has no parameters and no gradient; every value between the first and the last node is an
    exact integer.
    """

    def __init__(self, model: IntegerModel) -> None:
        super().__init__()
        self.model = model

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """float32 [N, C, H, W] -> logits float32 [N, classes]."""
        return run_model(self.model, images.float())
