"""The two ways of rounding compute the same: on tensors as they are, and on dense vectors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mecq_cli.quantizers import Kernels, round_backward, round_forward
from mecq_cli.quantizers.binary import PASSING, BinaryWeight
from mecq_cli.quantizers.rounding import PLAIN, QUICK, QUICK_SOFT, SOFT, fake_quantize, quicker
from mecq_cli.quantizers.soft_ends import SoftEndsActivation

DENSE = Kernels(round_forward, round_backward, dense=True)


def results(
    x: Tensor, scale: Tensor, binary: bool, kernels: Kernels, upstream: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    x, scale = x.clone().requires_grad_(), scale.clone().requires_grad_()
    low, high = (-1, 1) if binary else (-2, 1)
    out = fake_quantize(x, scale, low, high, 0.25, binary, kernels)
    out.backward(upstream)
    assert x.grad is not None
    assert scale.grad is not None
    return out.detach(), x.grad, scale.grad


@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("layout", ["rows", "contiguous", "channels_last", "mixed"])
@pytest.mark.parametrize("per_channel", [False, True])
def test_dense_kernels_agree_with_plain_ones(layout: str, per_channel: bool, binary: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    shape = (6, 5) if layout == "rows" else (6, 5, 3, 2)
    x, upstream = (torch.randn(shape, generator=generator) for _ in range(2))
    if layout in ("channels_last", "mixed"):
        x = x.to(memory_format=torch.channels_last)
    if layout == "channels_last":
        upstream = upstream.to(memory_format=torch.channels_last)
    scale = torch.full((6, *[1] * (x.dim() - 1)) if per_channel else (), 0.4)
    plain = results(x, scale, binary, PLAIN, upstream)
    dense = results(x, scale, binary, DENSE, upstream)
    assert torch.equal(plain[0], dense[0])
    assert torch.equal(plain[1], dense[1])
    torch.testing.assert_close(plain[2], dense[2])


def test_gradient_of_the_step_is_that_of_lsq() -> None:
    """Equation 3 of arXiv 1902.08153, element by element."""
    x = torch.tensor([-3.0, -0.9, 0.1, 0.7, 5.0])
    scale = torch.tensor(0.5, requires_grad=True)
    fake_quantize(x, scale, -2, 1, 1.0).sum().backward()
    v = x / 0.5
    inside = (v >= -2) & (v <= 1)
    expected = torch.where(inside, v.round() - v, v.clamp(-2, 1))
    assert scale.grad is not None
    torch.testing.assert_close(scale.grad, expected.sum())


@pytest.mark.parametrize(("bits", "low"), [(1, 0), (2, 0), (2, -1)])
def test_gradients_that_end_softly_are_as_large_as_the_jumps_are_high(bits: int, low: int) -> None:
    high, step = low + 2**bits - 1, torch.tensor(0.3, requires_grad=True)
    v = torch.linspace(low - 2, high + 2, 4001)
    x = (v * 0.3).requires_grad_()
    of_x, of_step = torch.autograd.grad(
        fake_quantize(x, step, low, high, 1.0, kernels=SOFT).sum(), [x, step]
    )
    # One triangle for each threshold, from a step before it to a step behind it.
    thresholds = torch.arange(low, high) + 0.5
    triangles = (1 - (v[:, None] - thresholds).abs()).clamp_min(0).sum(1)
    torch.testing.assert_close(of_x, triangles, atol=1e-3, rtol=0)
    assert float(torch.trapezoid(of_x, v)) == pytest.approx(high - low, rel=1e-3)
    integers = torch.round(v.clamp(low, high))
    assert float(of_step) == pytest.approx(float((integers - triangles * v).sum()), rel=1e-3)
    for kernels in (PLAIN, SOFT):
        values = fake_quantize(x, step, low, high, 1.0, kernels=kernels)
        torch.testing.assert_close(values, integers * 0.3)


def test_a_quantizer_stays_quick_when_its_bits_are_lowered() -> None:
    weight, activation = BinaryWeight(1, 4), SoftEndsActivation(1)
    for quantizer in (weight, activation):
        quantizer.use_bits(4)
        quantizer.quicken(quicker)
    assert weight.kernels is activation.kernels is QUICK
    for quantizer in (weight, activation):
        quantizer.use_bits(2)
    assert weight.kernels is QUICK
    assert activation.kernels is QUICK_SOFT
    weight.use_bits(1)
    assert weight.kernels is PASSING  # there is no quicker one
