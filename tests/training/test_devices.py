"""A training step on a simulated GPU, and how often one is waited for."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
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
from tests.simulated_gpu import Watch, put_on_gpu

SIZE = 32
IMAGES, LABELS = random_images(8, SIZE), torch.arange(8) % 10


def step_of(
    name: str, quantizer: str, simulated: FakeTensorMode | None = None, **arguments: Any
) -> TrainingStep:
    """With all that the recipe may have beside it; on the simulated GPU if there is one."""
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
    if simulated is not None:
        put_on_gpu(model, simulated)
        put_on_gpu(teacher, simulated)
    model.train()
    optimizer, _ = make_optimizer(model, recipe)
    step = TrainingStep(model, teacher, recipe, optimizer, Listener())
    with torch.no_grad():
        watched = (OscillationFreezing(model, 0.02),) if quantizer == "lsq" else ()
        step.followers = (*watched, WeightAverage(model, 0.9))
    return step


VIT = {"img_size": SIZE, "patch_size": 8, "depth": 2}


@pytest.mark.parametrize(
    ("name", "quantizer", "arguments"),
    [
        ("resnet20_cifar", "auto", {}),
        ("resnet20_cifar", "lsq+", {}),
        ("resnet20_cifar", "pact", {}),
        ("resnet20_cifar", "dorefa", {}),
        ("resnet20_cifar", "n2uq", {}),
        ("mobilenetv2_035", "lsq", {}),
        ("vit_tiny_patch16_224", "auto", VIT),
    ],
)
def test_all_of_a_step_is_on_the_device(
    name: str, quantizer: str, arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    simulated = FakeTensorMode()
    monkeypatch.setattr(recipe_module, "can_fuse", lambda device: False)  # it can't be simulated
    step = step_of(name, quantizer, simulated, **arguments)

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


@pytest.mark.parametrize("quantizer", ["auto", "lsq", "n2uq"])
def test_a_step_waits_for_the_device_three_times(quantizer: str) -> None:
    """For whether the coding lengths are sound, for the losses, and for the gradients."""
    step = step_of("resnet20_cifar", quantizer)
    step(IMAGES, LABELS, 0)
    with Watch() as watch:
        step(IMAGES, LABELS, 1)
    assert watch.found.total() <= 3, watch.found
