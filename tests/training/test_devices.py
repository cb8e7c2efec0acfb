"""A training step on devices that are not here, and how often one is waited for."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from mecq_cli.calibration import calibrate
from mecq_cli.config import QuantizeConfig
from mecq_cli.events import Listener
from mecq_cli.insertion import BitPlan, insert
from mecq_cli.insertion.taps import Tap
from mecq_cli.training import recipe as recipe_module
from mecq_cli.training.averaging import WeightAverage
from mecq_cli.training.oscillation import OscillationFreezing
from mecq_cli.training.recipe import choose, make_optimizer
from mecq_cli.training.step import TrainingStep
from mecq_cli.training.teacher import Teacher
from tests.exactness import float_network, random_images
from tests.simulated_gpu import Watch, put_on_gpu, put_on_meta

SIZE = 32
IMAGES, LABELS = random_images(8, SIZE), torch.arange(8) % 10


def step_of(
    name: str,
    quantizer: str,
    move: Callable[[nn.Module], None] = lambda module: None,
    **arguments: Any,
) -> TrainingStep:
    """With all that the recipe may have beside it; ``move`` brings it to a device."""
    torch.manual_seed(0)
    network = float_network(name, SIZE, **arguments)
    plain = copy.deepcopy(network).eval()
    taps: tuple[Tap, ...] = ("stages",)
    model = insert(network, (3, SIZE, SIZE), BitPlan(2, 2, quantizer=quantizer), taps)
    calibrate(model, [IMAGES], 1)
    values: dict[str, Any] = {
        "model": "m", "wbits": 2, "abits": 2, "data": Path("d"), "amp": "off", "epochs": 3,
        "compile": "off", "lr": 0.01,
    }  # fmt: skip
    recipe = choose(QuantizeConfig(**values), 4, 4, torch.device("cpu"))
    teacher = Teacher(plain, (3, SIZE, SIZE), taps)
    move(model)
    move(teacher)
    model.train()
    optimizer, _ = make_optimizer(model, recipe)
    step = TrainingStep(model, teacher, recipe, optimizer, Listener())
    with torch.no_grad():
        watched = (OscillationFreezing(model, 0.02),) if quantizer == "lsq" else ()
        step.followers = (*watched, WeightAverage(model, 0.9))
    return step


VIT = {"img_size": SIZE, "patch_size": 8, "depth": 2}


@pytest.fixture
def simulable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the optimizer's update in one pass, which no simulation has."""
    monkeypatch.setattr(recipe_module, "can_fuse", lambda device: False)


@pytest.mark.parametrize(
    ("name", "quantizer", "arguments"),
    [
        ("resnet20_cifar", "auto", {}),
        ("mobilenetv2_035", "lsq", {}),
        ("vit_tiny_patch16_224", "auto", VIT),
    ],
)
@pytest.mark.usefixtures("simulable")
def test_losses_and_updates_are_computed_on_the_device(
    name: str, quantizer: str, arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    simulated = FakeTensorMode()
    step = step_of(name, quantizer, partial(put_on_gpu, simulated=simulated), **arguments)

    def backward(loss: Tensor) -> None:
        assert loss.requires_grad
        assert loss.device.type == "cuda"
        for parameter in step.model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)

    monkeypatch.setattr(Tensor, "backward", backward)
    with simulated, Watch(answer=1.0):
        images = torch.zeros(IMAGES.shape, device="cuda")
        labels = torch.zeros(LABELS.shape, device="cuda", dtype=torch.int64)
        for number in range(2):
            losses = step(images, labels, number)
    assert losses.counted == len(LABELS)
    assert losses.coding_lengths


@pytest.mark.parametrize(
    ("name", "quantizer"),
    [
        *(("resnet20_cifar", q) for q in ("auto", "lsq+", "pact", "dorefa", "n2uq", "ewgs")),
        ("mobilenetv2_035", "lsq"),
    ],
)
@pytest.mark.usefixtures("simulable")
def test_gradients_are_computed_on_the_device(
    name: str, quantizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = step_of(name, quantizer, put_on_meta)
    # That device has no autocast to ask for, and nothing to read.
    monkeypatch.setattr(torch, "autocast", lambda device, *_, **__: nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)
    monkeypatch.setattr(Tensor, "tolist", lambda tensor: [1.0] * tensor.numel())
    with Watch(answer=1.0):
        for number in range(2):
            step(IMAGES.to("meta"), LABELS.to("meta"), number)
    gradients = [p.grad for p in step.model.parameters() if p.requires_grad]
    assert len(gradients) > 20
    assert all(g is not None and g.device.type == "meta" for g in gradients)


@pytest.mark.parametrize("quantizer", ["auto", "lsq", "n2uq"])
def test_a_step_waits_for_the_device_three_times(quantizer: str) -> None:
    """For whether the coding lengths are sound, for the losses, and for the gradients."""
    step = step_of("resnet20_cifar", quantizer)
    step(IMAGES, LABELS, 0)
    with Watch() as watch:
        step(IMAGES, LABELS, 1)
    assert watch.found.total() == 3, watch.found
