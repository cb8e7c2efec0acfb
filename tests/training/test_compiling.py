"""What is compiled trains as what is not, and nobody needs a compiler."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache

from mecq_cli.calibration import calibrate
from mecq_cli.config import QuantizeConfig
from mecq_cli.events import Listener
from mecq_cli.insertion import BitPlan, insert
from mecq_cli.quantizers.lsq import LsqWeight
from mecq_cli.training.compiling import Compiler
from mecq_cli.training.recipe import choose, make_optimizer
from mecq_cli.training.step import TrainingStep
from tests.exactness import float_network, random_images

IMAGES = random_images(8, 16)
LABELS = torch.arange(8) % 10


class Warnings(Listener):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def warn(self, text: str) -> None:
        self.texts.append(text)


def losses(what: str, listener: Listener, quantizer: str = "lsq") -> list[float]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    network = float_network("resnet20_cifar", 16).to(memory_format=torch.channels_last)
    model = insert(network, (3, 16, 16), BitPlan(4, 4, quantizer=quantizer))
    calibrate(model, [IMAGES], 1)
    model.train()
    config = QuantizeConfig.model_validate({
        "model": "resnet20_cifar", "wbits": 4, "abits": 4, "data": "data", "max_steps": 3,
        "epochs": 1, "amp": "off", "compile": what, "distill": False, "mec_weight": 0.0,
        "lr": 0.001,
    })  # fmt: skip
    recipe = dataclasses.replace(choose(config, 3, 8, torch.device("cpu")), warmup_steps=0)
    optimizer, _ = make_optimizer(model, recipe)
    step = TrainingStep(model, None, recipe, optimizer, listener)
    return [step(IMAGES, LABELS, i).total for i in range(3)]


@pytest.mark.parametrize("quantizer", ["lsq", "n2uq"])
def test_compiled_quantizers_train_as_plain_ones(quantizer: str) -> None:
    heard = Warnings()
    plain = losses("off", heard, quantizer)
    assert losses("quantizers", heard, quantizer) == pytest.approx(plain, rel=2e-3)
    assert not heard.texts


@pytest.mark.long
@pytest.mark.parametrize("quantizer", ["lsq", "n2uq"])
def test_a_compiled_model_trains_as_a_plain_one(quantizer: str) -> None:
    heard = Warnings()
    plain = losses("off", heard, quantizer)
    assert losses("model", heard, quantizer) == pytest.approx(plain, rel=2e-3)
    assert not heard.texts


@pytest.mark.parametrize("what", ["quantizers", "model"])
def test_without_a_compiler_there_is_one_line(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object) -> object:
        raise TorchDynamoException("no compiler")

    monkeypatch.setattr(torch, "compile", lambda function, **options: broken)
    heard = Warnings()
    assert losses(what, heard) == losses("off", heard)
    assert heard.texts == ["torch.compile does not work here (no compiler); going on without it"]


def test_programs_with_gradients_of_quantizers_are_kept_on_disk() -> None:
    quantizer = LsqWeight(2, 4)
    weight = torch.randn(4, 8, requires_grad=True)
    compiler = Compiler(Listener())

    def gradient() -> Tensor:
        torch._dynamo.reset()  # as a new process: what was compiled is forgotten
        counters.clear()
        (grad,) = torch.autograd.grad(compiler.compiled(quantizer)(weight).square().sum(), weight)
        return grad

    with fresh_cache():
        first = gradient()
        assert counters["aot_autograd"]["autograd_cache_hit"] == 0
        assert torch.equal(gradient(), first)
        assert counters["aot_autograd"]["autograd_cache_hit"] == 1
