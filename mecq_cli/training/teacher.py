"""The frozen FP network: its logits are distilled, its features are the second view."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mecq_cli.insertion import BitPlan, Tap, insert
from mecq_cli.sites import DropoutSite, ProductSite


class Teacher(nn.Module):
    """The FP network with the same taps as the quantized one.

    Batch norms are folded into the weights in front of them: a sixth of its time on a CPU.

    Args:
        model: FP classifier; what is not folded shares its parameters: it must not be trained.
        input_shape: (C, H, W).
        taps, grid: as the quantized network has them.
        bf16: keep the weights of products in bfloat16, to which autocast would turn them in every
            step: half the memory, and the same results.
    """

    def __init__(
        self,
        model: nn.Module,
        input_shape: tuple[int, int, int],
        taps: Sequence[Tap],
        grid: int = 1,
        bf16: bool = False,
    ) -> None:
        super().__init__()
        self.network = insert(model, input_shape, BitPlan(32, 32), taps, grid)
        # Constants of the graph are made on the CPU.
        self.network.to(next(model.parameters()).device)
        self.network.requires_grad_(False)
        for site in self.network.sites():
            if not isinstance(site, ProductSite):
                continue
            if site.norm is not None:
                _fold(site, site.norm)
            if bf16:
                site.weight = nn.Parameter(site.weight.bfloat16(), requires_grad=False)
        # Sites compute in real values in training mode; dropout is what else differs there.
        self.network.train()
        for module in self.network.modules():
            if isinstance(module, DropoutSite):
                module.eval()

    @torch.no_grad()
    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Logits [N, classes] and the tapped values, as rows."""
        outputs: tuple[Tensor, ...] = self.network.graph(images)
        return outputs


@torch.no_grad()
def _fold(site: ProductSite, norm: nn.BatchNorm2d | nn.BatchNorm1d) -> None:
    """The product with the batch norm behind it as one product with a bias."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    factor = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    weight = site.weight * factor.reshape(-1, *[1] * (site.weight.dim() - 1))
    bias = -norm.running_mean if site.bias is None else site.bias - norm.running_mean
    site.weight = nn.Parameter(weight, requires_grad=False)
    site.bias = nn.Parameter(bias * factor + norm.bias, requires_grad=False)
    site.norm = None
