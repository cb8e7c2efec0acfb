"""Which layer a number that is not finite comes from. Asked only when a run is about to end."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mecq_cli.insertion import QuantizedModel


def label(name: str) -> str:
    """The module path of a tensor as the user knows it."""
    return name.removeprefix("graph.").replace(".site", "")


def not_finite(model: QuantizedModel, images: Tensor) -> str:
    """The first of images, parameters and layers that holds NaN or Inf, in words.

    Runs the network once more, without gradients: batch norm statistics change.

    Args:
        model: in training mode.
        images: the batch that gave such a loss, [N, C, H, W].
    """
    if not is_finite(images):
        return "the images themselves are not finite"
    for name, parameter in model.named_parameters():
        if not is_finite(parameter):
            return f"{label(name)} is not finite"
    found: list[str] = []

    def look(name: str) -> Any:
        def hook(module: nn.Module, arguments: Any, output: Any) -> None:
            if not found and isinstance(output, Tensor) and not is_finite(output):
                found.append(name)

        return hook

    handles = [site.register_forward_hook(look(site.name)) for site in model.sites()]
    try:
        with torch.no_grad():
            model.graph(images)
    finally:
        for handle in handles:
            handle.remove()
    return f"first in layer {found[0]}" if found else "every layer's output is finite"


def is_finite(tensor: Tensor) -> bool:
    """Whether there is neither NaN nor Inf in it; integers are finite."""
    return bool(torch.isfinite(tensor).all())
