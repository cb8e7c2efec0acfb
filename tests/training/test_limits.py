"""Steps of quantizers survive updates that are larger than they are."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mecq_cli.quantizers import LsqActivation, LsqWeight
from mecq_cli.quantizers.n2uq import N2uqActivation
from mecq_cli.training.limits import FACTOR, StepLimit


def _made() -> tuple[nn.ModuleList, LsqActivation, LsqWeight]:
    activation, weight = LsqActivation(8), LsqWeight(4, 3)
    with torch.no_grad():
        activation.scale.fill_(1e-6)
        weight.scale.copy_(torch.tensor([1e-3, 1.0, 2.0]))
    return nn.ModuleList([activation, weight]), activation, weight


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_a_step_halves_or_doubles_at_most(kind: str) -> None:
    model, activation, weight = _made()
    parameters = [*model.parameters()]
    optimizer: torch.optim.Optimizer
    if kind == "sgd":
        optimizer = torch.optim.SGD(parameters, 0.1, momentum=0.9, nesterov=True)
    else:
        optimizer = torch.optim.AdamW(parameters, 0.1, weight_decay=0.0)
    activation.scale.grad = torch.tensor(3.0)
    weight.scale.grad = torch.tensor([-5.0, 0.2, 0.0])
    with StepLimit(model, optimizer):
        optimizer.step()
    assert activation.scale.item() == pytest.approx(1e-6 / FACTOR)
    first, second, third = weight.scale.tolist()
    assert first == pytest.approx(1e-3 * FACTOR)
    assert second == pytest.approx(1 - 0.1 * 0.2 * 1.9 if kind == "sgd" else 0.9, abs=2e-3)
    assert third == pytest.approx(2.0, abs=3e-3)
    # One large gradient is no reason to go on for a score of updates.
    activation.scale.grad, weight.scale.grad = torch.tensor(0.0), torch.zeros(3)
    for _ in range(3):
        with StepLimit(model, optimizer):
            optimizer.step()
    assert activation.scale.item() == pytest.approx(1e-6 / FACTOR, rel=0.01)
    assert weight.scale[0].item() == pytest.approx(1e-3 * FACTOR, rel=0.01)


def test_steps_that_are_not_learned_are_nobody_s() -> None:
    """With ``scale_lr = 0`` they are in no group of the optimizer, which has no state of them."""
    model, _, _ = _made()
    other = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([other], 0.1, momentum=0.9)
    other.grad = torch.ones(2)
    with StepLimit(model, optimizer):
        optimizer.step()
    assert [*optimizer.state_dict()["state"]] == [0]


def test_learned_widths_are_held_too() -> None:
    quantizer = N2uqActivation(2)
    quantizer.initialize(torch.full((100,), 1e-3))
    before = quantizer.widths.detach().clone()
    optimizer = torch.optim.SGD(quantizer.parameters(), 0.02)
    for parameter in quantizer.parameters():
        parameter.grad = torch.ones_like(parameter)
    with StepLimit(quantizer, optimizer):
        optimizer.step()
    quantizer.project()
    torch.testing.assert_close(quantizer.widths.detach(), before / FACTOR)
