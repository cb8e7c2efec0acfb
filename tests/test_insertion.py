"""Who gets how many bits, and where a value changes its grid."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

import mecq_cli.models  # noqa: F401  # registers the CIFAR networks
from mecq_cli.calibration import calibrate
from mecq_cli.errors import UsageError
from mecq_cli.insertion import BitPlan, QuantizedModel, insert
from mecq_cli.integer.ir import IntegerModel
from mecq_cli.integer.validate import validate
from mecq_cli.integerize import integerize
from tests.exactness import float_network, random_images


@pytest.fixture(scope="module")
def resnet20() -> nn.Module:
    return float_network("resnet20_cifar", 32)


def bits(model: QuantizedModel) -> list[tuple[int | None, int | None]]:
    return [(s.wbits, s.abits) for s in model.sites() if s.op in ("conv2d", "linear")]


def integer(model: QuantizedModel, size: int = 32) -> IntegerModel:
    calibrate(model, [random_images(2, size)], 1)
    return integerize(model.eval(), (3, size, size), {})


@pytest.mark.parametrize(
    ("plan", "first", "inner", "last"),
    [
        (BitPlan(2, 3), (8, 8), (2, 3), (8, 8)),
        (BitPlan(2, 3, first_last_bits=4), (4, 4), (2, 3), (4, 4)),
        (BitPlan(32, 4), (32, 8), (32, 4), (32, 8)),
        (BitPlan(1, 32), (8, 32), (1, 32), (8, 32)),
    ],
)
def test_first_and_last_layers_have_bits_of_their_own(
    resnet20: nn.Module,
    plan: BitPlan,
    first: tuple[int, int],
    inner: tuple[int, int],
    last: tuple[int, int],
) -> None:
    found = bits(insert(resnet20, (3, 32, 32), plan))
    assert [found[0], found[-1]] == [first, last]
    assert {*found[1:-1]} == {inner}


@pytest.mark.parametrize("bits", [8, 4])
def test_a_grid_as_fine_as_that_of_images_is_not_trained(resnet20: nn.Module, bits: int) -> None:
    """Learning its step takes the gradient of the images."""
    model = insert(resnet20, (3, 32, 32), BitPlan(2, 2, first_last_bits=bits))
    images = random_images(4, 32)
    calibrate(model, [images], 1)
    model.train()
    model(images)[:, 0].sum().backward()
    steps = {site.name: site.output_quantizer for site in model.sites() if site.output_quantizer}
    trained = {name for name, quantizer in steps.items() if has_gradients(quantizer)}
    assert set(steps) - trained == ({"input.quantize"} if bits == 8 else set())


def test_a_grid_that_images_share_with_features_is_trained() -> None:
    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.a, self.b = nn.Conv2d(3, 5, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
            self.fc = nn.Linear(8, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = torch.cat([x, torch.relu(self.conv(x))], 1)
            logits: torch.Tensor = self.fc((self.a(y) + self.b(y) + y).mean((2, 3)))
            return logits

    model = insert(Joined().eval(), (3, 16, 16), BitPlan(8, 8, residual_bits=6))
    steps = {s.name: s.output_quantizer for s in model.sites() if s.output_quantizer is not None}
    fixed = [n for n, q in steps.items() if not any(p.requires_grad for p in q.parameters())]
    assert fixed == ["input.quantize"]


def has_gradients(module: nn.Module) -> bool:
    return any(p.grad is not None for p in module.parameters())


def test_the_last_matching_pattern_wins(resnet20: nn.Module) -> None:
    overrides = [("layer*", 4, None), ("layer1.?.conv1", None, 6), ("layer1.0.*", 3, 7)]
    model = insert(resnet20, (3, 32, 32), BitPlan(2, 2, overrides=overrides))
    found = {s.name: (s.wbits, s.abits) for s in model.sites() if s.op == "conv2d"}
    assert found["layer1.0.conv1"] == found["layer1.0.conv2"] == (3, 7)
    assert found["layer1.1.conv1"] == (4, 6)
    assert found["layer1.1.conv2"] == found["layer3.2.conv1"] == (4, 2)
    assert found["conv1"] == (8, 8)
    with pytest.raises(UsageError, match=r"'nope\*' matches no layer; the layers are conv1"):
        insert(resnet20, (3, 32, 32), BitPlan(2, 2, overrides=[("nope*", 4, None)]))


def test_the_residual_stream_has_powers_of_two(resnet20: nn.Module) -> None:
    model = integer(insert(resnet20, (3, 32, 32), BitPlan(2, 2)))
    grids = {node.name: node.grid for node in model.nodes}
    for node in model.nodes:
        if node.op == "add":
            for grid in [node.grid, *(grids[name] for name in node.inputs)]:
                assert grid is not None
                assert (grid.bits, grid.zero_point % 2) == (8, 0)
                assert torch.tensor(grid.scale).log2() % 1 == 0
        if node.op == "conv2d" and node.name != "conv1":
            grid = grids[node.inputs[0]]
            assert grid is not None
            assert grid.bits == 2
    # One conversion for all who read a value in the same form.
    conversions = [n.inputs for n in model.nodes if n.op == "requantize"]
    assert len(conversions) == len({*conversions})


def test_the_inputs_of_a_concatenation_share_a_grid() -> None:
    net = float_network("torchvision/squeezenet1_0", 64)
    model = integer(insert(net, (3, 64, 64), BitPlan(2, 4)), 64)
    grids = {node.name: node.grid for node in model.nodes}
    concats = [node for node in model.nodes if node.op == "concat"]
    assert len(concats) == 8
    for node in concats:
        assert len({grids[name] for name in node.inputs} | {node.grid}) == 1


def test_residuals_may_stay_in_float(resnet20: nn.Module) -> None:
    model = integer(insert(resnet20, (3, 32, 32), BitPlan(2, 2, residual_bits=32)))
    assert {n.grid for n in model.nodes if n.op == "add"} == {None}


def test_parameters_are_shared_and_each_is_trained_once(resnet20: nn.Module) -> None:
    model = insert(resnet20, (3, 32, 32), BitPlan(4, 4))
    own = {id(p) for p in resnet20.parameters()}
    assert own <= {id(p) for p in model.parameters()}
    again = insert(resnet20, (3, 32, 32), BitPlan(4, 4))
    calibrate(model, [random_images(2, 32)], 1)
    again.load_state_dict(model.state_dict())
    images = random_images(3, 32)
    assert torch.equal(model.eval()(images), again.eval()(images))


@pytest.mark.parametrize("taps", [("penultimate",), ("stages",), ("layers",)])
def test_tapped_values_come_beside_the_logits(resnet20: nn.Module, taps: tuple[str, ...]) -> None:
    model = insert(resnet20, (3, 32, 32), BitPlan(2, 2), taps)  # type: ignore[arg-type]
    calibrate(model, [random_images(2, 32)], 1)
    logits, *values = model.train().graph(random_images(4, 32))
    assert logits.shape == (4, 10)
    assert len(values) == len(model.taps) == {"penultimate": 1, "stages": 3, "layers": 19}[taps[0]]
    if taps == ("penultimate",):
        assert values[0].flatten(1).shape == (4, 64)
        assert len(values[0].unique()) <= 256  # what the classifier reads lies on its grid


def test_a_network_without_weights_is_refused() -> None:
    with pytest.raises(UsageError):
        insert(nn.Sequential(nn.Flatten()), (3, 8, 8), BitPlan(2, 2))


def test_several_families_can_be_inserted() -> None:
    """Grouped and depthwise convolutions, bottlenecks, inverted residuals."""
    for name in ("resnet26", "regnetx_002", "mobilenetv2_035"):
        model = timm.create_model(name, num_classes=4)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        quantized = insert(model, (3, 64, 64), BitPlan(32, 4))
        assert {*bits(quantized)[1:-1]} == {(32, 4)}, name


def test_an_average_that_is_read_as_floats_is_one_of_floats() -> None:
    """An average of integers can only go to a grid, which a float layer does not want."""
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.AvgPool2d(2), nn.Conv2d(4, 4, 1), nn.Flatten(), nn.Linear(900, 5)
    )
    model = integer(insert(network, (3, 32, 32), BitPlan(4, 4, overrides=[("2", 32, 32)])))
    validate(model)
    [pool] = [node for node in model.nodes if node.op == "avg_pool2d"]
    grids = {node.name: node.grid for node in model.nodes}
    assert (pool.grid, grids[pool.inputs[0]]) == (None, None)
    assert grids["input.quantize"] is not None


@torch.no_grad()
def test_a_batch_norm_behind_a_linear_layer_is_folded() -> None:
    norm = nn.BatchNorm1d(6)
    norm.weight[:2] = torch.tensor([-1.0, 0.0])
    norm.bias[:] = 2.0
    network = nn.Sequential(nn.Flatten(), nn.Linear(3072, 6), norm, nn.ReLU(), nn.Linear(6, 5))
    model = insert(network, (3, 32, 32), BitPlan(8, 8))
    images = random_images(4, 32)
    calibrate(model, [images], 1)
    wanted, got = network.eval()(images), model.eval()(images)
    assert float((got - wanted).norm() / wanted.norm()) < 0.05
    assert [node.op for node in integer(model).nodes].count("linear") == 2
