"""What rounding a layer costs, on real networks, and against what is computed the long way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from mecq_cli.calibration import calibrate, float_mode
from mecq_cli.config import Allotted, QuantizeConfig
from mecq_cli.data import dataset_of, normalize, open_split, train_batches
from mecq_cli.errors import NumericError
from mecq_cli.events import Listener
from mecq_cli.insertion import BitPlan, QuantizedModel, insert
from mecq_cli.integerize import integerize
from mecq_cli.models.loading import load_model
from mecq_cli.precision import (
    CANDIDATES,
    SENSITIVITIES,
    Allotment,
    Choice,
    Sensitivity,
    Target,
    allot,
    choices_of,
    measure,
    reached,
)
from mecq_cli.precision.coding import CodingDistance
from mecq_cli.precision.rounding import outputs_of, outputs_rounded, rounded
from mecq_cli.quantizers import quantizers_named
from mecq_cli.sites import ProductSite
from mecq_cli.sizes import totals
from mecq_cli.workflow.allot import tell

MAKE = quantizers_named("auto").weight
SHAPE = (1, 8, 8)


class Net(nn.Module):
    """A residual network that learns digits in a second."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.one = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.two = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8))
        self.down = nn.Sequential(
            nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU()
        )
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = F.relu(x + self.two(self.one(x)))
        found: Tensor = self.head(self.down(x).mean((2, 3)))
        return found


@pytest.fixture(scope="module")
def digits() -> tuple[QuantizedModel, Tensor]:
    """A trained network with quantizers, and images."""
    torch.manual_seed(0)
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.tensor(data.target)
    net = Net()
    optimizer = torch.optim.Adam(net.parameters(), 0.02)
    for _ in range(60):
        rows = torch.randint(0, len(images), (128,))
        loss = F.cross_entropy(net(images[rows]), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    net.eval()
    assert (net(images).argmax(1) == labels).float().mean() > 0.9
    model = insert(net, SHAPE, BitPlan(4, 4, quantizer="auto"), ("stages", "penultimate"))
    return model, images[:192]


@pytest.fixture(scope="module")
def choices(digits: tuple[QuantizedModel, Tensor]) -> list[Choice]:
    return choices_of(digits[0])


def test_first_and_last_layer_are_settled_and_rules_hold(
    digits: tuple[QuantizedModel, Tensor], choices: list[Choice]
) -> None:
    found = {choice.name: (choice.bits, choice.governed) for choice in choices}
    free = (CANDIDATES, True)
    end = ((8,), False)
    assert found == {"stem.0": end, "one.0": free, "two.0": free, "down.0": free, "head": end}
    ruled = {c.name: c.bits for c in choices_of(digits[0], ["t*"], (2, 3))}
    assert (ruled["two.0"], ruled["one.0"], ruled["stem.0"]) == ((4,), (2, 3), (8,))


@pytest.mark.parametrize("kind", SENSITIVITIES)
def test_they_fall_with_the_bits_and_leave_the_network_as_it_was(
    kind: Sensitivity, digits: tuple[QuantizedModel, Tensor], choices: list[Choice]
) -> None:
    model, images = digits
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with float_mode(model):
        outputs = outputs_of(model, images)
    found = measure(kind, model, images, choices, MAKE)
    assert found.keys() == {"one.0", "two.0", "down.0"}
    for name, costs in found.items():
        assert list(costs) == list(CANDIDATES)
        falling = list(costs.values())
        assert falling == sorted(falling, reverse=True), (name, costs)
        # A bit halves the step, and the cost is of second order: a quarter.
        assert costs[8] < costs[4] / 50 < costs[1] / 50
        assert costs[8] > 0
    assert measure(kind, model, images, choices, MAKE) == found
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with float_mode(model):
        for one, two in zip(outputs_of(model, images), outputs, strict=True):
            assert torch.equal(one, two)


def test_the_walk_gives_what_a_whole_pass_gives(
    digits: tuple[QuantizedModel, Tensor], choices: list[Choice]
) -> None:
    """Against a network whose weight is replaced, computed from its beginning."""
    model, images = digits
    sites = {site.name: site for site in model.sites()}
    walked = 0
    with float_mode(model):
        wanted = [choice for choice in choices if choice.open]
        for choice, bits, outputs in outputs_rounded(model, images, wanted, MAKE):
            weight = sites[choice.name].get_parameter("weight")
            kept = weight.detach().clone()
            with torch.no_grad():
                weight.copy_(rounded(weight, bits, MAKE))
                whole = outputs_of(model, images)
                weight.copy_(kept)
            for one, two in zip(outputs, whole, strict=True):
                torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)
            walked += 1
    assert walked == 3 * len(CANDIDATES)


def test_the_loss_is_the_divergence_of_the_outputs(
    digits: tuple[QuantizedModel, Tensor], choices: list[Choice]
) -> None:
    model, images = digits
    found = measure("loss", model, images, choices, MAKE)
    with float_mode(model), torch.no_grad():
        full = model(images).double().softmax(1)
        site = next(site for site in model.sites() if site.name == "down.0")
        weight = site.get_parameter("weight")
        kept = weight.clone()
        weight.copy_(rounded(weight, 2, MAKE))
        quantized = model(images).double().softmax(1)
        weight.copy_(kept)
    wanted = (full * (full / quantized).log()).sum(1).mean()
    assert found["down.0"][2] == pytest.approx(float(wanted), rel=1e-4)


def test_the_traces_are_those_of_the_hessian(
    digits: tuple[QuantizedModel, Tensor], choices: list[Choice], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All layers at once, against the whole matrix of each by automatic differentiation."""
    monkeypatch.setattr("mecq_cli.precision.hessian.ROUNDS", 400)
    model, images = digits
    images = images[:24]
    found = measure("hessian", model, images, choices, MAKE)
    sites = {site.name: site for site in model.sites()}
    for name in ("one.0", "two.0"):
        weight = sites[name].get_parameter("weight")
        with float_mode(model):
            goal: Tensor = model(images).softmax(1).detach()

            def loss(values: Tensor, goal: Tensor = goal, weight: Tensor = weight) -> Tensor:
                replaced = {f"graph.{path(model, weight)}": values}
                logits: Tensor = torch.func.functional_call(model, replaced, (images,))
                return -(goal * logits.log_softmax(1)).sum(1).mean()

            matrix = torch.autograd.functional.hessian(loss, weight.detach())
        count = weight.numel()
        trace = float(matrix.reshape(count, count).trace())
        error = float((rounded(weight, 2, MAKE) - weight.detach()).square().sum())
        assert trace > 0
        assert found[name][2] == pytest.approx(0.5 * trace / count * error, rel=0.1)


def test_signs_hardly_matter_for_which_layer_is_more_sensitive(
    digits: tuple[QuantizedModel, Tensor], choices: list[Choice]
) -> None:
    """What all layers have in common, as one image has that the network is unsure of, may vary."""
    model, images = digits
    costs = torch.tensor(
        [
            [c[2] for c in measure("hessian", model, images, choices, MAKE, seed=seed).values()]
            for seed in range(4)
        ]
    ).log()
    assert (costs - costs.mean(1, keepdim=True)).std(0).max() < 0.1


def path(model: QuantizedModel, weight: Tensor) -> str:
    return next(name for name, p in model.graph.named_parameters() if p is weight)


@pytest.mark.parametrize("kind", SENSITIVITIES)
def test_hard_gates_have_a_sensitivity(kind: Sensitivity) -> None:
    """PyTorch has no second derivative of a hard sigmoid."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.Hardsigmoid(), nn.Conv2d(8, 8, 3), nn.Hardswish(),
        nn.Flatten(), nn.Linear(128, 10),
    )  # fmt: skip
    model = insert(net.eval(), SHAPE, BitPlan(4, 4, quantizer="auto"), ("stages", "penultimate"))
    costs = measure(kind, model, torch.randn(32, *SHAPE), choices_of(model), MAKE)["2"]
    assert costs[1] > costs[4] > costs[8] > 0


def test_two_rows_have_no_geometry_and_that_is_said(
    digits: tuple[QuantizedModel, Tensor], choices: list[Choice]
) -> None:
    model, images = digits
    with pytest.raises(
        NumericError, match="coding: on 2 images rounding makes no difference in any"
    ):
        measure("coding", model, images[:2], choices, MAKE)
    measure("coding", model, images[:3], choices, MAKE)


class Told(Listener):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)


def with_rows(found: Allotment) -> QuantizeConfig:
    rows = [Allotted(layer=n, wbits=b, sensitivity=found.costs[n]) for n, b in found.bits.items()]
    return QuantizeConfig(model="m", data="d", wbits=3, abits=4, allotted=tuple(rows))


class Tied(nn.Module):
    """One convolution at three places, as a head that runs over a pyramid."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, width, 3, padding=1)
        self.shared = nn.Conv2d(width, width, 3, padding=1)
        self.other = nn.Conv2d(width, width, 3, padding=1)
        self.last = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.first, self.shared, self.shared, self.other, self.shared):
            x = F.relu(layer(x))
        found: Tensor = self.last(x.mean((2, 3)))
        return found


def test_a_layer_that_is_not_trained_is_measured_too(
    digits: tuple[QuantizedModel, Tensor],
) -> None:
    model, images = digits
    site = next(s for s in model.sites() if s.name.startswith("one"))
    assert isinstance(site, ProductSite)
    found = []
    for trained in (True, False):
        site.weight.requires_grad_(trained)
        found.append(measure("hessian", model, images[:32], choices_of(model), MAKE))
        assert site.weight.requires_grad is trained
    site.weight.requires_grad_(True)
    assert found[0] == found[1]


def test_a_weight_at_several_places_is_one_choice() -> None:
    torch.manual_seed(0)
    width = 24
    net, images = Tied(width).eval(), torch.randn(32, *SHAPE)
    plan = BitPlan(4, 4, quantizer="auto")
    choices = choices_of(insert(net, SHAPE, plan, ("stages", "penultimate")))
    shape = [(len(c.places), c.open) for c in choices]
    assert shape == [(1, False), (3, True), (1, True), (1, False)]
    weights = 9 * width**2
    kinds: tuple[Sensitivity, ...] = ("coding", "hessian", "loss")
    for kind in kinds:
        model = insert(net, SHAPE, plan, ("stages", "penultimate"))
        costs = measure(kind, model, images, choices, MAKE)
        assert costs.keys() == {"shared", "other"}
        found = allot(choices, costs, Target(3.0, None, ""))
        assert len(found.bits) == 4
        assert len({found.bits[place] for place in choices[1].places}) == 1
        assert found.bits["shared"] + found.bits["other"] == 6
        told = Told()
        tell(with_rows(found), model, told)
        assert [line.split()[:2] for line in told.lines[1:4]] == [
            [place, f"{weights:,}"] for place in choices[1].places
        ]
    # All places are rounded together: as a network is whose one weight is rounded.
    with float_mode(model):
        reference = outputs_of(model, images)
        for choice, bits, outputs in outputs_rounded(model, images, choices[1:2], MAKE):
            own = Tied(width).eval()
            own.load_state_dict(net.state_dict())
            with torch.no_grad():
                own.shared.weight.copy_(rounded(net.shared.weight, bits, MAKE))
                torch.testing.assert_close(outputs[0], own(images), rtol=1e-4, atol=1e-5)
            assert choice.name == "shared"
            assert not torch.equal(outputs[0], reference[0])
    both = insert(net, SHAPE, BitPlan(4, 4, quantizer="auto"), ())
    calibrate(both, iter([images]), 1)
    sizes = totals(integerize(both, SHAPE, {}), 0, 0)
    assert reached(both).bytes == sizes["ideal_bytes"]
    assert reached(both).average == 4
    assert reached(both).bytes < 2 * weights * 4 // 8 + 8 * 5 * width + 2000


def test_coding_sees_geometry_and_no_rotation() -> None:
    torch.manual_seed(1)
    rows, logits = torch.randn(64, 12, dtype=torch.float64), torch.zeros(64, 2)
    distance = CodingDistance((logits, rows), 0.06)
    permuted = rows[:, torch.randperm(12)] * torch.rand(12, dtype=torch.float64).add(0.5)
    assert distance((logits, rows)) == pytest.approx(0, abs=1e-9)
    assert distance((logits, permuted)) == pytest.approx(0, abs=1e-4)
    noise = torch.randn_like(rows)
    near, far = (distance((logits, rows + size * noise)) for size in (0.01, 0.1))
    assert 0 < near < far / 50


def test_a_tap_that_says_the_same_counts_once() -> None:
    torch.manual_seed(1)
    logits, a, b = torch.zeros(32, 2), torch.randn(32, 4), torch.randn(32, 6)
    other = torch.randn(32, 4)
    twice = CodingDistance((logits, b, a, a.clone()), 0.06)((logits, b, other, other))
    assert twice == CodingDistance((logits, b, a), 0.06)((logits, b, other))


def test_real_resnet20(some_images: Tensor, weights: Callable[[str], Path]) -> None:
    """Of the real network: falling from 1 to 8 bits in every layer, and the end is robust."""
    loaded = load_model("resnet20_cifar", checkpoint=weights("cifar10-resnet20-12fca82f.pth"))
    plan = BitPlan(4, 4, quantizer="auto")
    model = insert(loaded.module, (3, 32, 32), plan, ("stages", "penultimate"))
    wanted = [c for c in choices_of(model, candidates=(1, 2, 4, 8)) if "conv1" in c.name]
    for kind in ("coding", "loss"):
        found = measure(kind, model, some_images, wanted, MAKE)
        assert len(found) == 9
        for costs in found.values():
            assert list(costs.values()) == sorted(costs.values(), reverse=True)


@pytest.fixture(scope="module")
def some_images(request: pytest.FixtureRequest) -> Tensor:
    data = request.getfixturevalue("cifar10")
    loaded = load_model("resnet20_cifar", pretrained=False)
    dataset = dataset_of(open_split(str(data), "train"), loaded.preprocessing, list(range(10)))
    batch = next(iter(train_batches(dataset, batch_size=64, epoch=0, start_batch=0, workers=0)))
    return normalize(batch.images, loaded.preprocessing, torch.device("cpu"))
