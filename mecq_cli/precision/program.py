"""One of several options for each item, at the least cost within a budget, exactly.

The multiple-choice knapsack problem, as an integer linear program that HiGHS solves by branch and
bound (scipy.optimize.milp): x[i, k] is 1 where item i takes option k,

    minimise    sum value[i, k] x[i, k]
    subject to  sum over k of x[i, k] = 1 for each item,  sum weight[i, k] x[i, k] <= limit.
"""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from mecq_cli.errors import EnvironmentFailure, UsageError

TIME_LIMIT = 60.0
"""Seconds. Networks of a hundred layers took hundredths of one."""

_SIZE = 1e4
"""Of the objective as the solver sees it: its tolerance, 1e-6, is an absolute one."""


@dataclass(frozen=True)
class Solution:
    """What was picked.

    Attributes:
        picks: number of the option of each item.
        value, weight: of all picks together.
        optimal: whether it is proven that nothing is better.
        gap: how much better something may be at most, relative to ``value``; 0 if optimal,
            None where that is not known.
    """

    picks: tuple[int, ...]
    value: float
    weight: int
    optimal: bool
    gap: float | None


def solve(
    values: Sequence[Sequence[float]],
    weights: Sequence[Sequence[int]],
    limit: int,
    time_limit: float = TIME_LIMIT,
) -> Solution:
    """Pick options; the same input gives the same picks, unless the time runs out.

    Args:
        values: cost of each option of each item, finite.
        weights: what it takes of the budget, 0 or more.
        limit: the budget.
        time_limit: seconds.

    Raises:
        UsageError: even the lightest options exceed the budget.
        EnvironmentFailure: nothing was found in the time.
    """
    if sum(min(row) for row in weights) > limit:
        raise UsageError("the lightest options exceed the budget")
    counts = [len(row) for row in values]
    flat = np.array([value for row in values for value in row], float)
    amounts = [weight for row in weights for weight in row]
    # Small whole numbers, so that no tolerance of the solver is as large as one of them.
    divisor = math.gcd(*amounts, 0) or 1
    loads = np.array([amount // divisor for amount in amounts], float)
    reference = _reference(values, weights, limit)
    scale = _SIZE / reference if reference > 0 else 1.0
    columns = np.arange(len(flat))
    one_each = coo_array(
        (np.ones(len(flat)), (np.repeat(np.arange(len(counts)), counts), columns)),
        shape=(len(counts), len(flat)),
    )
    with _silent():
        result = milp(
            flat * scale,
            integrality=np.ones(len(flat)),
            bounds=Bounds(0, 1),
            constraints=[
                LinearConstraint(one_each.tocsr(), 1, 1),
                LinearConstraint(loads[None], -np.inf, limit // divisor),
            ],
            options={"time_limit": time_limit, "mip_rel_gap": 0.0},
        )
    if result.x is None:
        raise EnvironmentFailure(
            f"the bits of the layers: nothing was found in {time_limit:g} s ({result.message}); "
            "give the machine more time, or fewer layers by [[layers]] patterns"
        )
    parts = np.split(result.x, np.cumsum(counts)[:-1])
    picks = tuple(int(part.argmax()) for part in parts)
    weight = sum(row[k] for row, k in zip(weights, picks, strict=True))
    if weight > limit:  # a tolerance was used after all: what is missing is taken off the budget
        found = solve(values, weights, limit - (weight - limit), time_limit)
        return Solution(found.picks, found.value, found.weight, False, None)
    value = float(sum(row[k] for row, k in zip(values, picks, strict=True)))
    optimal = result.status == 0
    gap = 0.0 if optimal else result.mip_gap
    known = gap is not None and math.isfinite(gap)
    return Solution(picks, value, weight, optimal, float(gap) if known else None)


@contextmanager
def _silent() -> Iterator[None]:
    """Nothing of what is printed inside reaches stdout, which is for the result.

    HiGHS prints a line now and then that no option turns off, from C: so it is the file descriptor
    that leads elsewhere, until what C keeps back has been written.
    """
    try:
        kept = os.dup(1)
    except OSError:  # it is closed
        yield
        return
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        yield
    finally:
        with suppress(OSError, TypeError, AttributeError):  # another system's C library
            ctypes.CDLL(None).fflush(None)
        os.dup2(kept, 1)
        os.close(kept)


def _reference(
    values: Sequence[Sequence[float]], weights: Sequence[Sequence[int]], limit: int
) -> float:
    """The value of a solution: the k-th lightest option for all, with the largest k that fits."""
    best = 0.0
    ordered = [sorted(range(len(row)), key=row.__getitem__) for row in weights]
    for k in range(max(map(len, ordered))):
        picks = [order[min(k, len(order) - 1)] for order in ordered]
        if sum(row[p] for row, p in zip(weights, picks, strict=True)) > limit:
            break
        best = float(sum(row[p] for row, p in zip(values, picks, strict=True)))
    return best
