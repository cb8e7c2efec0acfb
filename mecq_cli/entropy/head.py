"""The head: the large eigenvalues on a small subspace, and what is left of K without it.

V [s, r] is any orthonormal basis, T = V^T K V, E = K V - V T, P = I - V V^T, A = I + T. With the
Schur complement S = P K P - E A^-1 E^T, which is PSD on the range of P,

    logdet(I + K) = logdet A + logdet(I + S)
    (I + K)^-1    = V A^-1 V^T + N^T (I + S)^-1 N,    N = P - E A^-1 V^T

both exactly, however far V is from eigenvectors. A better V only makes S, the bulk, smaller and
narrower. V is a block Krylov basis, for which only the last block of E is not zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Relative size of the random part which keeps a basis complete where K has a lower rank.
_FILL = 1e-5
# More than this off from V^T V = I, and the identities above no longer hold to the bound.
_ORTHONORMAL = 1e-3


class Product:
    """x -> K x for columns x [s, p], without K where it has not been formed."""

    def __init__(self, a: Tensor, lam: float) -> None:
        self.a, self.lam = a, lam
        self.gram: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        if self.gram is not None:
            return self.gram @ x
        return (self.a @ (self.a.mT @ x)).mul_(self.lam)


@dataclass(frozen=True)
class Head:
    """A basis and what follows from it.

    Attributes:
        v: V [s, r].
        e: the last block of E [s, p].
        t: T [r, r].
        inverse: A^-1 [r, r].
        logdet: logdet A.
        trace: tr T + tr(A^-1 E^T E), which is tr K - tr S.
        spill: ||E A^-1||_F.
    """

    v: Tensor
    e: Tensor
    t: Tensor
    inverse: Tensor
    logdet: float
    trace: float
    spill: float

    @property
    def gradient_size(self) -> float:
        """The head's part of ||f'(K) A||^2 in units of 1 / lam: the sum of x / (1 + x)^2."""
        trace = self.inverse.diagonal().sum() - self.inverse.square().sum()
        return max(float(trace), 0.0)

    @property
    def inverse_end(self) -> Tensor:
        """The columns of A^-1 [r, p] which meet the part of E that is not zero."""
        return self.inverse[:, self.inverse.shape[1] - self.e.shape[1] :]

    def project(self, x: Tensor) -> Tensor:
        """P x."""
        return x - self.v @ (self.v.mT @ x)

    def bulk_product(self, product: Product, x: Tensor) -> Tensor:
        """S x for columns x [s, p] in the range of P."""
        corner = self.inverse_end[-self.e.shape[1] :]
        return self.project(product(x)) - self.e @ (corner @ (self.e.mT @ x))


def build(product: Product, start: Tensor, noise: Tensor, steps: int) -> Head | None:
    """The head on the block Krylov space of ``start`` [s, p]: p * steps dimensions.

    Args:
        noise: [s, p * steps] random numbers that fill the basis up where K has a lower rank.

    Returns:
        None where the basis would not become orthonormal.
    """
    width = start.shape[1]
    v = _extend(None, start, noise[:, :width])
    images: list[Tensor] = []
    for step in range(steps):
        images.append(product(v[:, step * width :]))
        if step + 1 < steps:
            fill = noise[:, (step + 1) * width : (step + 2) * width]
            v = torch.cat((v, _extend(v, images[-1], fill)), 1)
    projected = v.mT @ torch.cat((v, *images), 1)
    rank = v.shape[1]
    defect = projected[:, :rank].clone()
    defect.diagonal().sub_(1.0)
    if not float(defect.abs().max()) < _ORTHONORMAL:
        return None
    return _head(v, projected[:, rank:], images[-1])


def _head(v: Tensor, t: Tensor, last_image: Tensor) -> Head:
    width = last_image.shape[1]
    t = (t + t.mT) / 2
    e = last_image - v @ t[:, -width:]
    # In float64, where a 1 takes no digits away from small eigenvalues.
    identity = torch.eye(t.shape[0], dtype=torch.float64, device=t.device)
    factor, _ = torch.linalg.cholesky_ex(t + identity)
    inverse = torch.cholesky_inverse(factor).to(t.dtype)
    overlap = e.mT @ e
    end = inverse[:, -width:]
    squares = ((end.mT @ end) * overlap).sum()
    taken = t.diagonal().double().sum() + (end[-width:] * overlap).double().sum()
    logdet = 2.0 * factor.diagonal().log().sum()
    scalars = torch.stack((logdet, taken, squares.double().clamp(min=0.0).sqrt()))
    return Head(v, e, t, inverse, *scalars.tolist())


def _extend(v: Tensor | None, block: Tensor, noise: Tensor) -> Tensor:
    """An orthonormal basis [s, p] of what ``block`` adds to v; filled up with noise."""
    if v is not None:
        block = block - v @ (v.mT @ block)
    size = torch.linalg.vector_norm(block, dim=0, keepdim=True).amax()
    unit = block / size.clamp(min=torch.finfo(block.dtype).tiny)
    basis = _q(unit + noise * (_FILL / block.shape[0] ** 0.5))
    if v is None:
        return basis
    # Once more: the first pass leaves what rounding brought in.
    return _q(basis - v @ (v.mT @ basis))


def _q(block: Tensor) -> Tensor:
    q: Tensor = torch.linalg.qr(block)[0]
    return q


@dataclass(frozen=True)
class Deflated:
    """f'(K) with (I + S)^-1 replaced by c0 + c1 S on the range of P.

    Attributes:
        gram: K [s, s]; only needed for c1.
    """

    head: Head
    c0: float
    c1: float = 0.0
    gram: Tensor | None = None

    def apply(self, a: Tensor) -> Tensor:
        head = self.head
        rank, width = head.v.shape[1], head.e.shape[1]
        basis = torch.cat((head.v, head.e), 1)
        if self.gram is None:
            # w = c0 N a, with E^T V = 0 used to pass over a only twice.
            seen = basis.mT @ a
            inner = head.inverse @ seen[:rank]
            tail = inner[rank - width :]
            ew = self.c0 * (seen[rank:] - (head.e.mT @ head.e) @ tail)
            weights = torch.cat(
                (inner - head.inverse_end @ ew - self.c0 * seen[:rank], -self.c0 * tail)
            )
            return torch.addmm(a, basis, weights, beta=self.c0)
        seen = head.v.mT @ a
        inner = head.inverse @ seen
        x = torch.addmm(a, basis, -torch.cat((seen, inner[rank - width :])))
        product = Product(a, 0.0)
        product.gram = self.gram
        w = head.bulk_product(product, x).mul_(self.c1).add_(x, alpha=self.c0)
        return w + head.v @ (inner - head.inverse_end @ (head.e.mT @ w))
