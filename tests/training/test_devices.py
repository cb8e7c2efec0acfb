"""A training step on a device that is not here: a simulated GPU, and how often one is waited for.

PyTorch's fake tensors have a device and a shape but no values. Autograd asks for a real GPU where a
gradient passes through them, so the backward pass is left out.
"""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

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

SIZE = 32
IMAGES, LABELS = random_images(8, SIZE), torch.arange(8) % 10
READ = "_local_scalar_dense"
WAITING = (READ, "nonzero", "equal", "is_nonzero")


class Watch(TorchDispatchMode):
    """Counts operations whose answer a GPU is waited for; ``answer`` is that of simulated ones."""

    def __init__(self, *, answer: float | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.answer = answer
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = function.overloadpacket.__name__
        self.found[name] += name in WAITING
        if name == READ and self.answer is not None:
            return bool(self.answer) if args[0].dtype == torch.bool else self.answer
        return function(*args, **(kwargs or {}))


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


def put_on_gpu(module: nn.Module, simulated: FakeTensorMode) -> None:
    """Replace all tensors; what several modules share stays shared."""
    moved: dict[int, Any] = {}
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in moved:
                    plain = tensor.detach()
                    with simulated:
                        fake: Tensor = simulated.from_tensor(plain).to("cuda")
                        if isinstance(tensor, nn.Parameter):
                            fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
                    moved[id(tensor)] = fake
                tensors[name] = moved[id(tensor)]


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
