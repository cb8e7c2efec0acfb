"""The frozen FP network in integers: close to the FP network, and not used where it is not."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mecq_cli.calibration import calibrate
from mecq_cli.config import QuantizeConfig
from mecq_cli.insertion import BitPlan, Tap, insert
from mecq_cli.integer.ir import Grid, Node
from mecq_cli.integer_conv import is_available
from mecq_cli.kernels import run_node
from mecq_cli.training.integer_teacher import (
    LARGEST_ERROR,
    IntegerTeacher,
    _max_pool,
    _Product,
    make_teacher,
    quick_teacher,
)
from mecq_cli.training.recipe import Recipe, choose
from mecq_cli.training.teacher import Teacher

pytestmark = pytest.mark.skipif(not is_available(), reason="this CPU has no VNNI")

SHAPE = (3, 16, 16)
TAPS: Sequence[Tap] = ("penultimate", "stages")


class Branches(nn.Module):
    """A residual add behind each kind of convolution, one of a value that is read again."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.pointwise = nn.Conv2d(8, 8, 1)
        self.down = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.short = nn.Conv2d(8, 16, 1, stride=2)
        self.pool = nn.MaxPool2d(2)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.relu6(self.norm(self.stem(x)))
        x = self.pointwise(torch.relu(self.depthwise(x))) + x
        y = self.pool(torch.relu(self.down(x) + self.short(x)))
        y = torch.cat([y[:, 8:], y[:, :8]], 1)
        logits: Tensor = self.fc(y.mean((2, 3)))
        return logits


def network() -> Branches:
    torch.manual_seed(0)
    made = Branches()
    with torch.no_grad():
        made.norm.weight.normal_()  # negative ones too
        made.norm.bias.normal_()
    made.eval().requires_grad_(False)
    return made


def images() -> Tensor:
    """Noise of another colour and contrast in each image: the means over their maps differ."""
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(32, *SHAPE, generator=generator)
    return noise * torch.rand(32, 1, 1, 1, generator=generator) * 2 + torch.randn(
        32, 3, 1, 1, generator=generator
    )


def recipe(**changes: object) -> Recipe:
    config = QuantizeConfig.model_validate({
        "model": "x", "data": "x", "compile": "model", "wbits": 2, "abits": 2,
    })  # fmt: skip
    made = choose(config, 10, 32, torch.device("cpu"))
    return replace(made, **changes)  # type: ignore[arg-type]


def test_it_says_the_same_as_the_fp_network() -> None:
    fp, x = network(), images()
    before = copy.deepcopy(fp.state_dict())
    quick, error = quick_teacher(fp, SHAPE, TAPS, 2, [x])
    expected = Teacher(fp, SHAPE, TAPS, 2)(x)
    with torch.autocast("cpu", torch.bfloat16):
        values = quick(x)
    assert error <= LARGEST_ERROR
    for value, wanted in zip(values, expected, strict=True):
        assert value.shape == wanted.shape
        assert value.dtype == torch.float32
        cosine = torch.cosine_similarity(value.flatten(), wanted.flatten(), 0)
        assert float(cosine) > 0.998
    assert all(torch.equal(v, before[k]) for k, v in fp.state_dict().items())


def test_it_computes_what_the_integer_network_does() -> None:
    """Against evaluation mode, which is what would be exported, of the same 8-bit network."""
    fp, x = network(), images()
    model = insert(fp, SHAPE, BitPlan(8, 8), TAPS)
    calibrate(model, [x], 1)
    model.eval()
    with torch.no_grad():
        wanted = model(x)
    logits = IntegerTeacher(model)(x)[0]
    step = float((logits - wanted).abs().max()) / float(wanted.std())
    assert step < 0.05  # sums of adds are rounded once instead of twice, and nothing else


def test_an_activation_in_front_of_an_add_is_kept() -> None:
    class Clipped(Branches):
        def forward(self, x: Tensor) -> Tensor:
            x = nn.functional.relu6(self.norm(self.stem(x)))
            x = x + torch.relu(self.pointwise(x))
            logits: Tensor = self.fc(self.down(x).mean((2, 3)))
            return logits

    torch.manual_seed(0)
    fp, x = Clipped().eval().requires_grad_(False), images()
    _, error = quick_teacher(fp, SHAPE, TAPS, 1, [x])
    assert error <= LARGEST_ERROR


def test_other_batches_and_values_that_are_read_again() -> None:
    """The add takes over memory that others may read; a last batch is smaller."""
    fp, x = network(), images()
    quick, _ = quick_teacher(fp, SHAPE, TAPS, 1, [x])
    whole = quick(x)
    again = quick(x)
    parts = quick(x[:7])
    for first, second, part in zip(whole, again, parts, strict=True):
        assert torch.equal(first, second)
        torch.testing.assert_close(part, first[: len(part)], rtol=1e-5, atol=1e-5)


class Mixing(nn.Module):
    """Tokens without norms or attention: nothing of it is a float."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, 4)
        self.across, self.within = nn.Linear(16, 16), nn.Linear(16, 16)
        self.last = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = x + self.across(x.transpose(1, 2)).transpose(1, 2)
        x = x + torch.relu(self.within(x))
        logits: Tensor = self.last(x.mean(1))
        return logits


def test_tokens_are_tapped_as_the_fp_network_s_are() -> None:
    torch.manual_seed(0)
    plain = Mixing().eval().requires_grad_(False)
    model = insert(copy.deepcopy(plain), SHAPE, BitPlan(8, 8), TAPS)
    calibrate(model, [images()], 1)
    values, expected = IntegerTeacher(model)(images()), Teacher(plain, SHAPE, TAPS)(images())
    for value, wanted in zip(values, expected, strict=True):
        assert value.shape == wanted.shape
        assert float((value - wanted).norm() / wanted.norm()) < 0.1


def test_where_it_is_used() -> None:
    fp, x = network(), images()

    def kind(made: Recipe) -> type:
        return type(make_teacher(fp, SHAPE, TAPS, 1, made, lambda: [x]))

    assert kind(recipe()) is IntegerTeacher
    assert kind(recipe(compile="quantizers")) is Teacher
    assert kind(recipe(teacher="float")) is Teacher
    # Where one channel is so much larger than the others, 256 steps are too few for them.
    fp.pointwise.weight[0] *= 1e4
    assert kind(recipe()) is Teacher


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation", "ceil_mode"),
    [(3, 2, 1, 1, False), (2, 2, 0, 1, True), (3, 1, 1, 2, False), (3, 2, 0, 1, True)],
)
def test_maxima_of_bytes_are_those_of_floats(
    kernel: int, stride: int, padding: int, dilation: int, ceil_mode: bool
) -> None:
    attributes = {
        "kernel": (kernel, kernel), "stride": (stride, stride), "padding": (padding, padding),
        "dilation": (dilation, dilation), "ceil_mode": ceil_mode,
    }  # fmt: skip
    node = Node("pool", "max_pool2d", ("x",), Grid(0.1, 3, 8, 0, 255), attributes)
    x = torch.randint(0, 256, (2, 5, 13, 11), dtype=torch.uint8)
    for layout in (torch.contiguous_format, torch.channels_last):
        pooled = _max_pool(node, x.contiguous(memory_format=layout))
        assert pooled.dtype == torch.uint8
        expected = run_node(node, [x.float()], [node.grid])
        assert torch.equal(pooled.float(), expected)


def test_windows_that_see_padding_alone_are_padded_before() -> None:
    """oneDNN reads beyond its input there."""
    torch.manual_seed(0)
    tensors: dict[str, np.ndarray[Any, Any]] = {
        "weight": torch.randint(-128, 128, (5, 1, 2, 2)).to(torch.int8).numpy(),
        "weight_scale": np.ones(5, np.float32),
        "bias": np.zeros(5, np.int32),
    }
    attributes = {"stride": (1, 1), "padding": (2, 2, 2, 2), "dilation": (1, 1), "groups": 1}
    source, result = Grid(1.0, 3, 8, 0, 255), Grid(1000.0, 100, 8, 0, 255)
    node = Node("conv", "conv2d", ("x",), result, attributes, 8, tensors)
    x = torch.randint(0, 256, (2, 1, 11, 12), dtype=torch.uint8)
    expected = run_node(node, [x.float()], [source])
    for size in range(100, 150):
        torch.full((size, 1000), 1e8)  # what would be read
        made = _Product(node, source)(x).float()
        assert (made - expected).abs().max() <= 1  # rounded once or twice
