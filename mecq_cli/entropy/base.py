"""What all estimators share: the Gram matrix, an answer, and its way through autograd.

With A the data [s, n] turned so that s <= n (Sylvester: logdet(I + lam A A^T) is the same for A
and A^T), K = lam A A^T and f(x) = log(1 + x), an estimator answers with the value tr f(K) and
with an operator that applies f'(K), or what it takes for it, to A: the gradient is
2 lam f'(K) A. All of it is batched: A is [..., s, n].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mecq_cli.errors import UsageError

# From this side on, half of the Gram matrix in blocks is faster than all of it at once.
_BLOCKED_SIDE = 384
_BLOCKS = 4


class Operator(Protocol):
    """An explicit matrix function of K."""

    def apply(self, a: Tensor) -> Tensor:
        """f'(K) a, for a of shape [..., s, n]."""


@dataclass(frozen=True)
class Scaled:
    """f'(K) = factor * I."""

    factor: float

    def apply(self, a: Tensor) -> Tensor:
        return a * self.factor


@dataclass(frozen=True)
class Answer:
    """What an estimator says: tr f(K), of shape [...], and f'(K)."""

    value: Tensor
    operator: Operator


Solver = Callable[[Tensor, float], Answer]
AnyFunction = TypeVar("AnyFunction", bound=Callable[..., Any])


def eager(function: AnyFunction) -> AnyFunction:
    """Keep torch.compile out of a function whose way depends on the numbers it meets."""
    return cast(AnyFunction, torch.compiler.disable(function))


def coded(z: Tensor, distortion: float, solver: Solver) -> Tensor:
    """The coding length of z [..., m, d] by ``solver``, as a differentiable tensor [...].

    Computed in float32 or better under any autocast.

    Raises:
        UsageError: a shape or a distortion that makes no sense.
    """
    if z.dim() < 2 or 0 in z.shape[-2:] or not z.is_floating_point():
        raise UsageError(
            f"coding length: got z of shape {list(z.shape)} and type {z.dtype}; "
            "give real features [samples, features] with at least one of each"
        )
    if not (math.isfinite(distortion) and distortion > 0):
        raise UsageError(f"coding length: distortion is {distortion}; give a positive number")
    with torch.autocast(z.device.type, enabled=False):
        z = z if z.dtype == torch.float64 else z.float()
        value = _Coded.apply(z, 1.0 / (z.shape[-2] * distortion), solver)
    assert isinstance(value, Tensor)
    return value


class _Coded(torch.autograd.Function):
    """tr f(K), whose gradient is 2 lam f'(K) A by the operator of the same answer."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, lam: float, solver: Solver) -> Tensor:
        answer = solver(turned(z), lam)
        ctx.save_for_backward(z)
        ctx.operator = answer.operator
        ctx.lam = lam
        return answer.value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        (z,) = ctx.saved_tensors
        with torch.autocast(z.device.type, enabled=False):
            gradient = ctx.operator.apply(turned(z))
            gradient = gradient * (2.0 * ctx.lam * upstream)[..., None, None]
        return (gradient if gradient.shape == z.shape else gradient.mT), None, None


def turned(z: Tensor) -> Tensor:
    """The data z [..., m, d] with its smaller side first."""
    return z if z.shape[-2] <= z.shape[-1] else z.mT


def gram(a: Tensor, lam: float) -> Tensor:
    """K = lam a a^T [..., s, s], all of it."""
    return mirrored(lower_gram(a, lam)) if _in_blocks(a) else (a @ a.mT) * lam


def mirrored(lower: Tensor) -> Tensor:
    """The symmetric matrix [..., s, s] of a lower triangle."""
    return lower.tril() + lower.tril(-1).mT


def lower_gram(a: Tensor, lam: float) -> Tensor:
    """K [..., s, s] where only the lower triangle counts: 0.62 of the operations.

    PyTorch has no symmetric product; block rows up to the diagonal come close to one.
    """
    if not _in_blocks(a):
        return (a @ a.mT) * lam
    side = a.shape[0]
    result = a.new_zeros(side, side)
    step = -(-side // _BLOCKS)
    for start in range(0, side, step):
        stop = min(start + step, side)
        torch.mm(a[start:stop], a[:stop].mT, out=result[start:stop, :stop])
    return result.mul_(lam)


def _in_blocks(a: Tensor) -> bool:
    return a.dim() == 2 and a.device.type == "cpu" and a.shape[0] >= _BLOCKED_SIDE


def trace_of_gram(a: Tensor, lam: float) -> Tensor:
    """The trace of K [...] in float64, at the cost of one pass over a."""
    # Along the dimension that lies together in memory.
    inner = -1 if a.stride(-1) <= a.stride(-2) else -2
    norms: Tensor = torch.linalg.vector_norm(a, dim=inner)
    return lam * norms.double().square().sum(-1)


def largest_eigenvalue_bound(k: Tensor) -> Tensor:
    """B [...] >= x_max(K) for K [..., s, s] PSD: the least of ||K||_inf, ||K||_F and tr K."""
    row_sums = k.abs().sum(-1).amax(-1)
    frobenius = torch.linalg.matrix_norm(k)
    trace = k.diagonal(dim1=-2, dim2=-1).sum(-1)
    return torch.minimum(torch.minimum(row_sums, frobenius), trace)
