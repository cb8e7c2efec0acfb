"""Means."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from mecq_cli.integer.ir import Node
from mecq_cli.sites.base import Site


class GlobalAveragePoolSite(Site):
    """Mean over the plane."""

    op = "global_avg_pool"

    def compute(self, *inputs: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, 1, 1]."""
        return inputs[0].mean((2, 3), keepdim=True)


class AveragePoolSite(Site):
    """Mean over windows."""

    op = "avg_pool2d"

    def __init__(self, *args: Any, attributes: dict[str, Any], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.attributes = attributes

    def compute(self, *inputs: Tensor) -> Tensor:
        """Windows as torch defines them."""
        a = self.attributes
        return F.avg_pool2d(
            inputs[0], a["kernel"], a["stride"], a["padding"], a["ceil_mode"],
            a["count_include_pad"],
        )  # fmt: skip

    def node(self, inputs: tuple[str, ...]) -> Node:
        """With the window."""
        return Node(self.name, self.op, inputs, self.output_grid(), dict(self.attributes))


class AdaptivePoolSite(Site):
    """Mean over windows that share a plane out, to a size."""

    op = "adaptive_avg_pool2d"

    def __init__(self, *args: Any, attributes: dict[str, Any], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.attributes = attributes

    def compute(self, *inputs: Tensor) -> Tensor:
        """Windows as torch defines them."""
        return F.adaptive_avg_pool2d(inputs[0], tuple(self.attributes["size"]))

    def node(self, inputs: tuple[str, ...]) -> Node:
        """With the size."""
        return Node(self.name, self.op, inputs, self.output_grid(), dict(self.attributes))
