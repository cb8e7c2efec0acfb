"""The expansion of the parent paper around zero, which knows where it does not hold."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from mecq_cli.entropy import exact
from mecq_cli.entropy.base import Answer, coded, gram, largest_eigenvalue_bound
from mecq_cli.entropy.series import MatrixFunction
from mecq_cli.errors import NumericError, UsageError

OnDivergence = Literal["error", "exact"]


def taylor_coding_length(
    z: Tensor,
    distortion: float,
    *,
    order: int = 4,
    on_divergence: OnDivergence = "error",
    tolerance: float = 0.0447,
) -> Tensor:
    """sum_{k=1..order} (-1)^(k+1) / k tr K^k (MEC, arXiv 2210.11464, Eq. 5), in nats.

    Args:
        z: [..., m, d] samples in rows, taken as they are.
        distortion: eps_d^2.
        order: terms of the series, 1 to 32.
        on_divergence: what to do where the series misses the tolerance: raise, or answer exactly.
        tolerance: largest relative error of the gradient; 0.0447 is a cosine of 0.999.

    Raises:
        UsageError: an order or an ``on_divergence`` that makes no sense.
        NumericError: the series does not hold for this z, and ``on_divergence`` is "error".
    """
    if not 1 <= order <= 32:
        raise UsageError(f"taylor: order is {order}; give 1 to 32")
    if on_divergence not in ("error", "exact"):
        raise UsageError(f"taylor: on_divergence is {on_divergence!r}; give 'error' or 'exact'")

    def solver(a: Tensor, lam: float) -> Answer:
        k = gram(a, lam)
        powers = _powers(k, (order + 1) // 2)
        error = gradient_error(powers, order)
        if bool((error <= tolerance).all()):
            return expand(powers, order)
        if on_divergence == "exact":
            return exact.from_gram(k, a, lam)
        raise NumericError(
            f"taylor: order {order} does not hold here, the gradient may be off by "
            f"{float(error.max()):.1e} of its length (allowed: {tolerance:g}); take the estimator "
            "moe or exact, on_divergence='exact', or a larger distortion"
        )

    return coded(z, distortion, solver)


def gradient_error(powers: list[Tensor], order: int) -> Tensor:
    """Bound [...] of ||truncated - true|| / ||true|| for the gradient with respect to z.

    The truncated derivative of log(1 + x) is (1 - (-x)^n) / (1 + x), so the squares are
    sum x (x^n / (1 + x))^2 against sum x / (1 + x)^2. With h the highest power at hand and
    B >= x_max: sum x^(2n+1) <= B^(2n+1-2h) tr K^2h, and tr K^2h = ||K^h||_F^2.
    """
    k, h = powers[0], len(powers)
    squares = torch.linalg.matrix_norm(powers[-1].double()).square()
    # (tr K^2h)^(1/2h) is a norm too, closer to x_max than those of K.
    bound = torch.minimum(largest_eigenvalue_bound(k).double(), squares.pow(0.5 / h))
    trace = k.diagonal(dim1=-2, dim2=-1).double().sum(-1)
    wrong = bound.pow(2 * order + 1 - 2 * h) * squares
    # The smallest positive number stands for a trace of zero, where nothing can be wrong.
    error: Tensor = (1.0 + bound) * (
        wrong / trace.clamp(min=torch.finfo(torch.float64).tiny)
    ).sqrt()
    return error


def _powers(k: Tensor, highest: int) -> list[Tensor]:
    powers = [k]
    for _ in range(highest - 1):
        powers.append(powers[-1] @ k)
    return powers


def expand(powers: list[Tensor], order: int) -> Answer:
    """Value by tr K^(i+j) = <K^i, K^j>; derivative sum_{j<order} (-K)^j by one more product."""
    k, h = powers[0], len(powers)
    value = k.diagonal(dim1=-2, dim2=-1).double().sum(-1)
    for power in range(2, order + 1):
        left, right = powers[power // 2 - 1], powers[power - power // 2 - 1]
        value = value + (-1.0) ** (power + 1) / power * (left * right).double().sum((-2, -1))
    identity = torch.eye(k.shape[-1], dtype=k.dtype, device=k.device).expand_as(k)
    terms = [identity, *powers]
    low = sum(((-1.0) ** j * terms[j] for j in range(min(h, order))), torch.zeros_like(k))
    rest = order - h  # terms of degree h and more
    if rest > 0:
        high = sum(((-1.0) ** j * terms[j] for j in range(rest)), torch.zeros_like(k))
        low = low + (-1.0) ** h * powers[-1] @ high
    return Answer(value.to(k.dtype), MatrixFunction(low))
