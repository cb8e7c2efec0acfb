"""What the graph of a network is found to be, and what is refused by name."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mecq_cli.capture import capture
from mecq_cli.errors import UsageError
from mecq_cli.integer.ir import INPUT

SHAPE = (3, 16, 16)


class Net(nn.Module):
    """A convolution, what a test wants, and a classifier."""

    def __init__(self, *middle: nn.Module, channels: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.middle = nn.Sequential(*middle)
        self.head = nn.Linear(channels, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.middle(self.stem(x)).mean((2, 3)))  # type: ignore[no-any-return]


class Lambda(nn.Module):
    def __init__(self, function: object) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)  # type: ignore[operator, no-any-return]


def test_resnet20_is_what_it_is() -> None:
    model = timm.create_model("resnet20_cifar", num_classes=10)
    before = {name: b.clone() for name, b in model.named_buffers()}
    layers = capture(model, (3, 32, 32))
    kinds = [layer.kind for layer in layers]
    assert {k: kinds.count(k) for k in {*kinds}} == {
        "conv2d": 19, "linear": 1, "add": 9, "slice": 4, "pad": 2, "global_avg_pool": 1,
        "flatten": 1,
    }  # fmt: skip
    assert layers[0].inputs == [INPUT]
    assert len({layer.name for layer in layers}) == len(layers)
    parameters = {id(p) for p in model.parameters()}
    for layer in layers:
        if layer.kind == "conv2d":
            assert layer.norm is not None
            assert isinstance(layer.module, nn.Conv2d)
            assert id(layer.module.weight) in parameters
            assert id(layer.norm.weight) in parameters
            assert layer.norm.running_mean is not None  # its own: the float network stays as it is
            assert layer.norm.running_mean.data_ptr() not in {b.data_ptr() for b in model.buffers()}
        if layer.kind == "add":
            assert layer.ceiling == float("inf")
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name]), name
    by_name = {layer.name: layer for layer in layers}
    assert by_name["layer1.0.conv1"].ceiling == float("inf")
    assert by_name["layer1.0.conv2"].ceiling is None


def test_padding_activations_and_pools_keep_what_they_were() -> None:
    net = Net(
        nn.ReLU6(),
        nn.ZeroPad2d((0, 1, 2, 3)),
        nn.Conv2d(8, 8, 3, stride=2, groups=8, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, 2, 1, ceil_mode=True),
        nn.Dropout(0.2),
        nn.Conv2d(8, 8, (1, 3), padding="same", dilation=2),
        nn.AvgPool2d(2, count_include_pad=False),
    )
    layers = capture(net, SHAPE)
    assert [layer.kind for layer in layers] == [
        "conv2d", "conv2d", "max_pool2d", "dropout", "conv2d", "avg_pool2d", "global_avg_pool",
        "flatten", "linear",
    ]  # fmt: skip
    stem, depthwise, pool, _, wide, *_ = layers
    assert stem.ceiling == 6.0
    assert depthwise.attributes["padding"] == [2, 0, 3, 1]  # top, left, bottom, right
    assert depthwise.attributes["groups"] == 8
    assert depthwise.norm is not None
    assert pool.attributes["ceil_mode"] is True
    assert wide.attributes["padding"] == [0, 2, 0, 2]


def test_tensorflow_padding_of_a_real_family_is_folded() -> None:
    model = timm.create_model("tf_efficientnet_lite0", num_classes=10)
    layers = capture(model, (3, 64, 64))
    assert not [layer for layer in layers if layer.kind == "pad"]
    padded = [layer.attributes["padding"] for layer in layers if layer.kind == "conv2d"]
    assert [0, 0, 1, 1] in padded
    assert {layer.ceiling for layer in layers} == {None, 6.0}
    assert sum(layer.kind == "add" for layer in layers) == 9


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.GELU(), r"layer middle.0: the operation gelu\S* has no integer form"),
        (nn.Sigmoid(), "layer middle.0: the operation sigmoid"),
        (nn.BatchNorm2d(8), None),
        (nn.Sequential(nn.ReLU(), nn.BatchNorm2d(8)), "layer middle.0.1: a batch norm that does"),
        (nn.Sequential(nn.MaxPool2d(2), nn.ReLU()), "layer middle.0.1: an activation that does"),
        (nn.Hardtanh(), "layer middle.0: a clamp that does not start at 0"),
        (nn.AdaptiveAvgPool2d(5), r"layer middle.0: adaptive pooling from .*16, 16.* to .*5, 5"),
        (nn.ReflectionPad2d(1), "layer middle.0: "),
        (nn.BatchNorm2d(8, track_running_stats=False), "layer middle.0: .*running statistics"),
        (Lambda(lambda x: x.softmax(1)), "layer middle.0: a softmax over another axis"),
        (Lambda(lambda x: x + x.mean((2, 3), keepdim=True)), "layer middle.0: .*different shapes"),
        (Lambda(lambda x: F.pad(x, (1, -1))), r"layer middle.0: padding by \[1, -1\]"),
        (
            Lambda(lambda x: torch.cat([x, x], 0)),
            "layer middle.0: images of a batch cannot be joined",
        ),
        (Lambda(lambda x: x if float(x.detach().sum()) > 0 else -x), "torch.export"),
    ],
)
def test_what_has_no_integer_form_is_named(module: nn.Module, message: str | None) -> None:
    if message is None:
        assert capture(Net(module), SHAPE)[0].norm is not None
        return
    with pytest.raises(UsageError, match=message) as caught:
        capture(Net(module), SHAPE)
    assert "\n" not in str(caught.value)


def test_weights_that_are_computed_are_refused() -> None:
    class Standardized(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, self.weight - self.weight.mean())

    with pytest.raises(UsageError, match=r"layer middle\.0: .*no integer form"):
        capture(Net(Standardized(8, 8, 1)), SHAPE)


def test_the_mode_of_the_model_is_kept() -> None:
    for training in (True, False):
        net = Net(nn.Dropout(0.5)).train(training)
        capture(net, SHAPE)
        assert net.training is training


def test_a_classifier_has_one_output() -> None:
    with pytest.raises(UsageError, match="one output"):
        capture(Two(), SHAPE)


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.stem(x)
        return y, y.mean((2, 3))
