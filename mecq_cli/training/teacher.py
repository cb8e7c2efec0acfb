"""The frozen FP network: its logits are distilled, its features are the second view."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mecq_cli.insertion import BitPlan, Tap, insert
from mecq_cli.sites import DropoutSite


class Teacher(nn.Module):
    """The FP network with the same taps as the quantized one.

    Args:
        model: FP classifier; its parameters are shared, and it must not be trained.
        input_shape: (C, H, W).
        taps, grid: as the quantized network has them.
    """

    def __init__(
        self,
        model: nn.Module,
        input_shape: tuple[int, int, int],
        taps: Sequence[Tap],
        grid: int = 1,
    ) -> None:
        super().__init__()
        self.network = insert(model, input_shape, BitPlan(32, 32), taps, grid)
        self.network.requires_grad_(False)
        # Sites compute in real values in training mode; what differs in a trained network,
        # batch norm and dropout, is held in evaluation mode.
        self.network.train()
        for module in self.network.modules():
            if isinstance(module, (nn.BatchNorm2d, nn.BatchNorm1d, DropoutSite)):
                module.eval()

    @torch.no_grad()
    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Logits [N, classes] and the tapped values, as rows."""
        outputs: tuple[Tensor, ...] = self.network.graph(images)
        return outputs
