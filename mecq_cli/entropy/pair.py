"""The coding lengths of two views, alone and side by side, out of one Gram matrix.

Three calls of an estimator form the same products again and again, and at the small sides of a
network's sites (16 to 128) what they cost is their number. Here is one product, a factorisation
for the two views at once and one for both together, and the gradient written by hand.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mecq_cli.entropy.base import eager

WIDEST_SIDE = 192
"""Up to this smaller side no expert of the mixture beats a factorisation."""

# Relative error that rounding may bring; beyond it the robust estimators answer.
_ROUNDING = 3e-4


class PairLengths(NamedTuple):
    """Nats of the two views side by side (each divided by sqrt 2), and of each alone."""

    joint: Tensor
    first: Tensor
    second: Tensor


@eager
def pair_lengths(first: Tensor, second: Tensor, distortion: float) -> PairLengths | None:
    """Exact coding lengths of [first, second] / sqrt(2), of first and of second.

    Args:
        first, second: float32 rows [m, d]; gradients flow to the first alone.
        distortion: eps_d^2, positive.

    Returns:
        None where float32 does not hold them to 3e-4, or the smaller side is over
        `WIDEST_SIDE`: ask an estimator for each.
    """
    samples, features = first.shape
    if min(samples, features) > WIDEST_SIDE:
        return None
    with torch.autocast(first.device.type, enabled=False):
        found = _Pair.apply(first, second, 1.0 / (samples * distortion))
    joint, one, other, holds = found
    return PairLengths(joint, one, other) if bool(holds) else None


class _Pair(torch.autograd.Function):
    """Values by Cholesky; d joint = lam (Z A^-1), d first = 2 lam Z_1 A_1^-1."""

    @staticmethod
    def forward(ctx: Any, first: Tensor, second: Tensor, lam: float) -> tuple[Tensor, ...]:
        samples, features = first.shape
        by_samples = samples < features
        if by_samples:
            views = torch.stack((first, second))
            alone = torch.baddbmm(_identity(first, samples), views, views.mT, alpha=lam)
            both = alone.mean(0)
        else:
            views = torch.cat((first, second), 1)
            k = views.mT @ views
            both = torch.add(_identity(first, 2 * features), k, alpha=0.5 * lam)
            blocks = torch.stack((k[:features, :features], k[features:, features:]))
            alone = torch.add(_identity(first, features), blocks, alpha=lam)
        factor, info = torch.linalg.cholesky_ex(both)
        factors, infos = torch.linalg.cholesky_ex(alone)
        joint = 2.0 * factor.diagonal().double().log().sum()
        lengths = 2.0 * factors.diagonal(dim1=-2, dim2=-1).double().log().sum(-1)
        # Of sums of a trace's size, at random; and of each 1 + x, perhaps all the same way.
        # Measured by the joint length, the largest of the three terms of a divergence.
        side = factor.shape[-1]
        traces = alone.diagonal(dim1=-2, dim2=-1).sum(-1) - alone.shape[-1]
        slack = torch.finfo(first.dtype).eps * (side**0.5 * traces.amax() + side / 2)
        holds = (info == 0) & (infos == 0).all() & (slack <= _ROUNDING * joint)
        ctx.save_for_backward(first, second, factor, factors[0])
        ctx.lam, ctx.by_samples = lam, by_samples
        value = torch.cat((joint[None], lengths)).to(first.dtype)
        ctx.mark_non_differentiable(holds)
        return value[0], value[1], value[2], holds

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, of_joint: Tensor, of_first: Tensor, *_: Any
    ) -> tuple[Tensor, None, None]:
        first, second, factor, alone = ctx.saved_tensors
        lam, features = ctx.lam, first.shape[1]
        joint_inverse = torch.cholesky_inverse(factor) * (lam * of_joint)
        alone_inverse = torch.cholesky_inverse(alone) * (2.0 * lam * of_first)
        if ctx.by_samples:
            return (joint_inverse + alone_inverse) @ first, None, None
        own = joint_inverse[:features, :features] + alone_inverse
        gradient = torch.addmm(first @ own, second, joint_inverse[features:, :features])
        return gradient, None, None


def _identity(like: Tensor, side: int) -> Tensor:
    return torch.eye(side, dtype=like.dtype, device=like.device)
