"""Grids without zero: when they are taken, their gradients, and what the integers make of them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mecq_cli.integer.ir import INPUT, Grid, Node
from mecq_cli.kernels import run_node
from mecq_cli.quantizers.mid_rise import MidRiseActivation
from mecq_cli.quantizers.soft_ends import SoftEndsActivation
from mecq_cli.sites import QuantizeSite

KINDS = [(1, 1), (2, 1), (2, 3), (2, 5)]
"""Bits, and odd zero points of half a step."""


def some(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


def without_zero(bits: int, zero_point: int, scale: float = 0.3) -> MidRiseActivation:
    """One whose sample lies evenly on such a grid."""
    quantizer = MidRiseActivation(bits)
    levels = torch.arange(2**bits) * 2.0 - zero_point
    quantizer.initialize(levels.repeat(100) * scale)
    assert bool(quantizer.without_zero)
    assert int(quantizer.zero_point) == zero_point
    with torch.no_grad():
        quantizer.scale.fill_(scale)
    return quantizer


class On(MidRiseActivation):
    """What made values that lie on a grid."""

    def __init__(self, grid: Grid) -> None:
        super().__init__(grid.bits)
        self.given = grid

    def grid(self) -> Grid:
        return self.given


def squared(quantizer: SoftEndsActivation, x: Tensor) -> float:
    return float((quantizer(x).detach() - x).square().mean())


@pytest.mark.parametrize(("bits", "share"), [(1, 0.65), (2, 0.82)])
def test_what_is_spread_around_zero_is_rounded_better(bits: int, share: float) -> None:
    """Of a Gaussian; the errors at best are 0.363 and 0.119 (Max, 1960)."""
    x = some(20_000)
    ours, theirs = MidRiseActivation(bits), SoftEndsActivation(bits)
    ours.initialize(x)
    theirs.initialize(x)
    assert bool(ours.without_zero)
    assert squared(ours, x) < share * squared(theirs, x)
    assert squared(ours, x) == pytest.approx({1: 0.363, 2: 0.119}[bits], rel=0.05)


@pytest.mark.parametrize(
    ("bits", "values"),
    [(2, some(5_000).relu()), (3, some(5_000)), (2, torch.tensor([-0.5, 0.0, 0.5, 1.0] * 99))],
)
def test_else_the_grid_is_that_with_a_zero(bits: int, values: Tensor) -> None:
    """Never negative; many bits; and where the values themselves lie on such a grid."""
    ours, theirs = MidRiseActivation(bits), SoftEndsActivation(bits)
    ours.initialize(values)
    theirs.initialize(values)
    assert not bool(ours.without_zero)
    assert ours.grid() == theirs.grid()
    assert ours.threshold_grid() is None
    assert torch.equal(ours(values), theirs(values))


def test_sums_of_a_residual_stream_keep_their_zero() -> None:
    quantizer = MidRiseActivation(2, power_of_two=True)
    quantizer.initialize(some(5_000))
    assert quantizer.grid().spacing == 1


@pytest.mark.parametrize(("bits", "zero_point"), KINDS)
def test_from_floats_the_integers_are_those_of_the_training(bits: int, zero_point: int) -> None:
    quantizer = without_zero(bits, zero_point)
    fine, grid = quantizer.threshold_grid(), quantizer.grid()
    assert fine is not None
    x = some(20_000) * 1.5
    trained = quantizer(x).detach()
    nodes = [
        Node("q", "quantize", (INPUT,), fine),
        Node("t", "threshold", ("q",), grid, {"thresholds": quantizer.thresholds(None)}),
    ]
    values = run_node(nodes[0], (x,), [None])
    codes = run_node(nodes[1], (values,), [fine])
    assert set(codes.unique().int().tolist()) == set(range(0, 2 * 2**bits, 2))
    torch.testing.assert_close((codes - grid.zero_point) * grid.scale, trained)


@pytest.mark.parametrize(("bits", "zero_point"), KINDS)
@pytest.mark.parametrize(
    "source",
    [
        Grid(0.015625, 128, 8, 0, 255),
        Grid(0.0625, 60, 8, 0, 255),
        Grid(0.0625, 0, 8, 0, 255),  # its least integer is above thresholds
        Grid(0.25, 1, 2, 0, 3),
        Grid(0.17, 3, 2, 0, 6, 2),
    ],
)
@pytest.mark.parametrize("ceiling", [None, math.inf, 0.5])
def test_from_a_grid_too(bits: int, zero_point: int, source: Grid, ceiling: float | None) -> None:
    """Each of its integers, behind an activation too."""
    quantizer = without_zero(bits, zero_point)
    site = QuantizeSite("s", [On(source)], quantizer, ceiling)
    places = torch.arange(0, source.qmax + 1, source.spacing, dtype=torch.float32)
    trained = site.train()((places - source.zero_point) * source.scale).detach()
    codes = site.eval()(places)
    torch.testing.assert_close((codes - zero_point) * quantizer.grid().scale, trained)


def test_each_threshold_passes_the_gradient_within_a_step() -> None:
    """In a triangle: half a step away half of it; between two the triangles add up to all."""
    one, two = without_zero(1, 1, scale=0.5), without_zero(2, 3, scale=0.5)
    x = torch.tensor([-3.0, -2.5, -2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0])
    x = x - 0.5 / 126  # where the thresholds are
    of_one = x.clone().requires_grad_()
    one(of_one).sum().backward()
    expected = (1 - (torch.arange(-6, 6) * 0.5).abs()).clamp_min(0)
    expected[-1] = 0  # x jumps there from 2 to 3
    torch.testing.assert_close(of_one.grad, expected, atol=1e-5, rtol=0)
    of_two = x.clone().requires_grad_()
    two(of_two).sum().backward()
    ramp = torch.tensor([0.0, 0.0, 0.0, 0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 0.5, 0.0, 0.0])
    torch.testing.assert_close(of_two.grad, ramp, atol=1e-5, rtol=0)
    assert one.scale.grad is not None


def test_the_step_learns() -> None:
    """Towards the optimum of a Gaussian: 0.996 between two of four levels."""
    x = some(50_000)
    quantizer = without_zero(2, 3, scale=0.9)
    optimizer = torch.optim.SGD(quantizer.parameters(), 1.0)
    for _ in range(200):
        optimizer.zero_grad()
        (quantizer(x.view(50, -1)) - x.view(50, -1)).square().mean().backward()
        optimizer.step()
    assert 2 * float(quantizer.scale.detach()) == pytest.approx(0.996, abs=0.03)


def test_the_kind_of_the_grid_is_part_of_the_state() -> None:
    trained, fresh = without_zero(2, 1), MidRiseActivation(2)
    fresh.load_state_dict(trained.state_dict())
    x = some(500)
    assert torch.equal(fresh(x), trained(x))
    assert fresh.grid() == trained.grid()
    assert fresh.thresholds(None) == trained.thresholds(None)


def test_fewer_bits_begin_anew() -> None:
    """As `--lower-from` does: what suits four bits is found again at two."""
    quantizer = MidRiseActivation(2)
    x = some(5_000)
    quantizer.use_bits(4)
    quantizer.initialize(x)
    assert not bool(quantizer.without_zero)
    quantizer.use_bits(2)
    quantizer.initialize(x)
    assert bool(quantizer.without_zero)
    quantizer.use_bits(4)
    quantizer.initialize(x)
    assert not bool(quantizer.without_zero)
