"""What the graph of a network is found to be, and what is refused by name."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

import mecq_cli.models.cifar_resnet  # noqa: F401  # registers the CIFAR networks
from mecq_cli.capture import capture
from mecq_cli.errors import UsageError
from mecq_cli.insertion import BitPlan, insert
from mecq_cli.insertion.plan import gate_layers
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
        (nn.Softmax(0), "layer middle.0: a softmax over images"),
        (nn.BatchNorm2d(8), None),
        (nn.Upsample(scale_factor=2, mode="bicubic"), "layer middle.0: .*bicubic"),
        (nn.ConstantPad2d(1, 0.5), "layer middle.0: only padding with zeros"),
        (Lambda(lambda x: x + x.sum((0, 3), keepdim=True)), "layer middle.0: a sum over images"),
        (nn.BatchNorm2d(8, track_running_stats=False), "layer middle.0: .*running statistics"),
        (Lambda(lambda x: x / x.mean()), "layer middle.0: "),
        (Lambda(lambda x: F.pad(x, (1, -1))), r"layer middle.0: padding by \[1, -1\]"),
        (
            Lambda(lambda x: torch.cat([x, x], 0)),
            "layer middle.0: images of a batch cannot be joined",
        ),
        (Lambda(lambda x: x if float(x.detach().sum()) > 0 else -x), "torch.export"),
        (Lambda(lambda x: x.relu() ** 0.5), "layer middle.0: a power of 0.5"),
        (Lambda(lambda x: x + x.shape[0]), "a number that depends on how many images there are"),
        (Lambda(lambda x: x + x.mean(dim=None)), "layer middle.0: a mean over images"),
        (Lambda(lambda x: (x * 100).int().float() / 100), "layer middle.0: .* into int32"),
        (nn.Softplus(threshold=2), "layer middle.0: a softplus with so low a threshold"),
        (StochasticDepth(0.2, "batch"), "layer middle.0: noise of shape"),
        (
            Lambda(lambda x: x * x.new_empty((x.shape[0], 8, 1, 1)).bernoulli_(0.8).div_(0.8)),
            "layer middle.0: noise of shape",
        ),
    ],
)
def test_what_has_no_integer_form_is_named(module: nn.Module, message: str | None) -> None:
    if message is None:
        assert capture(Net(module), SHAPE)[0].norm is not None
        return
    with pytest.raises(UsageError, match=message) as caught:
        capture(Net(module), SHAPE)
    assert "\n" not in str(caught.value)


OTHER_NAMES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "concat": (lambda x: torch.concat([x, x], 1)[:, :8], lambda x: torch.cat([x, x], 1)[:, :8]),
    "concatenate": (
        lambda x: torch.concatenate([x, x], 1)[:, 4:12],
        lambda x: torch.cat([x, x], 1)[:, 4:12],
    ),
    "swapaxes": (lambda x: x.swapaxes(2, -1), lambda x: x.transpose(2, 3)),
    "swapdims": (lambda x: x.swapdims(-1, 2), lambda x: x.transpose(2, 3)),
    "mH": (lambda x: x.mH, lambda x: x.transpose(2, 3)),
    "adjoint": (lambda x: x.adjoint(), lambda x: x.transpose(2, 3)),
    "clip": (lambda x: x.clip(0.0, 0.5), lambda x: x.clamp(0.0, 0.5)),
    "multiply": (lambda x: torch.multiply(x, x.sigmoid()), lambda x: x * x.sigmoid()),
    "subtract": (lambda x: torch.subtract(x, x.relu()), lambda x: x - x.relu()),
    "divide": (lambda x: torch.divide(x, 2.5), lambda x: x / 2.5),
    "true_divide": (lambda x: torch.true_divide(x, 2.5), lambda x: x / 2.5),
    "negative": (lambda x: torch.negative(x), lambda x: -x),
    "positive": (lambda x: +x + x.relu(), lambda x: x + x.relu()),
    "type_as": (lambda x: x.relu().type_as(x), lambda x: x.relu()),
    "cpu": (lambda x: x.relu().to("cpu"), lambda x: x.relu()),
    "to_other": (lambda x: x.relu().to(x), lambda x: x.relu()),
    "rsub": (lambda x: 1 - x.relu(), lambda x: -x.relu() + 1),
    "square": (lambda x: x.square(), lambda x: x * x),
    "pow": (lambda x: (x**2) * 0.5, lambda x: (x * x) * 0.5),
    "pow_3": (lambda x: x**3, lambda x: x * x * x),
}


@pytest.mark.parametrize("name", OTHER_NAMES)
def test_other_names_of_an_operation_are_known(name: str) -> None:
    kinds = [[layer.kind for layer in capture(Net(Lambda(f)), SHAPE)] for f in OTHER_NAMES[name]]
    assert kinds[0] == kinds[1]
    torch.manual_seed(0)
    net = Net(Lambda(OTHER_NAMES[name][0])).eval()
    images = torch.randn(4, *SHAPE)
    plain = insert(net, SHAPE, BitPlan(32, 32)).train()
    torch.testing.assert_close(plain(images), net(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("share", [0.2, 0.5])  # the graph does not say what is the default
@pytest.mark.parametrize(
    "made", [DropPath, lambda share: StochasticDepth(share, "row")], ids=["timm", "torchvision"]
)
def test_stochastic_depth_drops_images(made: Callable[[float], nn.Module], share: float) -> None:
    dropped = [layer for layer in capture(Net(made(share)), SHAPE) if layer.kind == "dropout"]
    assert [layer.attributes for layer in dropped] == [{"axes": 1}]
    assert isinstance(dropped[0].module, nn.Dropout)
    assert dropped[0].module.p == pytest.approx(share)


def test_weights_that_are_computed_from_weights_are_computed_once() -> None:
    class Standardized(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, self.weight - self.weight.mean())

    module = Standardized(8, 8, 1)
    (layer,) = [found for found in capture(Net(module), SHAPE) if found.name == "middle.0"]
    assert isinstance(layer.module, nn.Conv2d)
    torch.testing.assert_close(layer.module.weight, module.weight - module.weight.mean())
    assert layer.module.weight.requires_grad


def test_weights_that_depend_on_the_images_are_refused() -> None:
    class Dynamic(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, self.weight * x.mean())

    with pytest.raises(UsageError, match=r"layer middle\.0.*: "):
        capture(Net(Dynamic(8, 8, 1)), SHAPE)


def test_the_mode_of_the_model_is_kept() -> None:
    for training in (True, False):
        net = Net(nn.Dropout(0.5)).train(training)
        capture(net, SHAPE)
        assert net.training is training


def test_a_fixed_number_of_images_is_explained() -> None:
    with pytest.raises(UsageError, match=r"it fixes the number of images, as len\(x\)"):
        capture(Net(Lambda(lambda x: x.reshape(len(x), 8, 16, 16))), SHAPE)


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


def kinds_of(*middle: nn.Module, channels: int = 8) -> list[str]:
    """Of the layers between the first convolution and the head."""
    layers = capture(Net(*middle, channels=channels), SHAPE)
    return [layer.kind for layer in layers[1:-3]]


@pytest.mark.parametrize(
    ("module", "name", "parameters"),
    [
        (nn.SiLU(), "silu", []),
        (nn.SiLU(inplace=True), "silu", []),
        (nn.GELU(), "gelu", []),
        (nn.GELU("tanh"), "gelu_tanh", []),
        (nn.Sigmoid(), "sigmoid", []),
        (nn.Tanh(), "tanh", []),
        (nn.Hardswish(), "hardswish", []),
        (nn.Hardsigmoid(inplace=True), "hardsigmoid", []),
        (nn.LeakyReLU(0.25), "leaky_relu", [0.25]),
        (nn.PReLU(), "leaky_relu", [0.25]),
        (nn.ELU(0.5), "elu", [0.5]),
        (nn.Mish(), "mish", []),
        (nn.Softplus(), "softplus", []),
        (nn.Hardtanh(-2.0, 3.0), "clamp", [-2.0, 3.0]),
        (Lambda(lambda x: -x), "negative", []),
    ],
)
def test_functions_have_names(module: nn.Module, name: str, parameters: list[float]) -> None:
    layer = capture(Net(module), SHAPE)[1]
    assert (layer.kind, layer.attributes) == ("function", {"name": name, "parameters": parameters})


def test_a_batch_norm_that_stands_alone_is_an_affine_layer_with_its_relu() -> None:
    layers = capture(Net(nn.MaxPool2d(2), nn.BatchNorm2d(8), nn.ReLU()), SHAPE)
    affine = layers[2]
    assert (affine.kind, affine.ceiling) == ("affine", float("inf"))
    assert isinstance(affine.norm, nn.BatchNorm2d)
    assert isinstance(affine.module, nn.Conv2d)
    assert not affine.module.weight.requires_grad
    assert torch.equal(affine.module.weight, torch.ones(8, 1, 1, 1))


def test_constants_of_channels_are_affine_layers_and_join() -> None:
    class Scale(nn.Module):
        def __init__(self, *shape: int) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(shape))
            self.bias = nn.Parameter(torch.randn(shape))

        def forward(self, x: Tensor) -> Tensor:
            return self.weight * x + self.bias

    for shape in ((8, 1, 1), (1, 8, 1, 1), (1,)):
        scale = Scale(*shape)
        layers = capture(Net(scale), SHAPE)
        assert [layer.kind for layer in layers[1:-3]] == ["affine"]
        module = layers[1].module
        assert isinstance(module, nn.Conv2d)
        assert module.bias is not None
        assert torch.equal(module.weight.flatten(), scale.weight.flatten().expand(8))
        assert torch.equal(module.bias, scale.bias.flatten().expand(8))
    assert kinds_of(Lambda(lambda x: 0.5 * x - 1.0)) == ["affine"]


def test_what_moves_values_is_read_as_it_is() -> None:
    def shuffle(x: Tensor) -> Tensor:
        a, b = x.chunk(2, 1)
        y = torch.cat([a, b, a.sigmoid() - b], 1).view(x.shape[0], 3, 4, 16, 16)
        return y.transpose(1, 2).reshape(x.shape[0], 12, 16, 16)

    assert kinds_of(Lambda(shuffle), channels=12) == [
        "slice", "slice", "function", "function", "add", "concat", "reshape", "transpose",
        "reshape",
    ]  # fmt: skip
    layers = capture(Net(nn.Upsample(scale_factor=2), nn.AdaptiveAvgPool2d((5, 7))), SHAPE)
    assert [layer.attributes["size"] for layer in layers[1:3]] == [[32, 32], [5, 7]]


def test_heads_for_training_alone_are_dropped() -> None:
    class Auxiliary(Net):
        def __init__(self) -> None:
            super().__init__(nn.ReLU())
            self.aux = nn.Sequential(nn.Flatten(), nn.Linear(8 * 16 * 16, 4))

        def forward(self, x: Tensor) -> Tensor:
            self.aux(self.stem(x))
            return super().forward(x)

    assert "aux.1" not in {layer.name for layer in capture(Auxiliary(), SHAPE)}


def test_stochastic_depth_drops_whole_images() -> None:
    from torchvision.ops import StochasticDepth

    layers = capture(Net(StochasticDepth(0.25, "row"), nn.Conv2d(8, 8, 1)), SHAPE)
    assert layers[1].kind == "dropout"
    assert isinstance(layers[1].module, nn.Dropout)
    assert (layers[1].module.p, layers[1].attributes) == (0.25, {"axes": 1})


def test_gates_of_squeeze_and_excitation_are_found() -> None:
    model = timm.create_model("efficientnet_b0", num_classes=10)
    found = gate_layers(capture(model, (3, 64, 64)))
    assert len(found) == 32
    assert all(".se.conv_" in name for name in found)
