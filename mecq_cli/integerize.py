"""Quantized network -> `IntegerModel`: integers, scales and the graph, nothing of training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from mecq_cli.errors import UsageError
from mecq_cli.insertion import QuantizedModel
from mecq_cli.integer.ir import INPUT, IntegerModel, Node
from mecq_cli.kernels import node_tensors, run_model
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
            nodes += site.nodes(inputs)
            names[fx_node] = nodes[-1].name
    return IntegerModel(tuple(nodes), input_shape, dict(metadata))


class IntegerModule(nn.Module):
    """An `IntegerModel` as a torch module: normalised float images in, logits out.

    It has buffers, no parameters and no gradient; every value between the first and the last
    node is an exact integer. It computes where the images are; ``.to(device)`` saves it from
    moving its tensors there each time. Types are part of the integer model, so that ``.half()``
    and the like change nothing.
    """

    def __init__(self, model: IntegerModel) -> None:
        super().__init__()
        self.model = model
        self.tensors = nn.ModuleList(_Tensors(node_tensors(node)) for node in model.nodes)
        self.eval()

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Float32 images [N, C, H, W] of any number N to logits, float32 [N, classes].

        Raises:
            UsageError: the images have another shape, or are no floats.
        """
        wanted = self.model.input_shape
        if images.dim() != 4 or tuple(images.shape[1:]) != wanted or not images.is_floating_point():
            kind = str(images.dtype).removeprefix("torch.")
            raise UsageError(
                f"images are {kind} {list(images.shape)}, this model wants normalised floats "
                f"[N, {', '.join(map(str, wanted))}]"
            )
        device = images.device
        tensors = [
            {name: tensor.to(device) for name, tensor in own.named_buffers()}
            for own in self.tensors
        ]
        # Autocast would round the sums.
        with torch.autocast(device.type, enabled=False):
            return run_model(self.model, images.float(), tensors)


class _Tensors(nn.Module):
    """The tensors of one node."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)

    def _apply(self, fn: Any, recurse: bool = True) -> _Tensors:
        """Take the device from what ``fn`` makes of a tensor, and nothing else."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(fn(tensor).device)

        super()._apply(move, recurse)  # type: ignore[no-untyped-call]
        return self
