"""The mixture of experts: the cheapest one which holds the error bound for this spectrum."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mecq_cli.entropy import bulk as bulk_expert
from mecq_cli.entropy import exact, series
from mecq_cli.entropy import head as head_expert
from mecq_cli.entropy.base import (
    Answer,
    Scaled,
    coded,
    gram,
    largest_eigenvalue_bound,
    lower_gram,
    mirrored,
    trace_of_gram,
)
from mecq_cli.entropy.bulk import Bulk
from mecq_cli.entropy.cost import costs_on
from mecq_cli.entropy.head import Head, Product
from mecq_cli.entropy.state import MoeState
from mecq_cli.errors import UsageError

EXPERTS = ("linear", "head_order1", "head_order2", "centred", "chebyshev", "exact")
# Columns of a Krylov block.
_WIDTH = 16
# Probes at a large side, and how many entries they have together at a smaller one: what a probe
# sees is the noisier the fewer eigenvalues there are.
_PROBES, _PROBE_ENTRIES = 16, 2**14
# The subspace needs fewer products where it starts from that of the last call.
_STEPS, _WARM_STEPS = 3, 2
# A wide block may have no more columns than these; it is for many outliers at a large side.
_WIDEST = 128
# A lone call tries head and bulk up to this mean eigenvalue.
_LONE_MEAN = 0.08
# By order: the part of the exact cost which a rung may cost, since it may miss.
_GAIN = {1: 0.8, 2: 0.65}
# tr S is a difference of traces, whose rounding may be no more than this.
_ROUNDING = 1e-4
# Of the cosine's bound the part which the estimates of its own terms may use up.
_SAFETY = 0.8


@dataclass(frozen=True)
class Bounds:
    """What an answer has to hold.

    Attributes:
        value: relative error of the value.
        gradient: one minus the cosine between the gradient and the true one.
    """

    value: float = 1e-3
    gradient: float = 1e-3


def moe_coding_length(
    z: Tensor,
    distortion: float,
    *,
    state: MoeState | None = None,
    tolerance: float = 1e-3,
    experts: tuple[str, ...] | None = None,
) -> Tensor:
    """logdet(I_m + z z^T / (m * distortion)) by the cheapest expert within the bounds, in nats.

    Args:
        z: [m, d] samples in rows, taken as they are.
        distortion: eps_d^2.
        state: what is kept from call to call: a warm start, fresh probes, who answered. Without
            it every call is like the first.
        tolerance: bound of the value's relative error and of one minus the gradient's cosine.
        experts: the experts allowed, of `EXPERTS`; None: all. "exact" always is, as the last.

    Raises:
        UsageError: an unknown expert, or a tolerance that makes no sense.
    """
    unknown = set(experts or ()) - set(EXPERTS)
    if unknown:
        raise UsageError(
            f"moe: unknown expert {', '.join(sorted(unknown))}; there are {', '.join(EXPERTS)}"
        )
    if not 0.0 < tolerance < 1.0:
        raise UsageError(f"moe: tolerance is {tolerance}; give a number between 0 and 1")
    allowed = frozenset(experts or EXPERTS) | {"exact"}
    bounds = Bounds(tolerance, tolerance)

    def solver(a: Tensor, lam: float) -> Answer:
        name, answer = _Gate(a, lam, state, bounds, allowed, z.shape[0] <= z.shape[1]).answer()
        if state is not None:
            state.record(name)
        return answer

    return coded(z, distortion, solver)


@dataclass(frozen=True)
class _Rung:
    """A try of head and bulk: the width of a Krylov block, and the order of the bulk."""

    width: int
    order: int


class _Gate:
    """One call: tries the experts from the cheapest on, and keeps what each has worked out."""

    def __init__(
        self,
        a: Tensor,
        lam: float,
        state: MoeState | None,
        bounds: Bounds,
        allowed: frozenset[str],
        rows_are_samples: bool,
    ) -> None:
        self.a, self.lam, self.bounds, self.allowed = a, lam, bounds, allowed
        self.lasting = state is not None
        self.state = MoeState() if state is None else state
        self.rows_are_samples = rows_are_samples
        self.product = Product(a, lam)
        self.costs = costs_on(a.device.type)

    def answer(self) -> tuple[str, Answer]:
        """The expert's name and what it says."""
        total = trace_of_gram(self.a, self.lam)
        trace = float(total)
        # 0 <= x - log(1 + x) <= x^2 / 2 and 1 - 1 / (1 + x) <= x, all x <= tr K.
        if trace <= self.bounds.value and "linear" in self.allowed:
            return "linear", Answer(self.a.new_tensor(trace), Scaled(1.0))
        rungs = self._rungs()
        if rungs and self._worth(trace):
            first = self.state.first_rung(len(rungs))
            for index in range(first, len(rungs)):
                found = self._deflated(rungs[index], trace)
                if found is not None:
                    self.state.settled(first, index)
                    return f"head_order{rungs[index].order}", found
            self.state.settled(first, len(rungs))
        return self._from_gram(total)

    def _rungs(self) -> list[_Rung]:
        """Head and bulk in ascending cost, as far as they cost less than the exact answer."""
        side, length = self.a.shape
        exact_cost = self.costs.exact(side, length)
        widths = {max(_WIDTH, min(_WIDEST, side // share)) for share in (side, 64, 32)}
        rungs = []
        if "head_order1" in self.allowed:
            rungs = [_Rung(width, 1) for width in sorted(widths)]
        if "head_order2" in self.allowed:
            rungs.append(_Rung(_WIDTH, 2))
        return [
            rung
            for rung in rungs
            if side > 4 * _STEPS * rung.width
            and self.costs.head(side, length, _STEPS * rung.width, rung.order)
            < _GAIN[rung.order] * exact_cost
        ]

    def _worth(self, trace: float) -> bool:
        """Whether a try will pay.

        Not where rounding would eat the bulk. Where the eigenvalues are large in the mean only a
        state can tell: it learns from a miss, a lone call would pay for it each time.
        """
        if not trace * torch.finfo(self.a.dtype).eps < _ROUNDING:
            return False
        return self.lasting or trace / self.a.shape[0] < _LONE_MEAN

    def _deflated(self, rung: _Rung, trace: float) -> Answer | None:
        """Head and bulk of order 1 without the Gram matrix, or of order 2 with it."""
        if rung.order == 2 and self.product.gram is None:
            self.product.gram = gram(self.a, self.lam)
        head = self._head(rung.width)
        if head is None:
            return None
        remaining = max(trace - head.trace, 0.0)
        if rung.order == 1 and not self._narrow(head, remaining):
            return None
        squares = _squares(head, self.product) if rung.order == 2 else None
        probes = max(_PROBES, _PROBE_ENTRIES // self.a.shape[0])
        images = [head.project(self.state.probes(self.a, probes))]
        # The third product is for the value's bound alone where the order is 1.
        for last in (3, 4) if rung.order == 1 else (4,):
            while len(images) < last:
                images.append(head.bulk_product(self.product, images[-1]))
            moments = bulk_expert.probe_moments(images)
            estimate = bulk_expert.estimate(moments, remaining, squares)
            operator = self._operator(head, estimate, rung.order)
            if operator is None:
                return None
            value = head.logdet + estimate.logdet
            if estimate.error <= self.bounds.value * value:
                return Answer(self.a.new_tensor(value), operator)
        return None

    def _head(self, width: int) -> Head | None:
        warm = self.state.start(self.a, self.rows_are_samples, width)
        missing = width - warm.shape[1]
        start = torch.cat((self.state.normal(self.a, missing), warm), 1) if missing else warm
        steps = _STEPS if missing else _WARM_STEPS
        noise = self.state.normal(self.a, width * steps)
        head = head_expert.build(self.product, start, noise, steps)
        if head is not None:
            self.state.keep(self.a, head, self.rows_are_samples, width)
        return head

    def _narrow(self, head: Head, remaining: float) -> bool:
        """Whether order 1 may hold, by what random data of this shape would leave as a bulk.

        Its eigenvalues have the mean c and, by Marchenko and Pastur, weighted with themselves the
        variance c^2 s / n. A factor of 2 is left to be wrong by.
        """
        side, length = self.a.shape
        mean = remaining / (side - head.v.shape[1])
        slope = mean / (1.0 + mean)
        bulk = remaining / (1.0 + mean) ** 2
        wrong = bulk * slope**2 * side / length
        return wrong <= 4.0 * self.bounds.gradient * (bulk + head.gradient_size)

    def _operator(self, head: Head, estimate: Bulk, order: int) -> head_expert.Deflated | None:
        """The derivative, where the gradient holds its bound."""
        if not estimate.nodes:
            return head_expert.Deflated(head, 1.0)
        c1 = 0.0
        if order == 1:
            c0, wrong = bulk_expert.order_one(estimate)
        else:
            c0, c1, wrong = bulk_expert.order_two(estimate)
        size = head.gradient_size + sum(w / (1.0 + t) ** 2 for t, w in estimate.nodes)
        wrong *= 1.0 + head.spill**2
        # The sine of the angle is no more than ||wrong|| / ||gradient||.
        if not wrong <= 2.0 * _SAFETY * self.bounds.gradient * size:
            return None
        return head_expert.Deflated(head, c0, c1, self.product.gram if order == 2 else None)

    def _from_gram(self, trace: Tensor) -> tuple[str, Answer]:
        """A polynomial where it is cheaper than a factorisation, else that."""
        lower = self.product.gram
        if lower is None:
            lower = lower_gram(self.a, self.lam)
        # x_max >= tr K^2 / tr K >= tr K / s: without hope there, the cheap bound is not needed.
        if self._polynomial(float(trace) / self.a.shape[0]) is not None:
            squares = 2.0 * lower.tril().square().sum() - lower.diagonal().square().sum()
            if self._polynomial(float(squares / trace)) is not None:
                k = mirrored(lower)
                bound = float(largest_eigenvalue_bound(k))
                found = self._polynomial(bound)
                if found is not None:
                    return found[0], series.solve_from_gram(k, *found, bound)
        return "exact", exact.from_gram(lower, self.a, self.lam, trace)

    def _polynomial(self, bound: float) -> tuple[str, int] | None:
        """Kind and degree for a spectrum in [0, bound], where it costs less than the exact one."""
        highest = self.costs.highest_degree(self.a.shape[0])
        return series.smallest_degree(bound, self.bounds.value / 2, highest, self.allowed)


def _squares(head: Head, product: Product) -> float:
    """The trace of S^2 exactly, with K formed.

    ||P K P||^2 = ||K||^2 - 2 ||K V||^2 + ||T||^2, and S = P K P - E A^-1 E^T.
    """
    assert product.gram is not None
    width = head.e.shape[1]
    corner = head.inverse_end[-width:].double()
    inner = (head.e.mT @ product(head.e)).double()
    overlap = corner @ (head.e.mT @ head.e).double()
    image = head.t.double().square().sum() + head.e.double().square().sum()  # ||K V||^2
    total = product.gram.square().sum(1).double().sum() - 2.0 * image
    total += head.t.double().square().sum()
    total += -2.0 * (corner * inner).sum() + (overlap * overlap.mT).sum()
    return max(float(total), 0.0)


def share_of_answers(counts: Mapping[str, int]) -> dict[str, float]:
    """Which expert answered which share of the calls, of those which answered at all."""
    calls = sum(counts.values())
    return {name: counts[name] / calls for name in EXPERTS if counts.get(name)}


def report(state: MoeState) -> dict[str, Any]:
    """Calls, and the share of them that each expert answered."""
    return {"calls": state.calls, "experts": share_of_answers(state.counts)}
