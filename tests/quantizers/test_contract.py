"""What every quantizer of the registry promises, whatever its algorithm."""

from __future__ import annotations

import pytest
import torch

from mecq_cli.errors import UsageError
from mecq_cli.quantizers import QUANTIZERS, quantizers_named
from mecq_cli.quantizers.binary import BinaryWeight

CASES = [(name, bits) for name in QUANTIZERS for bits in (1, 2, 3, 4, 6, 8)]


def some(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("name", "bits"), CASES)
def test_weights_are_integers_times_steps_and_use_their_bits(name: str, bits: int) -> None:
    sizes = torch.tensor([0.5, 0.8, 1.0, 1.2, 0.0, 0.7])
    weight = some((6, 5, 3, 3)) * sizes.view(-1, 1, 1, 1)
    quantizer = QUANTIZERS[name].weight(bits, 6)
    quantizer.initialize(weight)
    values = quantizer(weight).detach()
    integers, steps = quantizer.integers(weight)
    assert (integers.dtype, steps.dtype) == (torch.int8, torch.float32)
    assert torch.equal(values, integers.float() * steps.view(-1, 1, 1, 1))
    torch.testing.assert_close(quantizer.steps(weight).detach(), steps)
    whole = integers.int()
    codes = (whole + 2**bits - 1) / 2 if quantizer.mid_rise else whole + 2 ** (bits - 1)
    assert torch.equal(codes, codes.round())
    assert int(codes.min()) >= 0
    assert int(codes.max()) < 2**bits
    assert len(integers[2].unique()) > 2 ** (bits - 1) or bits > 4
    error = (values - weight).square().mean() / weight.square().mean()
    assert float(error) < 0.6


@pytest.mark.parametrize(("name", "bits"), CASES)
def test_learning_moves_weights_that_are_inside(name: str, bits: int) -> None:
    weight = some((4, 9)).requires_grad_()
    quantizer = QUANTIZERS[name].weight(bits, 4)
    quantizer.initialize(weight)
    quantizer(weight).backward(torch.ones(4, 9))
    assert weight.grad is not None
    reached = float((weight.grad > 0).float().mean())
    assert reached > (0.45 if bits == 1 else 0.7)


@pytest.mark.parametrize(("name", "bits"), CASES)
def test_activations_lie_on_the_grid_they_name(name: str, bits: int) -> None:
    for nonnegative in (True, False):
        values = some((2, 3, 8, 8)).relu() if nonnegative else some((2, 3, 8, 8))
        quantizer = QUANTIZERS[name].for_values(bits, power_of_two=False, nonnegative=nonnegative)
        quantizer.initialize(values.flatten())
        rounded, grid = quantizer(values).detach(), quantizer.grid()
        codes = rounded / grid.scale + grid.zero_point
        torch.testing.assert_close(codes, codes.round(), atol=1e-4, rtol=0)
        assert round(float(codes.min())) >= grid.qmin
        assert round(float(codes.max())) <= grid.qmax
        assert grid.bits == bits
        assert nonnegative is False or grid.zero_point == 0


def test_the_gradient_of_binary_weights_reaches_all_of_them() -> None:
    weight = torch.tensor([[3.0, -0.1, 0.2, -5.0]], requires_grad=True)
    quantizer = BinaryWeight(1, 1)
    quantizer.initialize(weight)
    upstream = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    out = quantizer(weight)
    mean = weight.detach().abs().mean()
    torch.testing.assert_close(out.detach(), torch.tensor([[1.0, -1.0, 1.0, -1.0]]) * mean)
    out.backward(upstream)
    assert weight.grad is not None
    assert quantizer.scale.grad is not None
    assert torch.equal(weight.grad, upstream)
    # By the sign alone, scaled as LSQ's: 1 - 2 + 3 - 4, times 1 / sqrt(4).
    assert float(quantizer.scale.grad) == pytest.approx(-1.0)


def test_an_unknown_name_is_answered_with_a_near_one() -> None:
    with pytest.raises(UsageError, match=r"--quantizer: got 'lsqq'; did you mean 'lsq'"):
        quantizers_named("lsqq")
