"""The bulk: many small eigenvalues, known by a few moments of S.

Moments mu_k = tr S^k come from probe vectors (Hutchinson) and tr S itself is known exactly. The
measure nu = x dmu has the moments mu_1, mu_2, ...; its Gauss nodes t_j and weights w_j give
tr g(S) = sum_j w_j g(t_j) / t_j for every g with g(0) = 0. Since log(1 + x) / x is completely
monotone, this quadrature is a lower bound of tr log(1 + S), and the one with a node fixed at zero
an upper bound (Golub and Meurant, Matrices, Moments and Quadrature, 2010, chapter 6).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# How many standard errors of the probes count as the error.
_SIGMAS = 3.0
# Nodes are told apart down to this, in units of the mean.
_DISTINCT = 1e-9

Nodes = list[tuple[float, float]]


@dataclass(frozen=True)
class Bulk:
    """What is known of the bulk.

    Attributes:
        logdet: estimate of logdet(I + S).
        error: bound of its error, up to the luck of the probes.
        nodes: (t_j, w_j) of nu.
        moments: mu_1, mu_2, ...
    """

    logdet: float
    error: float
    nodes: Nodes
    moments: Sequence[float]


def probe_moments(images: Sequence[Tensor]) -> Tensor:
    """g^T S^k g for k = 1 .. 2 len(images) - 2, as [k, probes], from images g, S g, S^2 g, ..."""
    images = [image.double() for image in images]
    pairs = [(k // 2, k - k // 2) for k in range(1, 2 * len(images) - 1)]
    return torch.stack([(images[i] * images[j]).sum(0) for i, j in pairs])


def estimate(samples: Tensor, trace: float, squares: float | None = None) -> Bulk:
    """logdet(I + S) by its series where that is known exactly, the probes for the rest.

    log(1 + x) = x - h(x) with tr S known, or x - x^2 / 2 + h(x) where ``squares`` = tr S^2 is
    known too; tr h(S) is the quadrature's. The same probes see tr S (or tr S^2) with an error that
    is known and goes with that of h, so it is regressed out.

    Args:
        samples: [k, probes] of g^T S^k g, k = 1 to at least 4.
        trace: tr S.
        squares: tr S^2 where it is known.
    """
    moments = samples.mean(1).tolist()
    nodes = gauss(moments)
    if not nodes or trace <= 0.0:
        return Bulk(max(trace, 0.0), max(trace, 0.0) ** 2 / 2, [], moments)
    known = 1 if squares is None else 2  # the power of x which is known
    rest = _rest(known)
    total = sum(w * rest(t) / t for t, w in nodes)
    slope = _slope(rest, known, nodes)
    truth = trace if squares is None else squares
    sampled = moments[known - 1]
    total -= slope * (sampled - truth)
    # A probe's h goes with its next moment.
    ratio = total / moments[known] if moments[known] > 0.0 else 0.0
    residual = ratio * samples[known] - slope * samples[known - 1]
    noise = float(residual.std()) / math.sqrt(samples.shape[1])
    lower = sum(w * math.log1p(t) / t for t, w in nodes)
    error = _SIGMAS * noise + max(upper(moments) - lower, 0.0)
    logdet = trace - total if squares is None else trace - squares / 2 + total
    return Bulk(logdet, error, nodes, moments)


def gauss(moments: Sequence[float]) -> Nodes:
    """Gauss's rule [(t, w), ...], ascending, of a measure on x >= 0 with the moments 0, 1, ...

    Half as many nodes as moments; fewer where the measure has fewer points.
    """
    if not (len(moments) >= 2 and moments[0] > 0.0 and moments[1] > 0.0):
        return []
    mass, unit = moments[0], moments[1] / moments[0]
    scaled = np.array([moment / mass / unit**k for k, moment in enumerate(moments)])
    size = len(moments) // 2
    index = np.arange(size)[:, None] + np.arange(size)
    hankel, shifted = scaled[index], scaled[index + 1]
    if not np.linalg.eigvalsh(hankel)[0] > _DISTINCT:
        return gauss(moments[:-2]) if size > 1 else []
    factor = np.linalg.cholesky(hankel)
    half = np.linalg.solve(factor, shifted)
    points, vectors = np.linalg.eigh(np.linalg.solve(factor, half.T))
    # Rounding may put a node at zero a little below it.
    points = np.maximum(points, _DISTINCT * points[-1])
    return [(float(t * unit), float(mass * v * v)) for t, v in zip(points, vectors[0], strict=True)]


def order_one(bulk: Bulk) -> tuple[float, float]:
    """c0 for (I + S)^-1, and a bound of tr S ((I + S)^-1 - c0)^2.

    With t the mean of nu and c0 = 1 / (1 + t): 1 / (1 + x) - c0 = (t - x) / ((1 + x)(1 + t)).
    """
    mass, first, second = bulk.moments[:3]
    mean = first / mass
    return 1.0 / (1.0 + mean), max(second - mean * first, 0.0) / (1.0 + mean) ** 2


def order_two(bulk: Bulk) -> tuple[float, float, float]:
    """c0 and c1 for (I + S)^-1, and a bound of tr S ((I + S)^-1 - c0 - c1 S)^2.

    The line through the nodes t, u: 1 / (1 + x) - line = (x - t)(x - u) / ((1+x)(1+t)(1+u)).
    Needs the moments up to mu_5.
    """
    nodes = gauss(bulk.moments[:4])
    low, high = nodes[0][0], nodes[-1][0]
    scale = 1.0 / ((1.0 + low) * (1.0 + high))
    total, product = low + high, low * high
    # The integral of (x^2 - total x + product)^2 d nu.
    weights = (product**2, -2 * total * product, total**2 + 2 * product, -2 * total, 1.0)
    integral = sum(w * m for w, m in zip(weights, bulk.moments, strict=False))
    return (1.0 + total) * scale, -scale, max(integral, 0.0) * scale**2


def upper(moments: Sequence[float]) -> float:
    """Radau's rule for tr log(1 + S): one node at zero, where log(1 + x) / x is 1.

    Its other nodes are Gauss's for the measure x dnu.
    """
    odd = moments[1:] if len(moments) % 2 else moments[1:-1]
    others = [(t, w / t) for t, w in gauss(odd)]
    at_zero = moments[0] - sum(w for _, w in others)
    return at_zero + sum(w * math.log1p(t) / t for t, w in others)


class _Rest:
    """h(x): what log(1 + x) has beyond the powers that are known, with a positive sign."""

    def __init__(self, known: int) -> None:
        self.known = known

    def __call__(self, x: float) -> float:
        if x < 1e-3:  # where the difference below would be rounding
            return x * x / 2 - x**3 / 3 if self.known == 1 else x**3 / 3 - x**4 / 4
        return x - math.log1p(x) if self.known == 1 else math.log1p(x) - x + x * x / 2


def _rest(known: int) -> _Rest:
    return _Rest(known)


def _slope(rest: _Rest, known: int, nodes: Nodes) -> float:
    """Regression of a probe's h on its mu_known: tr(S^known h(S)) / tr S^(2 known)."""
    above = sum(w * t ** (known - 1) * rest(t) for t, w in nodes)
    below = sum(w * t ** (2 * known - 1) for t, w in nodes)
    return above / below if below > 0.0 else 0.0
