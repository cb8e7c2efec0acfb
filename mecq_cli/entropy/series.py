"""Polynomial experts on the formed Gram matrix: the centred and the Chebyshev expansion.

Both hold for every spectrum in [0, B], with an error that is known beforehand. Their value is
tr p(K) with p(0) = 0 and their operator is p'(K), so the gradient is that of the value.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import torch
from numpy.polynomial import chebyshev as chebyshev_series
from numpy.polynomial import polynomial as power_series
from torch import Tensor

from mecq_cli.entropy.base import Answer

KINDS = ("centred", "chebyshev")
# No useful degree reaches further.
_HIGHEST_BOUND = 1e6


@dataclass(frozen=True)
class MatrixFunction:
    """f'(K) as a matrix [..., s, s]."""

    matrix: Tensor

    def apply(self, a: Tensor) -> Tensor:
        return self.matrix @ a


def gradient_error(kind: str, degree: int, bound: float) -> float:
    """Largest error of p' relative to 1 / (1 + x) on [0, bound]; of the value relative to tr f(K).

    Centred at a = B / 2, with rho = B / (2 + B): p' is (1 - (-y)^n) / (1 + x), off by rho^n at the
    most. Chebyshev, with r = (sqrt(1 + B) - 1) / (sqrt(1 + B) + 1): the terms left out are
    2 r^k / k T_k and |T_k'| <= 2 k^2 / B, together (4 / B) sum_{k>n} k r^k, times 1 + B. The error
    of p is the integral of that of p' from 0, where p is right, so both bounds hold for it too.
    """
    if bound <= 0.0:
        return 0.0
    if not bound < _HIGHEST_BOUND:
        return math.inf
    if kind == "centred":
        return float((bound / (2.0 + bound)) ** degree)
    r = radius(bound)
    tail = r ** (degree + 1) * ((degree + 1) - degree * r) / (1.0 - r) ** 2
    return 4.0 / bound * tail * (1.0 + bound)


def radius(bound: float) -> float:
    """Chebyshev's r = (sqrt(1 + B) - 1) / (sqrt(1 + B) + 1), without cancellation."""
    return bound / (math.sqrt(1.0 + bound) + 1.0) ** 2


def smallest_degree(
    bound: float, tolerance: float, highest: int, kinds: Collection[str] = KINDS
) -> tuple[str, int] | None:
    """The least even degree within the tolerance on [0, bound], and its better kind, if any."""
    for degree in range(2, highest + 1, 2):
        errors = {kind: gradient_error(kind, degree, bound) for kind in KINDS if kind in kinds}
        best = min(errors, key=errors.__getitem__, default=None)
        if best is not None and errors[best] <= tolerance:
            return best, degree
    return None


def coefficients(kind: str, degree: int, bound: float) -> tuple[np.ndarray, np.ndarray]:
    """Of log(1 + x) and of its derivative, in powers or Chebyshev polynomials of u in [-1, 1].

    x = B (1 + u) / 2. The constant is set so that x = 0 gives 0.
    """
    k = np.arange(1, degree + 1)
    sign = (-1.0) ** (k + 1)
    if kind == "centred":
        series = np.concatenate(([0.0], sign * (bound / (2.0 + bound)) ** k / k))
        derivative = power_series.polyder(series)
        series[0] = -power_series.polyval(-1.0, series)
    else:
        series = np.concatenate(([0.0], 2.0 * sign * radius(bound) ** k / k))
        derivative = chebyshev_series.chebder(series)
        series[0] = -chebyshev_series.chebval(-1.0, series)
    return series, derivative * (2.0 / bound)


def solve_from_gram(k: Tensor, kind: str, degree: int, bound: float) -> Answer:
    """The expansion of an even degree 2h on K [..., s, s], with h matrix products.

    The basis matrices up to h give all traces up to 2h, and one product more the derivative.
    """
    h = degree // 2
    identity = torch.eye(k.shape[-1], dtype=k.dtype, device=k.device)
    u = k * (2.0 / bound) - identity
    basis = [identity.expand_as(k), u]
    while len(basis) <= h:
        basis.append(u @ basis[-1] if kind == "centred" else 2.0 * u @ basis[-1] - basis[-2])
    series, derivative = coefficients(kind, degree, bound)
    traces = _traces(basis, kind)
    weights = torch.as_tensor(series, dtype=torch.float64, device=k.device)
    value = (traces * weights).sum(-1)
    low, high = _split(derivative, h, kind)
    matrix = _combine(low, basis)
    if high.size:
        matrix = matrix + basis[h] @ _combine(high, basis)
    return Answer(value.to(k.dtype), MatrixFunction(matrix))


def _traces(basis: list[Tensor], kind: str) -> Tensor:
    """Traces of b_0 ... b_2h [..., 2h + 1] in float64; T_i T_j = (T_{i+j} + T_{i-j}) / 2."""
    h = len(basis) - 1
    traces = [b.diagonal(dim1=-2, dim2=-1).double().sum(-1) for b in basis]
    for degree in range(h + 1, 2 * h + 1):
        left, right = basis[h], basis[degree - h]
        inner = (left * right).sum(-1).double().sum(-1)
        traces.append(inner if kind == "centred" else 2.0 * inner - traces[2 * h - degree])
    return torch.stack(traces, -1)


def _split(derivative: np.ndarray, h: int, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """The parts of derivative = low + b_h high, each of a degree below h + 1."""
    low, high = derivative[: h + 1].copy(), np.zeros(max(len(derivative) - h, 1))
    for degree in range(h + 1, len(derivative)):
        if kind == "centred":
            high[degree - h] += derivative[degree]
        else:  # T_degree = 2 T_h T_{degree - h} - T_{2h - degree}
            high[degree - h] += 2.0 * derivative[degree]
            low[2 * h - degree] -= derivative[degree]
    return low, high if np.any(high) else np.zeros(0)


def _combine(weights: np.ndarray, basis: list[Tensor]) -> Tensor:
    total = torch.zeros_like(basis[-1])
    for weight, matrix in zip(weights.tolist(), basis, strict=False):
        total = total.add(matrix, alpha=weight)
    return total
