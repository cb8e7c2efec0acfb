"""Learned thresholds: their gradients, their first places, and what the integers make of them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mecq_cli.integer.ir import INPUT, Grid, Node
from mecq_cli.kernels import run_node
from mecq_cli.quantizers import LsqActivation
from mecq_cli.quantizers.n2uq import PLAIN, N2uqActivation

BITS = [1, 2, 3, 4]


def uneven(bits: int, seed: int = 0) -> N2uqActivation:
    """Widths as far apart as they may be."""
    generator = torch.Generator().manual_seed(seed)
    quantizer = N2uqActivation(bits)
    with torch.no_grad():
        quantizer.scale.fill_(0.3)
        quantizer.widths.copy_(torch.exp(2 * torch.randn(quantizer.qmax, generator=generator)))
        quantizer.project()
    return quantizer


def some_values(quantizer: N2uqActivation) -> Tensor:
    """[4, 3, 6, 6], from below zero to beyond the last interval."""
    generator = torch.Generator().manual_seed(1)
    reach = float(quantizer.widths.detach().sum())
    return (torch.rand(4, 3, 6, 6, generator=generator) * 1.5 - 0.25) * reach


def gradients(
    quantizer: N2uqActivation | LsqActivation, x: Tensor, upstream: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """To x and to each parameter."""
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    quantizer.zero_grad()
    quantizer(x).backward(upstream)
    assert x.grad is not None
    found = [p.grad for p in quantizer.parameters()]
    return x.grad, [g for g in found if g is not None]


@pytest.mark.parametrize("bits", BITS)
def test_gradients_are_those_of_the_straight_line_of_each_interval(bits: int) -> None:
    """By autograd in float64: a sum of ramps, one for each interval, in place of the codes."""
    quantizer = uneven(bits)
    x = some_values(quantizer)
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    grad_x, (grad_scale, grad_widths) = gradients(quantizer, x, upstream)

    scale = quantizer.scale.detach().double().requires_grad_()
    widths = quantizer.widths.detach().double().requires_grad_()
    real = x.double().requires_grad_()
    edges = torch.cat([widths.new_zeros(1), widths.cumsum(0)])
    ramps = ((real[..., None] - edges[:-1]) / widths).clamp(0, 1)
    line = ramps.sum(-1)
    codes = torch.round(quantizer(x).detach().double() / scale.detach())
    ((codes + line - line.detach()) * scale).backward(upstream.double())
    factor = 1 / (math.sqrt(x[0].numel()) * quantizer.qmax)
    assert real.grad is not None
    assert scale.grad is not None
    assert widths.grad is not None
    torch.testing.assert_close(grad_x, real.grad.float())
    torch.testing.assert_close(grad_scale, (scale.grad * factor).float())
    torch.testing.assert_close(grad_widths, (widths.grad * factor).float(), rtol=1e-4, atol=1e-5)
    assert int(codes.max()) == quantizer.qmax
    assert int(codes.min()) == 0


@pytest.mark.parametrize("bits", BITS)
def test_equal_widths_are_lsq(bits: int) -> None:
    x = some_values(N2uqActivation(bits)) * 0.3
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    ours, lsq = N2uqActivation(bits), LsqActivation(bits)
    for quantizer in (ours, lsq):
        quantizer.initialize(x.clamp_min(0).flatten())
    assert torch.equal(ours.scale, lsq.scale)
    assert torch.equal(ours.widths, lsq.scale.expand_as(ours.widths))
    assert torch.equal(ours(x), lsq(x))
    (grad_x, (scale, widths)), (lsq_x, (lsq_scale,)) = (
        gradients(quantizer, x, upstream) for quantizer in (ours, lsq)
    )
    torch.testing.assert_close(grad_x, lsq_x)
    torch.testing.assert_close(scale + widths.sum(), lsq_scale, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("layout", ["rows", "contiguous", "channels_last", "mixed"])
def test_dense_kernels_agree_with_plain_ones(layout: str) -> None:
    plain, dense = uneven(3), uneven(3)
    dense.kernels = PLAIN._replace(dense=True)
    x = some_values(plain)
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    if layout == "rows":
        x, upstream = x.flatten(1), upstream.flatten(1)
    if layout in ("channels_last", "mixed"):
        x = x.to(memory_format=torch.channels_last)
    if layout == "channels_last":
        upstream = upstream.to(memory_format=torch.channels_last)
    assert torch.equal(plain(x), dense(x))
    (first_x, first), (second_x, second) = (gradients(q, x, upstream) for q in (plain, dense))
    assert torch.equal(first_x, second_x)
    torch.testing.assert_close(first, second)


def integers(quantizer: N2uqActivation, values: Tensor, grid: Grid, source: Grid | None) -> Tensor:
    """The codes that the integer network gives integers of ``grid``."""
    attributes = {"thresholds": quantizer.thresholds(source)}
    node = Node("t", "threshold", (INPUT,), quantizer.grid(), attributes)
    return run_node(node, [values], [grid])


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("seed", range(5))
def test_integers_have_the_codes_of_training(bits: int, seed: int) -> None:
    """Every value of the fine grid, and of the grid of another quantizer."""
    quantizer = uneven(bits, seed)
    fine = quantizer.threshold_grid()
    assert fine is not None
    for grid in (fine, Grid(0.0625, 7, 8, 0, 255), Grid(1.5, 2, 4, 0, 15)):
        values = torch.arange(grid.qmax + 1.0)
        codes = integers(quantizer, values, grid, None if grid is fine else grid)
        real = (values - grid.zero_point) * grid.scale
        torch.testing.assert_close(codes * quantizer.scale.detach(), quantizer(real).detach())
    thresholds = quantizer.thresholds(None)
    assert len({*thresholds}) == quantizer.qmax  # no two in one place
    assert 1 <= thresholds[0] <= thresholds[-1] <= 255


def test_widths_stay_positive_and_near_each_other() -> None:
    quantizer = N2uqActivation(2)
    with torch.no_grad():
        quantizer.widths.copy_(torch.tensor([-3.0, 1.6, 0.4]))
    quantizer.project()
    torch.testing.assert_close(quantizer.widths.detach(), torch.tensor([0.1, 1.6, 0.4]))
    with torch.no_grad():
        quantizer.widths.fill_(-1.0)
    quantizer.project()
    assert bool((quantizer.widths > 0).all())


def test_only_few_bits_have_thresholds() -> None:
    with pytest.raises(ValueError, match="1 to 4 bits, not 5"):
        N2uqActivation(5)
