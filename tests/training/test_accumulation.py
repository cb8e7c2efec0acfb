"""A batch in parts trains as the whole batch does, as far as batch norm allows."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mecq_cli.calibration import calibrate
from mecq_cli.config import QuantizeConfig
from mecq_cli.events import Listener
from mecq_cli.insertion import BitPlan, QuantizedModel, Tap, insert
from mecq_cli.training.recipe import choose, make_optimizer
from mecq_cli.training.step import TrainingStep
from mecq_cli.training.teacher import Teacher
from tests.exactness import random_images

BATCH = 12
TAPS: tuple[Tap, ...] = ("penultimate", "stages")
IMAGES = random_images(BATCH, 16)
LABELS = torch.arange(BATCH) % 10


class Plain(nn.Module):
    """Two convolutions and a classifier; ``normed`` puts a batch norm behind the first."""

    def __init__(self, *, normed: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, 2)
        self.norm = nn.BatchNorm2d(8) if normed else nn.Identity()
        self.conv2 = nn.Conv2d(8, 16, 3, 2)
        self.linear = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv2(torch.relu(self.norm(self.conv1(x)))))
        logits: Tensor = self.linear(x.mean((2, 3)))
        return logits


def one_step(parts: int, *, normed: bool, **changes: Any) -> tuple[QuantizedModel, list[float]]:
    """The network after two steps with distillation and entropy, and the losses."""
    torch.manual_seed(0)
    network = Plain(normed=normed).eval()
    teacher = Teacher(copy.deepcopy(network), (3, 16, 16), TAPS)
    model = insert(network, (3, 16, 16), BitPlan(4, 4), TAPS)
    calibrate(model, [IMAGES], 1)
    values: dict[str, Any] = {
        "model": "m", "wbits": 4, "abits": 4, "data": Path("d"), "amp": "off", "compile": "off",
        "lr": 0.02, "epochs": 1, "mec_on": "penultimate+stages", "accumulate": parts,
    }  # fmt: skip
    recipe = choose(QuantizeConfig(**values | changes), 2, BATCH, torch.device("cpu"))
    optimizer, _ = make_optimizer(model, recipe)
    model.train()
    step = TrainingStep(model, teacher, recipe, optimizer, Listener())
    losses = [step(IMAGES, LABELS, number).total for number in range(2)]
    return model, losses


@pytest.mark.parametrize("term", ["divergence", "entropy"])
def test_parts_train_as_the_whole(term: str) -> None:
    """Entropy included, which couples the images of all parts."""
    whole, losses = one_step(1, normed=False, mec_term=term)
    parts, the_same = one_step(3, normed=False, mec_term=term)
    assert the_same == pytest.approx(losses, rel=1e-5)
    for (name, a), b in zip(whole.named_parameters(), parts.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6), name


def test_batch_norm_sees_a_part_and_counts_it_once() -> None:
    whole, losses = one_step(1, normed=True)
    parts, others = one_step(3, normed=True)
    assert others != pytest.approx(losses, rel=1e-5)
    counts = [
        [int(b) for name, b in model.named_buffers() if name.endswith("num_batches_tracked")]
        for model in (whole, parts)
    ]
    assert counts == [[2], [6]]
