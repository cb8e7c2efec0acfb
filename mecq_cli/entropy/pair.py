"""Two views of every site: how far they agree, and the coding lengths of both and of each.

Features are prepared (columns standardised, rows of unit length), multiplied and factorised by the
same few operations for all sites, and the gradient back to the features is written by hand. At the
small sides of a network's sites (8 to 128) what the term costs is the number of its operations:
through autograd and an estimator for each length it was some hundred a site.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mecq_cli.entropy.base import eager
from mecq_cli.entropy.representation import SHORTEST, centre, inverse_deviations, row_norms

WIDEST_SIDE = 192
"""Up to this smaller side no expert of the mixture beats a factorisation."""

# Relative error that rounding may bring; beyond it the robust estimators answer.
_ROUNDING = 3e-4


class PairTerms(NamedTuple):
    """Of each site, as vectors [S].

    Attributes:
        joint: nats of the two views side by side, each divided by sqrt 2.
        first, second: nats of each alone.
        agreement: mean cosine between their rows.
    """

    joint: Tensor
    first: Tensor
    second: Tensor
    agreement: Tensor


def is_small(rows: Tensor) -> bool:
    """Whether the smaller side of rows [m, d] is at most `WIDEST_SIDE`."""
    return min(rows.shape) <= WIDEST_SIDE


@eager
def pair_terms(
    first: Sequence[Tensor], second: Sequence[Tensor], distortion: float
) -> PairTerms | None:
    """Exact coding lengths, and agreement, of the views ``normalise(standardise(x))``.

    Args:
        first, second: features of each site, float32 rows [m, d]; gradients flow to the first
            alone.
        distortion: eps_d^2, positive.

    Returns:
        None where float32 does not hold them to 3e-4, or a smaller side is over `WIDEST_SIDE`:
        ask an estimator for each.
    """
    if not all(is_small(x) for x in first):
        return None
    with torch.autocast(first[0].device.type, enabled=False):
        joint, one, other, agreement, holds = _Pairs.apply(distortion, *first, *second)
    return PairTerms(joint, one, other, agreement) if bool(holds) else None


class _Pairs(torch.autograd.Function):
    """Values by Cholesky; d joint = lam (Z A^-1), d first = 2 lam Z_1 A_1^-1."""

    @staticmethod
    def forward(ctx: Any, distortion: float, *rows: Tensor) -> tuple[Tensor, ...]:
        count = len(rows) // 2
        saved, matrices, agreement = [], [], []
        for first, second in zip(rows[:count], rows[count:], strict=True):
            views, rate, norm = _prepare(torch.stack((first, second)))
            matrices += _matrices(views, _lam(views, distortion))
            agreement.append((views[0] * views[1]).sum() / len(first))
            saved += [views, rate[0], norm[0]]
        factors, infos, logdets, traces = _by_side(_factorise, matrices)
        values = torch.stack(logdets).reshape(count, 3).to(rows[0].dtype)
        largest = torch.stack(traces).reshape(count, 3)[:, 1:].amax(1)
        # Of sums of a trace's size, at random; and of each 1 + x, perhaps all the same way.
        # Measured by the joint length, the largest of the three terms of a divergence.
        # Made on the device: to copy them there would be to wait for it.
        sides = torch.stack([values.new_full((), len(a)) for a in matrices[::3]])
        slack = torch.finfo(values.dtype).eps * (sides.sqrt() * largest + sides / 2)
        holds = (torch.stack(infos) == 0).all() & (slack <= _ROUNDING * values[:, 0]).all()
        # The second view alone has no gradient.
        ctx.save_for_backward(*saved, *(f for i, f in enumerate(factors) if i % 3 < 2))
        ctx.distortion = distortion
        ctx.mark_non_differentiable(holds)
        return (*values.unbind(1), torch.stack(agreement), holds)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, of_joint: Tensor, of_first: Tensor, _: Any, of_agreement: Tensor, *__: Any
    ) -> tuple[Tensor | None, ...]:
        count = len(of_joint)
        saved, factors = ctx.saved_tensors[: 3 * count], ctx.saved_tensors[3 * count :]
        (inverses,) = _by_side(lambda stacked: (torch.cholesky_inverse(stacked),), factors)
        gradients = []
        for i in range(count):
            views, rate, norm = saved[3 * i : 3 * i + 3]
            first, second = views
            samples, d = first.shape
            lam = _lam(views, ctx.distortion)
            joint = inverses[2 * i] * (lam * of_joint[i])
            alone = inverses[2 * i + 1] * (2.0 * lam * of_first[i])
            if samples < d:
                gradient = (joint + alone) @ first
            else:
                gradient = torch.addmm(first @ (joint[:d, :d] + alone), second, joint[d:, :d])
            gradient += second * (of_agreement[i] / samples)
            gradients.append(_prepared_backward(gradient, first, rate, norm))
        return (None, *gradients, *[None] * count)


def _prepare(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``normalise(standardise(x))`` of [2, m, d], and what makes columns and rows that."""
    centred = centre(x)
    rate = inverse_deviations(centred)
    standard = centred * rate
    norm = row_norms(standard)
    return standard / norm, rate, norm


def _prepared_backward(gradient: Tensor, view: Tensor, rate: Tensor, norm: Tensor) -> Tensor:
    """The gradient back through `_prepare`, of one view [m, d]."""
    # A row of less than SHORTEST is not of unit length, and so not only turned by its gradient.
    along = (gradient * view).sum(-1, keepdim=True) * (norm > SHORTEST)
    of_standard = (gradient - view * along) / norm
    standard = view * norm
    slope = (of_standard * standard).mean(-2, keepdim=True)
    return rate * (of_standard - of_standard.mean(-2, keepdim=True) - standard * slope)


def _lam(views: Tensor, distortion: float) -> float:
    return 1.0 / (views.shape[-2] * distortion)


def _matrices(views: Tensor, lam: float) -> list[Tensor]:
    """I + lam Z Z^T, or I + lam Z^T Z where that is smaller: of both views and of each alone."""
    samples, d = views.shape[1:]
    if samples < d:
        alone = torch.baddbmm(_identity(views, samples), views, views.mT, alpha=lam)
        return [alone.mean(0), *alone]
    both = torch.cat(views.unbind(), 1)
    k = both.mT @ both
    blocks = torch.stack((k[:d, :d], k[d:, d:]))
    alone = torch.add(_identity(views, d), blocks, alpha=lam)
    return [torch.add(_identity(views, 2 * d), k, alpha=0.5 * lam), *alone]


def _factorise(a: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Cholesky factors of [k, s, s], whether there are any (0), log determinants, tr(A - I)."""
    factor, info = torch.linalg.cholesky_ex(a)
    logdet = 2.0 * factor.diagonal(dim1=-2, dim2=-1).double().log().sum(-1)
    return factor, info, logdet, a.diagonal(dim1=-2, dim2=-1).sum(-1) - a.shape[-1]


def _by_side(
    function: Callable[[Tensor], tuple[Tensor, ...]], matrices: Sequence[Tensor]
) -> list[list[Tensor]]:
    """The results of a batched function, each as a list in the order of the matrices.

    Those of one side are one batch.
    """
    groups: dict[int, list[int]] = {}
    for i, matrix in enumerate(matrices):
        groups.setdefault(len(matrix), []).append(i)
    found: list[tuple[Tensor, ...]] = [()] * len(matrices)
    for places in groups.values():
        results = function(torch.stack([matrices[i] for i in places]))
        for i, each in zip(places, zip(*(r.unbind() for r in results), strict=True), strict=True):
            found[i] = each
    return [list(column) for column in zip(*found, strict=True)]


def _identity(like: Tensor, side: int) -> Tensor:
    return torch.eye(side, dtype=like.dtype, device=like.device)
