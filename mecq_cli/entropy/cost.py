"""What the experts cost, as measured, so that the choice does not depend on a clock.

Seconds are modelled, not timed: the same call always takes the same expert.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Costs:
    """Rates of one kind of device.

    Attributes:
        product: operations a second of a product of large matrices.
        thin: the same where one side is a few dozen.
        factor: the same for a Cholesky factorisation and the inverse from it.
        call: seconds that any operation takes.
        column: seconds more for each column of a factorisation, where it is latency.
    """

    product: float
    thin: float
    factor: float
    call: float
    column: float = 0.0

    def exact(self, side: int, length: int) -> float:
        """Half a Gram matrix, factor, inverse, product with a."""
        products = 2.0 * side * side * length * (1.0 + 0.62)
        return products / self.product + self._factorise(side) + 10 * self.call

    def head(self, side: int, length: int, rank: int, order: int) -> float:
        """A basis, products with it and with the probes, the backward pass."""
        reach = 4 * side * length if order == 1 else 2 * side * side
        thin = reach * (rank + 48) + 8.0 * side * length * rank + 12.0 * side * rank * rank
        products = 0.0 if order == 1 else 2.0 * side * side * length * (1.0 + 0.62)
        return thin / self.thin + products / self.product + 150 * self.call

    def highest_degree(self, side: int) -> int:
        """Of the polynomial that costs no more than factor and inverse: degree // 2 products."""
        one = 2.0 * side**3 / self.product + 5 * self.call
        return 2 * min(int(self._factorise(side) / one), 8)

    def _factorise(self, side: int) -> float:
        return side**3 / self.factor + side * self.column


# One core of an EPYC (Zen 4, AVX-512) with MKL, float32.
_CPU = Costs(product=90e9, thin=60e9, factor=30e9, call=1e-5)
# Not measured: a factorisation on a GPU is mostly latency, a product is not.
_GPU = Costs(product=20e12, thin=4e12, factor=2e12, call=1e-5, column=4e-6)


def costs_on(device: str) -> Costs:
    """The rates of a device type; all accelerators count as one."""
    return _CPU if device == "cpu" else _GPU
