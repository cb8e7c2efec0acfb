"""Batch norm in training mode, written so that a compiler makes one pass of each of its sums.

Beside its neighbours PyTorch's own is a wall to the compiler of a CPU: statistics by Welford's
algorithm, element by element. Here they are plain sums, over the positions of an image first and
over the images afterwards, in the order in which the quantizer behind sums the gradient of its
step. On ResNet-20 this and the step's sums together took a third off everything that is not a
convolution.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from mecq_cli.loops import Rounding, dense, norm_round_backward
from mecq_cli.quantizers.rounding import to_integers

Norm = nn.BatchNorm1d | nn.BatchNorm2d


def batch_norm(norm: Norm, y: Tensor) -> Tensor:
    """``norm(y)`` in training mode, in float32; running statistics are updated.

    Not the same to the last bit as PyTorch's: sums are in another order.

    Args:
        norm: with statistics of its own; with or without affine parameters.
        y: [N, C, H, W] or [N, C].
    """
    out, mean, variance = _BatchNorm.apply(y, *_parameters(norm, y), norm.eps)
    _track_batch(norm, y, mean, variance)
    result: Tensor = out
    return result


def rounded_batch_norm(
    norm: Norm,
    y: Tensor,
    rounding: Rounding,
    bounds: tuple[float, float],
) -> Tensor:
    """``round(clip(clip(norm(y), *bounds) / scale + shift, low, high)) * scale``, in bfloat16.

    For a compiled program on a CPU with `mecq_cli.loops`, of which the backward pass is one.

    Args:
        norm: as in `batch_norm`.
        y: bfloat16 [N, C, H, W] or [N, C].
        rounding: what an activation quantizer does.
        bounds: of an activation between the two; infinite without one.
    """
    step, low, high, soft, grad_scale, mid_rise, shift = rounding
    grid = (low, high, soft, mid_rise, shift)
    given = (*_parameters(norm, y), norm.eps, step, *grid, *bounds, grad_scale)
    out, mean, variance = _RoundedBatchNorm.apply(y, *given)
    _track_batch(norm, y, mean, variance)
    result: Tensor = out
    return result


def _parameters(norm: Norm, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weight, bias, and what is near the mean, [C] each."""
    channels = norm.num_features
    weight = norm.weight if norm.affine else torch.ones(channels, device=y.device)
    bias = norm.bias if norm.affine else torch.zeros(channels, device=y.device)
    near = norm.running_mean
    if near is None:
        near = torch.zeros(channels, device=y.device)
    return weight, bias, near.clone()


def _track_batch(norm: Norm, y: Tensor, mean: Tensor, variance: Tensor) -> None:
    if norm.running_mean is not None and norm.running_var is not None:
        track(norm, mean, variance, y.numel() // norm.num_features)


@torch.no_grad()
def track(norm: Norm, mean: Tensor, variance: Tensor, count: int) -> None:
    """Running statistics, as `nn.BatchNorm2d` keeps them: the variance without bias.

    Args:
        norm: one that has them.
        mean, variance: of the batch, [C]; the variance with bias.
        count: values of a channel.
    """
    assert norm.running_mean is not None
    assert norm.running_var is not None
    share: float | Tensor | None = norm.momentum
    if norm.num_batches_tracked is not None:  # else it is a batch that was counted before
        norm.num_batches_tracked.add_(1)
    if share is None:  # a plain average
        assert norm.num_batches_tracked is not None
        share = 1.0 / norm.num_batches_tracked.float()
    norm.running_mean.lerp_(mean, share)
    norm.running_var.lerp_(variance * (count / max(count - 1, 1)), share)


class _BatchNorm(torch.autograd.Function):
    """(x - mean) / sqrt(var + eps) * weight + bias, with the batch's own statistics."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, weight: Tensor, bias: Tensor, near: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``near`` [C] as in `_statistics`."""
        mean, variance = _statistics(y, near)
        factor = torch.rsqrt(variance + eps)
        ctx.save_for_backward(y, weight, mean, factor)
        ctx.mark_non_differentiable(mean, variance)
        scale = weight * factor
        out = y.float() * _channels(scale, y) + _channels(bias - mean * scale, y)
        return out, mean, variance

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Of y, weight and bias."""
        y, weight, mean, factor = ctx.saved_tensors
        count = y.numel() // y.shape[1]
        grad = grads[0].float()
        normalised = (y.float() - _channels(mean, y)) * _channels(factor, y)
        grad_bias, grad_weight = _sum(grad), _sum(grad * normalised)
        common = _channels(grad_bias / count, y) + normalised * _channels(grad_weight / count, y)
        grad_y = (grad - common) * _channels(weight * factor, y)
        return grad_y.to(y.dtype), grad_weight, grad_bias, None, None


class _RoundedBatchNorm(torch.autograd.Function):
    """That, an activation's bounds, and a rounding."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, weight: Tensor, bias: Tensor, near: Tensor, eps: float, step: Tensor,
        low: float, high: float, soft: bool, mid_rise: bool, shift: float,
        floor: float, ceiling: float, grad_scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        mean, variance = _statistics(y, near)
        factor = torch.rsqrt(variance + eps)
        scale = weight * factor
        offset = bias - mean * scale
        ctx.save_for_backward(y, scale, offset, mean, factor, step)
        ctx.settings = (floor, ceiling, low, high, soft, mid_rise, shift, grad_scale)
        ctx.mark_non_differentiable(mean, variance)
        out = y.float() * _channels(scale, y) + _channels(offset, y)
        if (floor, ceiling) != (-math.inf, math.inf):
            out = torch.clamp(out, floor, ceiling)
        units = out * step.reciprocal() + shift
        integers = to_integers(units, torch.clamp(units, low, high), mid_rise)
        return (integers * step).to(y.dtype), mean, variance

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Of y, weight, bias and the step."""
        *settings, grad_scale = ctx.settings
        grad = dense(grads[0].to(ctx.saved_tensors[0].dtype))
        of_y, weight, bias, step = norm_round_backward(grad, *ctx.saved_tensors, *settings)
        return (of_y, weight, bias, None, None, step * grad_scale, *[None] * 8)


def _statistics(y: Tensor, near: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance (with bias) of channels.

    ``near`` [C] is near the mean, or the mean square would swallow the variance.
    """
    count = y.numel() // y.shape[1]
    shifted = y.float() - _channels(near, y)
    offset = _sum(shifted) / count
    variance = (_sum(shifted * shifted) / count - offset * offset).clamp_min(0.0)
    return offset + near, variance


def _channels(values: Tensor, like: Tensor) -> Tensor:
    """[C] in the shape that multiplies ``like``."""
    return values.view(1, -1, 1, 1) if like.dim() == 4 else values.view(1, -1)


def _sum(values: Tensor) -> Tensor:
    """[N, C, ...] summed to [C]."""
    return (values.sum((2, 3)) if values.dim() == 4 else values).sum(0)
