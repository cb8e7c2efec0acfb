"""The weight of the regularizer by the gradients that a network has."""

from __future__ import annotations

import math
import os
import signal
from pathlib import Path

import pytest
import torch

from mecq_cli.errors import Interrupted
from mecq_cli.training.balance import BATCHES, balanced_weight
from mecq_cli.training.loop import Trainer
from tests.training.test_loop import Recorder, batches, state_of, trainer

LARGE = 1e6
"""A weight that is more than any share asks for."""


def some() -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [pair for epoch in range(BATCHES) for pair in batches(epoch, 0)][:BATCHES]


def ratio(one: Trainer, weight: float) -> float:
    """Of the gradient of the term to that of the task, by autograd, on the same batches."""
    logs = []
    parameters = [p for p in one.model.parameters() if p.requires_grad]
    for images, labels in some():
        _, task, term, _ = one.step.losses(images, labels, one.recipe.total_steps)
        norms = []
        for loss in (task, weight * term):
            found = torch.autograd.grad(
                loss, parameters, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            norms.append(math.sqrt(sum(float(gradient.square().sum()) for gradient in found)))
        logs.append(math.log(norms[1] / norms[0]))
    return math.exp(sum(logs) / len(logs))


@pytest.mark.parametrize("share", [0.5, 20.0])
def test_the_gradient_has_the_share_that_was_asked_for(tmp_path: Path, share: float) -> None:
    one = trainer(tmp_path, mec_weight=LARGE)
    one.model.train()
    weight = balanced_weight(one.step, some(), share)
    assert ratio(one, weight) == pytest.approx(share, rel=0.06)  # two digits


def test_looking_changes_nothing(tmp_path: Path) -> None:
    one, other = (
        trainer(tmp_path / "a", mec_weight=LARGE),
        trainer(tmp_path / "b", mec_weight=LARGE),
    )
    one.model.eval()
    before, drawn = state_of(one), torch.get_rng_state()
    balanced_weight(one.step, some(), 1.0)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert all(torch.equal(value, before[name]) for name, value in state_of(one).items())
    assert not one.model.training
    one.model.train()
    other.model.train()
    for number, (images, labels) in enumerate(some()):
        assert one.step(images, labels, number) == other.step(images, labels, number)


def test_it_is_never_more_than_the_default(tmp_path: Path) -> None:
    one = trainer(tmp_path, mec_weight=0.01)
    assert balanced_weight(one.step, some(), 100.0) == 0.01
    assert balanced_weight(one.step, [], 100.0) == 0.01


def test_a_run_that_goes_on_has_the_weight_that_was_found(tmp_path: Path) -> None:
    stop = Recorder({5: lambda: os.kill(os.getpid(), signal.SIGTERM)})
    one = trainer(tmp_path, stop, mec_weight=LARGE)
    weight = one.balance(some(), 1.0)
    with pytest.raises(Interrupted):
        one.train("go on")
    other = trainer(tmp_path, mec_weight=LARGE)
    assert other.resume()
    assert other.recipe.mec_weight == other.step.recipe.mec_weight == weight < LARGE
