"""The backward passes written by hand, against autograd and the usual ones."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from mecq_cli import loops
from mecq_cli.calibration import calibrate
from mecq_cli.insertion import BitPlan, insert
from mecq_cli.normalization import batch_norm, rounded_batch_norm
from mecq_cli.quantizers import LsqActivation, round_backward, soft_backward
from mecq_cli.quantizers.mid_rise import MidRiseActivation
from mecq_cli.quantizers.rounding import SHIFT, mid_rise_backward
from mecq_cli.quantizers.soft_ends import SoftEndsActivation

pytestmark = pytest.mark.skipif(not loops.is_available(), reason="no C++ compiler here")

SHAPES = [(4, 16, 9, 7), (3, 48, 6, 5), (5, 21, 3, 3), (300, 37), (9, 70, 1, 1)]


def made(shape: tuple[int, ...], *, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator).bfloat16()
    last = len(shape) == 4
    return values.contiguous(memory_format=torch.channels_last) if last else values


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("bounds", [(-math.inf, math.inf), (0.0, 1.25)])
@pytest.mark.parametrize(
    ("kind", "bits"),
    [
        (LsqActivation, 2),
        (LsqActivation, 8),
        (SoftEndsActivation, 1),
        (SoftEndsActivation, 2),
        (MidRiseActivation, 1),
        (MidRiseActivation, 2),
    ],
)
@pytest.mark.parametrize("shape", SHAPES)
def test_norm_and_rounding_have_the_gradients_of_the_two(
    shape: tuple[int, ...],
    kind: type[LsqActivation],
    bits: int,
    bounds: tuple[float, float],
    threads: int,
) -> None:
    torch.manual_seed(0)
    norm = (nn.BatchNorm2d if len(shape) == 4 else nn.BatchNorm1d)(shape[1])
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    quantizer = kind(bits)
    with torch.no_grad():
        quantizer.begin(2.0 / quantizer.qmax)
    if isinstance(quantizer, MidRiseActivation):
        quantizer.initialize(torch.linspace(-1, 2**bits - 1, 1000))
        assert bool(quantizer.without_zero)
    y, upstream = made(shape) * 3 + 1, made(shape, seed=1)
    parameters = [*norm.parameters(), *quantizer.parameters()]

    def gradients(x: Tensor, out: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(out, [x, *parameters], upstream.to(out.dtype)))

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x = y.clone().requires_grad_()
        rounding = quantizer.rounding(x)
        assert rounding is not None
        assert rounding.soft is (kind is not LsqActivation)
        out = rounded_batch_norm(norm, x, rounding, bounds)
        found = gradients(x, out)
    finally:
        torch.set_num_threads(before)
    x = y.clone().requires_grad_()
    expected = quantizer(torch.clamp(batch_norm(norm, x), *bounds))
    assert torch.equal(out, expected.bfloat16())
    for mine, theirs in zip(found, gradients(x, expected), strict=True):
        assert mine.dtype == theirs.dtype
        error = (mine.float() - theirs.float()).norm() / theirs.float().norm().clamp_min(1e-6)
        assert error < 4e-3, error  # a bfloat16 has eight bits


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("ends", [(0, 1), (0, 3), (-100, 155)])
@pytest.mark.parametrize("shape", [*SHAPES, (2, 5, 33)])
def test_rounding_has_its_gradients(
    shape: tuple[int, ...], ends: tuple[int, int], soft: bool
) -> None:
    x, upstream, step = made(shape), made(shape, seed=1), torch.tensor(0.02 if ends[0] else 0.5)
    of_x, of_step = loops.round_backward(upstream, x, step, *map(float, ends), soft)
    eager = soft_backward if soft else round_backward
    expected, of_scale = eager(upstream, x, step, *ends, mid_rise=False)
    assert torch.equal(of_x, expected)
    torch.testing.assert_close(of_step, of_scale, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("ends", [(-1, 1), (-1, 5), (-3, 3)])
@pytest.mark.parametrize("shape", [*SHAPES, (2, 5, 33)])
def test_rounding_to_a_grid_without_zero_has_its_gradients(
    shape: tuple[int, ...], ends: tuple[int, int]
) -> None:
    x, upstream, step = made(shape), made(shape, seed=1), torch.tensor(0.4)
    grid = (*map(float, ends), True, True, SHIFT)
    of_x, of_step = loops.round_backward(upstream, x, step, *grid)
    expected, of_scale = mid_rise_backward(upstream, x, step, *ends, mid_rise=True)
    torch.testing.assert_close(of_x, expected)
    torch.testing.assert_close(of_step, of_scale, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("mid_rise", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(16, 8, 3, 3), (5, 7, 1, 1), (6, 37), (3, 5000)])
def test_weights_have_their_gradients(
    shape: tuple[int, ...], dtype: torch.dtype, mid_rise: bool
) -> None:
    torch.manual_seed(0)
    weight, upstream = torch.randn(shape), torch.randn(shape, dtype=dtype)
    if len(shape) == 4:
        weight = weight.contiguous(memory_format=torch.channels_last)
    low, high = (-3, 3) if mid_rise else (-2, 1)
    steps = torch.rand(len(weight)) + 0.2
    column = steps.view(-1, *[1] * (len(shape) - 1))
    of_weight, of_steps = loops.weight_backward(
        upstream, weight, steps, float(low), float(high), mid_rise
    )
    expected, of_scale = round_backward(upstream, weight, column, low, high, mid_rise)
    assert torch.equal(of_weight, expected)
    torch.testing.assert_close(of_steps, of_scale.flatten(), rtol=1e-4, atol=1e-3)


@given(
    images=st.integers(1, 20),
    channels=st.sampled_from([1, 7, 16, 37, 64]),
    size=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    kernel=st.tuples(st.integers(1, 11), st.sampled_from([1, 2, 3, 5, 7, 8, 9, 17])),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 9), st.integers(0, 9)),
    dilation=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    threads=st.integers(1, 3),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=300, deadline=None)
def test_depthwise_convolutions_have_their_gradients(
    images: int, channels: int, size: tuple[int, int], kernel: tuple[int, int],
    stride: tuple[int, int], padding: tuple[int, int], dilation: tuple[int, int], threads: int,
    seed: int,
) -> None:  # fmt: skip
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    assume(all(s + 2 * p >= r for s, p, r in zip(size, padding, reach, strict=True)))
    x = made((images, channels, *size), seed=seed).requires_grad_()
    weight = made((channels, 1, *kernel), seed=seed + 1).float().requires_grad_()
    bias = made((channels, 1), seed=seed + 3).flatten().float().requires_grad_()
    a, b, c = (t.detach().double().requires_grad_() for t in (x, weight, bias))
    expected = F.conv2d(a, b, c, stride, padding, dilation, channels)
    upstream = made(tuple(expected.shape), seed=seed + 2)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        out = loops.depthwise_conv2d(x, weight, bias, stride, padding, dilation)
        found = torch.autograd.grad(out, (x, weight, bias), upstream)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(out.double(), expected, rtol=1e-2, atol=1e-2)
    of_x, of_weight, of_bias = torch.autograd.grad(expected, (a, b, c), upstream.double())
    torch.testing.assert_close(found[0], of_x.bfloat16(), rtol=1e-2, atol=1e-4)
    torch.testing.assert_close(found[1], of_weight.float(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[2], of_bias.float(), rtol=1e-4, atol=1e-4)


def test_a_gradient_in_another_order_is_put_into_that_of_the_map() -> None:
    x, step = made((2, 16, 4, 4)), torch.tensor(0.5)
    upstream = made((2, 16, 4, 4), seed=1)
    other = upstream.contiguous()
    found = loops.round_backward(other, x, step, 0.0, 3.0, False)[0]
    assert torch.equal(found, loops.round_backward(upstream, x, step, 0.0, 3.0, False)[0])


@pytest.mark.parametrize("grid", [(-9.0, 9.0, False, False, 0.0), (-3.0, 3.0, True, True, SHIFT)])
def test_what_is_not_finite_is_not_lost(grid: tuple[float, float, bool, bool, float]) -> None:
    x, upstream = made((2, 16, 4, 4)), made((2, 16, 4, 4), seed=1)
    upstream[1, 3, 2, 2] = math.nan
    _, of_step = loops.round_backward(upstream, x, torch.tensor(0.5), *grid)
    assert of_step.isnan()
    ones, zeros = torch.ones(16), torch.zeros(16)
    given = (x, ones, zeros, zeros, ones, torch.tensor(0.5), -math.inf, math.inf, *grid)
    of_y, of_weight, of_bias, of_step = loops.norm_round_backward(upstream, *given)
    assert of_step.isnan()
    assert of_bias.isnan().nonzero().flatten().tolist() == [3]
    assert of_weight.isnan().nonzero().flatten().tolist() == [3]
    assert of_y[:, 3].isnan().all()


class Small(nn.Module):
    """A residual block between activations that clip at one end and at both, and a bottleneck.

    Behind them one that works on each channel for itself.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU6())
        self.block = nn.Sequential(
            nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 16, 1, bias=False), nn.BatchNorm2d(16),
        )  # fmt: skip
        self.bottleneck = nn.Sequential(
            nn.Conv2d(16, 16, 1, bias=False), nn.BatchNorm2d(16),
            nn.Conv2d(16, 16, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        )  # fmt: skip
        self.depthwise = nn.Sequential(
            nn.Conv2d(16, 16, 5, 2, 2, groups=16), nn.BatchNorm2d(16), nn.ReLU()
        )
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.depthwise(self.bottleneck(torch.relu(self.block(x) + x)))
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


@pytest.mark.parametrize("bits", [2, 4])
def test_a_compiled_network_has_the_same_gradients_with_them(bits: int) -> None:
    """With ends that are soft and with others."""
    images = torch.randn(16, 3, 12, 12, generator=torch.Generator().manual_seed(0))

    def gradients(*, by_hand: bool) -> dict[str, Tensor]:
        torch.manual_seed(0)
        torch._dynamo.reset()
        model = insert(Small().eval(), (3, 12, 12), BitPlan(4, bits, quantizer="auto"))
        calibrate(model, [images], 1)
        kinds = [m for m in model.modules() if isinstance(m, MidRiseActivation)]
        assert any(bool(m.without_zero) for m in kinds) is (bits == 2)
        model.to(memory_format=torch.channels_last).train()
        if by_hand:
            model.use_loops()
        compiled = torch.compile(model.graph, backend="aot_eager")
        with torch.autocast("cpu", torch.bfloat16):
            logits = compiled(images)[0]
        with profile(activities=[ProfilerActivity.CPU]) as trace:
            nn.functional.cross_entropy(logits.float(), torch.arange(16) % 5).backward()
        called = Counter(event.name for event in trace.events())
        # The biased depthwise convolution's map stays bfloat16, as the passes want it.
        assert called["mecq::norm_round_backward"] == (6 if by_hand else 0)
        assert called["mecq::depthwise_backward"] == by_hand
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    expected = gradients(by_hand=False)
    for name, found in gradients(by_hand=True).items():
        if "depthwise" in name and name.endswith("bias") and "norm" not in name:
            continue  # the batch norm behind takes it away again: nothing but rounding
        error = (found - expected[name]).norm() / expected[name].norm().clamp_min(1e-6)
        assert error < 2e-2, (name, error)
