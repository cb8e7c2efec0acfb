"""The mixture for scalars, and coding lengths of many blocks at once."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mecq_cli.entropy import MoeState, block_coding_lengths, coding_length, value_coding_length
from mecq_cli.entropy.cost import Costs
from mecq_cli.errors import UsageError
from mecq_cli.workflow.bench_entropy import make


def one_gaussian(values: torch.Tensor, distortion: float) -> float:
    return 0.5 * math.log1p(float(values.double().var(unbiased=False)) / distortion)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 2**31),
    st.sampled_from(["normal", "student", "laplace", "two", "constant"]),
    st.floats(1e-4, 10.0),
    st.floats(1e-3, 1e3),
)
def test_never_more_than_one_gaussian_and_scale_free(
    seed: int, kind: str, distortion: float, scale: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(500, generator=generator, dtype=torch.float64)
    if kind == "student":
        values = values / torch.randn(500, generator=generator).double().abs().clamp(min=1e-2)
    elif kind == "laplace":
        values = values * torch.rand(500, generator=generator).double().clamp(min=1e-9).log().abs()
    elif kind == "two":
        values = values * 0.01 + torch.arange(500).double().remainder(2.0)
    elif kind == "constant":
        values = torch.full_like(values, 3.0)
    found = float(value_coding_length(values, distortion=distortion))
    assert 0.0 <= found <= one_gaussian(values, distortion) * (1 + 1e-9)
    single = float(value_coding_length(values, distortion=distortion, components=1))
    assert single == pytest.approx(one_gaussian(values, distortion))
    scaled = value_coding_length(values * scale, distortion=distortion * scale**2)
    assert float(scaled) == pytest.approx(found, rel=1e-6, abs=1e-9)


def test_a_long_tail_is_cheaper_with_a_mixture_and_a_gaussian_is_not() -> None:
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(20000, generator=generator)
    tail = torch.where(torch.arange(20000) % 50 == 0, 30.0 * normal, normal)
    assert float(value_coding_length(tail, distortion=0.01)) < one_gaussian(tail, 0.01) - 0.7
    assert float(value_coding_length(normal, distortion=0.01)) == pytest.approx(
        one_gaussian(normal, 0.01), rel=1e-5
    )


def test_the_gradient_of_the_values_is_that_of_the_code() -> None:
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(60, generator=generator, dtype=torch.float64)
    values[::10] += 40.0  # no value changes sides for a small step
    values.requires_grad_()
    plain = values.detach()
    assert float(value_coding_length(plain, distortion=0.05)) < one_gaussian(plain, 0.05)
    assert torch.autograd.gradcheck(lambda v: value_coding_length(v, distortion=0.05), (values,))


def test_blocks_equal_the_single_coding_lengths_and_their_gradients(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Rates with which a polynomial is cheaper than a factorisation at any size.
    costs = Costs(product=1e15, thin=1e15, factor=1e5, call=0.0)
    monkeypatch.setattr("mecq_cli.entropy.blocks.costs_on", lambda device: costs)
    shapes = [(64, 32), (128, 16), (64, 32), (16, 300), (420, 400)]
    families = ["relu", "isotropic", "classes-10", "rank-one", "relu-pooled"]
    blocks = [
        make(f, *s, seed=i).requires_grad_()
        for i, (f, s) in enumerate(zip(families, shapes, strict=True))
    ]
    blocks[1] = (blocks[1].detach() * 0.01).requires_grad_()  # a spectrum for a polynomial
    states = [MoeState() for _ in blocks]
    weights = torch.arange(1.0, 6.0)
    lengths = block_coding_lengths(blocks, distortion=0.06, states=states)
    (lengths * weights).sum().backward()
    for block, length, weight in zip(blocks, lengths, weights, strict=True):
        single = block.detach().double().requires_grad_()
        value = coding_length(single, distortion=0.06, estimator="exact")
        (value * weight).backward()
        assert block.grad is not None
        assert single.grad is not None
        assert length.item() == pytest.approx(value.item(), rel=1e-3)
        error = (block.grad - single.grad).norm() / single.grad.norm()
        assert float(error) < 0.04
    assert [state.calls for state in states] == [1] * 5
    assert not states[1].counts["exact"]
    assert states[3].counts["exact"] == 1


def test_blocks_and_values_that_make_no_sense() -> None:
    for blocks in ([], [torch.zeros(3)]):
        with pytest.raises(UsageError):
            block_coding_lengths(blocks)
    with pytest.raises(UsageError):
        block_coding_lengths([torch.zeros(2, 2)], states=[])
    for values, distortion, components in (
        (torch.zeros(0), 1.0, 4),
        (torch.zeros(3), 0.0, 4),
        (torch.zeros(3), 1.0, 0),
    ):
        with pytest.raises(UsageError):
            value_coding_length(values, distortion=distortion, components=components)
