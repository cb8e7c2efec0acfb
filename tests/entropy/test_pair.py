"""Two views' coding lengths out of one Gram matrix, against the exact estimator on each."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mecq_cli.entropy import EntropyRegularizer, EntropySettings, exact_coding_length, normalise
from mecq_cli.entropy.pair import WIDEST_SIDE, pair_lengths


def side_by_side(first: Tensor, second: Tensor) -> Tensor:
    both: Tensor = torch.cat((first, second), 1) * 0.5**0.5
    return both


def views(samples: int, features: int, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(2, samples, rank, generator=generator)
    first, second = left @ torch.randn(rank, features, generator=generator)
    return normalise(first.relu()), normalise(second)


@given(
    samples=st.integers(1, 150),
    features=st.integers(1, 200),
    rank=st.integers(1, 40),
    distortion=st.sampled_from([0.01, 0.06, 0.5, 1.0]),
    seed=st.integers(0, 1000),
)
def test_values_and_gradient_are_the_exact_ones(
    samples: int, features: int, rank: int, distortion: float, seed: int
) -> None:
    first, second = views(samples, features, rank, seed)
    found = pair_lengths(first.requires_grad_(), second, distortion)
    assert found is not None
    exact = first.detach().double().requires_grad_()
    wanted = [
        exact_coding_length(z, distortion)
        for z in (side_by_side(exact, second.double()), exact, second.double())
    ]
    for value, goal in zip(found, wanted, strict=True):
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(goal.item(), rel=1e-3, abs=1e-4)
    (got,) = torch.autograd.grad(found.joint - 0.3 * found.first, first)
    (true,) = torch.autograd.grad(wanted[0] - 0.3 * wanted[1], exact)
    size = float(true.norm())
    assert float((got.double() - true).norm()) <= 0.02 * size + 1e-5


@pytest.mark.parametrize("shape", [(5, 3), (5, 8), (4, 4)])
def test_the_gradient_is_that_of_the_values(shape: tuple[int, int]) -> None:
    first, second = (t.double() for t in views(*shape, rank=4, seed=0))

    def both(z: Tensor) -> tuple[Tensor, Tensor]:
        found = pair_lengths(z, second, 0.06)
        assert found is not None
        return found.joint, found.first

    assert torch.autograd.gradcheck(both, (first.requires_grad_(),))


def test_rows_of_zeros_and_equal_rows() -> None:
    zero = torch.zeros(6, 4)
    same = normalise(torch.ones(6, 4))
    found = pair_lengths(same, same.clone(), 0.06)
    assert found is not None
    assert float(found.joint) == pytest.approx(float(found.first), rel=1e-5)
    assert pair_lengths(zero, zero, 0.06) is None  # nothing to code: the estimators know that


def test_what_float32_cannot_hold_is_left_to_the_estimators() -> None:
    first, second = views(20, 10, 3, 0)
    assert pair_lengths(first, second, 1e-9) is None
    assert pair_lengths(first * torch.nan, second, 0.06) is None
    side = WIDEST_SIDE + 1
    assert pair_lengths(torch.randn(side, side), torch.randn(side, side), 0.06) is None


@pytest.mark.parametrize("shape", [(24, 10), (24, 30), (240, 230)])
def test_the_divergence_does_not_depend_on_the_way(shape: tuple[int, int]) -> None:
    first, second = views(*shape, rank=6, seed=1)
    losses, gradients = [], []
    for experts in ((), ("exact",)):  # with experts named, an estimator answers for each length
        settings = EntropySettings(term="divergence", experts=experts, warmup=0.0)
        z = first.clone().requires_grad_()
        loss = EntropyRegularizer(settings)({"a": z}, {"a": second}).loss
        losses.append(loss.item())
        gradients.append(torch.autograd.grad(loss, z)[0])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    one, other = (gradient.flatten() for gradient in gradients)
    cosine = torch.nn.functional.cosine_similarity(one, other, dim=0)
    assert cosine > 0.999
