"""The program against all allotments there are, and what a target counts."""

from __future__ import annotations

import ctypes
import itertools
import math
import os
import re
import sys
from typing import Any

import numpy as np
import pytest
from scipy.optimize import milp

from mecq_cli.errors import UsageError
from mecq_cli.precision import (
    CANDIDATES,
    Choice,
    Solution,
    Target,
    allot,
    average_bits,
    solve,
)


def layer(
    name: str, weights: int, bits: tuple[int, ...] = CANDIDATES, governed: bool = True
) -> Choice:
    return Choice((name,), weights, weights // 9, bits, governed)


def best(values: list[list[float]], weights: list[list[int]], limit: int) -> float:
    """By trying everything."""
    return min(
        sum(row[k] for row, k in zip(values, picks, strict=True))
        for picks in itertools.product(*(range(len(row)) for row in values))
        if sum(row[k] for row, k in zip(weights, picks, strict=True)) <= limit
    )


@pytest.mark.parametrize("seed", range(25))
def test_nothing_within_the_budget_is_better(seed: int) -> None:
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, 7, size=rng.integers(1, 7))
    # Sensitivities span orders of magnitude, and do not always fall with the bits.
    values = [(10.0 ** rng.uniform(-8, 1, n)).tolist() for n in counts]
    weights = [(rng.integers(1, 9) * rng.integers(1, 40_000, n)).tolist() for n in counts]
    least, most = (sum(f(row) for row in weights) for f in (min, max))
    limit = int(rng.integers(least, most + 1))
    found = solve(values, weights, limit)
    assert found.optimal
    assert found.gap == 0
    assert found.weight == sum(row[k] for row, k in zip(weights, found.picks, strict=True)) <= limit
    assert found.value == pytest.approx(best(values, weights, limit), rel=1e-9)
    assert solve(values, weights, limit) == found


def test_a_large_network_takes_no_time_and_is_solved_to_the_end() -> None:
    rng = np.random.default_rng(0)
    sizes = rng.choice([2304, 9216, 36_864, 147_456, 2_359_296], 150)
    values = [(rng.uniform(0.5, 2) * 4.0 ** -np.array(CANDIDATES)).tolist() for _ in sizes]
    weights = [[int(n) * bits for bits in CANDIDATES] for n in sizes]
    found = solve(values, weights, int(2.5 * sizes.sum()), time_limit=30)
    assert found.optimal
    assert 0.999 * 2.5 * sizes.sum() < found.weight <= 2.5 * sizes.sum()


def test_how_far_it_is_from_the_optimum_may_not_be_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the time is over before there is a bound."""
    values, weights = [[3.0, 2.0, 0.0]] * 4, [[1, 2, 4]] * 4

    def unbounded(*args: Any, **kwargs: Any) -> Any:
        result = milp(*args, **kwargs)
        result.status, result.mip_gap = 1, math.inf
        return result

    monkeypatch.setattr("mecq_cli.precision.program.milp", unbounded)
    found = solve(values, weights, 9)
    assert (found.optimal, found.gap) == (False, None)


def test_the_tightest_budget_and_one_below_it() -> None:
    values, weights = [[1.0, 0.0], [5.0, 0.0]], [[1, 10], [1, 10]]
    assert solve(values, weights, 2) == Solution((0, 0), 6.0, 2, True, 0.0)
    assert solve(values, weights, 11).picks == (0, 1)
    with pytest.raises(UsageError, match="exceed the budget"):
        solve(values, weights, 1)


CHOICES = [
    layer("first", 432, (8,), governed=False),
    layer("a", 900),
    layer("b", 9000),
    layer("ruled", 900, (6,)),
    layer("float", 900, (32,)),
]
COSTS = {name: {b: 4.0**-b for b in CANDIDATES} for name in ("a", "b")}


def test_an_average_is_over_what_wbits_governs_and_rules_are_fixed() -> None:
    found = allot(CHOICES, COSTS, Target(2.5, None, "--target-avg-bits 2.5"))
    assert found.bits.keys() == {"a", "b"}
    total = 900 * found.bits["a"] + 9000 * found.bits["b"] + 900 * 6
    assert total <= 2.5 * 10_800
    bits = [8, found.bits["a"], found.bits["b"], 6, 32]
    assert average_bits(CHOICES, bits) == pytest.approx(total / 10_800)
    assert found.costs == {name: COSTS[name][b] for name, b in found.bits.items()}


def test_what_costs_nothing_leaves_no_budget_unused() -> None:
    """Equal costs at all bits, as of layers whose rounding nobody sees."""
    costs = {name: dict.fromkeys(CANDIDATES, 1e-9) for name in ("a", "b")}
    found = allot(CHOICES, costs, Target(4.0, None, ""))
    taken = 900 * found.bits["a"] + 9000 * found.bits["b"] + 900 * 6
    assert taken <= 4 * 10_800 < taken + 9000 + 900
    assert found.costs == dict.fromkeys(("a", "b"), 1e-9)


def test_a_network_of_ends_alone_is_told_so() -> None:
    with pytest.raises(UsageError, match=r"only first and last layers, .* give --wbits instead"):
        Target(4.0, None, "--target-avg-bits 4").check([CHOICES[0]])


def test_a_size_counts_every_layer_with_scales_and_biases() -> None:
    fixed = (432 + 8 * 48) + (900 * 6 // 8 + 800) + (900 * 4 + 800)
    ours = (9900 * 3 + 7) // 8 + 8 * 1100
    found = allot(CHOICES, COSTS, Target(None, fixed + ours + 1, "--target-size x"))
    assert found.bits == {"a": 3, "b": 3}
    assert allot(CHOICES, COSTS, Target(None, fixed + ours - 1, "")).bits != found.bits


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (Target(1.3, None, "--target-avg-bits 1.3"), "too low; .* 1.42 bits a weight with the"),
        (
            Target(7.9, None, "--target-avg-bits 7.9"),
            "too high; .* 7.83 bits a weight",
        ),
        (Target(None, 1000, "--target-size 1kB"), "too low; .* 16,729 bytes with .* at 1 bit$"),
        (Target(None, 10**6, "--target-size 1MB"), r"too high; .* 25,\d\d\d bytes with the"),
    ],
)
def test_a_target_out_of_reach_says_what_is_in_reach(target: Target, words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        allot(CHOICES, COSTS, target)
    assert str(caught.value).startswith(target.label)
    assert "\n" not in str(caught.value)


def test_what_a_message_calls_in_reach_is() -> None:
    for average, bound in ((1.3, "1.42"), (7.9, "7.83")):
        with pytest.raises(UsageError, match=re.escape(bound)):
            Target(average, None, "").check(CHOICES)
        Target(float(bound), None, "").check(CHOICES)


def test_nothing_to_choose_is_said() -> None:
    with pytest.raises(UsageError, match="no layer is left to allot bits to"):
        Target(4.0, None, "--target-avg-bits 4").check([CHOICES[0], CHOICES[3]])


def test_what_the_solver_prints_is_no_result(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """It does so from C, past `sys.stdout`."""

    def chatty(*arguments: Any, **options: Any) -> Any:
        ctypes.CDLL(None).puts(b"chatter that C keeps back")
        os.write(1, b"chatter at once")
        return milp(*arguments, **options)

    monkeypatch.setattr("mecq_cli.precision.program.milp", chatty)
    assert solve([[1.0, 0.0]], [[1, 2]], 2).picks == (1,)
    sys.stdout.write("the result")
    sys.stdout.flush()
    ctypes.CDLL(None).fflush(None)
    assert capfd.readouterr() == ("the result", "")
