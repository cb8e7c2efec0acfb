"""Batch norm over the batch of all processes.

PyTorch's own SyncBatchNorm computes on GPUs alone. This one computes wherever PyTorch does.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mecq_cli.entropy.base import eager
from mecq_cli.insertion import QuantizedModel
from mecq_cli.normalization import track
from mecq_cli.sites import ProductSite


def synchronise(model: QuantizedModel) -> None:
    """Let every batch norm in training mode see the batches of all processes."""
    for site in model.sites():
        if isinstance(site, ProductSite) and site.norm is not None:
            site.norm = GlobalBatchNorm(site.norm)


class GlobalBatchNorm(nn.BatchNorm2d):
    """A batch norm whose batch is that of all processes; for inputs [N, C, ...].

    Every process must bring equally many images.

    Args:
        norm: whose parameters and statistics it shares.
    """

    def __init__(self, norm: nn.BatchNorm2d | nn.BatchNorm1d) -> None:
        super().__init__(norm.num_features, norm.eps, norm.momentum, device="meta")
        self.weight, self.bias = norm.weight, norm.bias
        self.running_mean, self.running_var = norm.running_mean, norm.running_var
        self.num_batches_tracked = norm.num_batches_tracked
        self.train(norm.training)

    def _check_input_dim(self, input: Tensor) -> None:
        """Linear layers have norms too: any input will do."""

    def forward(self, input: Tensor) -> Tensor:
        """The same shape and dtype."""
        if not self.training:
            return super().forward(input)
        y, mean, var = _normalised(input, self.weight, self.bias, self.eps)
        if self.track_running_stats:
            track(self, mean, var, dist.get_world_size() * input.numel() // input.shape[1])
        return y


@eager
def _normalised(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """See `_Normalise`; the compiler cannot trace the collectives in it."""
    y, mean, var = _Normalise.apply(x, weight, bias, eps)
    return y, mean, var


class _Normalise(torch.autograd.Function):
    """(x - mean) / sqrt(var + eps) * weight + bias, with the mean and variance of all processes.

    The backward pass is the one for given statistics, less what the statistics themselves depend
    on x: for that it needs two sums over all processes.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """X [N, C, ...]; returns y like x, mean [C] and the biased variance [C]."""
        dims = [d for d in range(x.dim()) if d != 1]
        # Of means and variances: the difference of large sums of squares would lose digits.
        own = torch.stack(torch.var_mean(x.float(), dims, correction=0))
        parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, own)
        variances, means = torch.stack(parts).unbind(1)
        mean = means.mean(0)
        var = (variances + (means - mean).square()).mean(0)
        ctx.save_for_backward(x, weight, mean, var)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, var)
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps), mean, var

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight, mean, var = ctx.saved_tensors
        grad_x, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
            gradients[0], x, weight, mean, var, None, None, False, ctx.eps, [True, True, True]
        )
        # Means of dy * normalised x and of dy, over all images of all processes.
        sums = torch.stack((grad_weight, grad_bias))
        dist.all_reduce(sums)
        sums *= x.shape[1] / (x.numel() * dist.get_world_size())
        by_size, plain = sums.unbind()
        inverse = torch.rsqrt(var + ctx.eps)
        # As one multiple of x and one constant a channel.
        multiple = -weight * by_size * inverse.square()
        constant = -weight * plain * inverse - multiple * mean
        shape = [1, -1, *[1] * (x.dim() - 2)]
        grad_x = grad_x + torch.addcmul(constant.view(shape), x.float(), multiple.view(shape)).to(
            grad_x.dtype
        )
        return grad_x, grad_weight, grad_bias, None
