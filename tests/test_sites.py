"""Each operation on its own: real values in training, integers in evaluation, one function."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mecq_cli.insertion import BitPlan, QuantizedModel
from mecq_cli.kernels import dequantize
from mecq_cli.quantizers import LsqActivation, LsqWeight
from mecq_cli.quantizers.soft_ends import SoftEndsActivation
from mecq_cli.sites import AddSite, DropoutSite, ProductSite, Site
from tests.exactness import float_network, quantized, random_images

PLANS = [BitPlan(2, 2), BitPlan(1, 1), BitPlan(8, 8), BitPlan(3, 5)]


def inputs_of(network: QuantizedModel, images: Tensor) -> dict[str, tuple[Tensor, ...]]:
    """What each site reads in evaluation."""
    seen: dict[str, tuple[Tensor, ...]] = {}

    def keep(module: nn.Module, arguments: Any) -> None:
        assert isinstance(module, Site)
        seen[module.name] = arguments

    handles = [site.register_forward_pre_hook(keep) for site in network.sites()]
    network.eval()(images)
    for handle in handles:
        handle.remove()
    return seen


@torch.no_grad()
@pytest.mark.parametrize("plan", PLANS, ids=lambda p: f"w{p.wbits}a{p.abits}")
@pytest.mark.parametrize("name", ["resnet20_cifar", "torchvision/squeezenet1_0"])
def test_training_and_evaluation_compute_the_same(name: str, plan: BitPlan) -> None:
    """From the same inputs a site comes to the same integers, but for the rounding of its bias."""
    size = 32 if name == "resnet20_cifar" else 64
    images = random_images(4, size)
    network = quantized(float_network(name, size), plan, images)
    seen = inputs_of(network, images)
    off = total = 0
    biases = 0
    for site in network.sites():
        integers = site.eval()(*seen[site.name])
        real = [
            x if grid is None else dequantize(x, grid)
            for x, grid in zip(seen[site.name], site.source_grids(), strict=True)
        ]
        site.train()
        for module in site.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        if isinstance(site, DropoutSite):
            continue
        values = site(*real)
        grid = site.output_grid()
        if grid is None:
            torch.testing.assert_close(values, integers, rtol=0, atol=0.02 * float(integers.std()))
            continue
        trained = values / grid.scale + grid.zero_point
        torch.testing.assert_close(trained, trained.round(), rtol=0, atol=1e-3)
        steps = (trained.round() - integers).abs()
        allowed = torch.ones(1)
        if isinstance(site, ProductSite):
            (source,) = site.source_grids()
            if source is not None:  # the bias is rounded to the unit of the sums
                scales = np.abs(site.node(("x",)).tensors["weight_scale"])
                unit = torch.from_numpy(scales * np.float32(source.scale / grid.scale))
                allowed = (unit * 0.5 + 1).reshape(-1, *[1] * (steps.dim() - 2))
                biases += 1
        else:
            off, total = off + int(steps.sum()), total + steps.numel()
        assert bool((steps <= allowed).all()), site.name
    assert biases >= 19
    assert off <= 1e-4 * total, (off, total)


def product(wbits: int, gamma: list[float], source: LsqActivation | None) -> ProductSite:
    torch.manual_seed(0)
    module = nn.Conv2d(3, len(gamma), 3, padding=1, bias=False)
    norm = nn.BatchNorm2d(len(gamma)).eval()
    with torch.no_grad():
        norm.weight.copy_(torch.tensor(gamma))
        norm.bias.copy_(torch.linspace(-1, 1, len(gamma)))
        assert norm.running_mean is not None
        norm.running_mean.normal_(0, 0.1)
    weights = None
    if wbits != 32:
        weights = LsqWeight(wbits, len(gamma))
        weights.initialize(module.weight)
    attributes = {"stride": [1, 1], "padding": [1] * 4, "dilation": [1, 1], "groups": 1}
    return ProductSite(
        "c", [source], None, None, module=module, attributes=attributes, norm=norm,
        weight_quantizer=weights,
    )  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("wbits", [1, 2, 8, 32])
@pytest.mark.parametrize("integer", [True, False])
def test_batch_norms_of_any_sign_and_size(wbits: int, integer: bool) -> None:
    """Gammas that are negative, zero, or so small that the bias would leave int32."""
    source = None
    if integer and wbits == 32:
        pytest.skip("float weights read floats")
    x = torch.randint(0, 16, (2, 3, 8, 8)).float()
    if integer:
        source = LsqActivation(4)
        source.initialize(x * 0.25)
        source.scale.fill_(0.25)
    site = product(wbits, [1.0, -1.0, 0.0, 1e-9, -1e-12, 1e-38, 3.0], source)
    site.train()
    assert site.norm is not None
    site.norm.eval()
    wanted = site(x * 0.25)
    got = site.eval()(x) if integer else site(x * 0.25)
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=0.05 if integer else 1e-5)
    tensors = site.node(("x",)).tensors
    assert np.all(tensors["weight_scale"] != 0)
    assert np.isfinite(tensors["weight_scale"]).all()
    if wbits == 1:
        assert set(np.unique(tensors["weight"])) == {-1, 1}


def test_dropout_is_nothing_in_evaluation() -> None:
    site = DropoutSite("d", [None], 0.5)
    x = torch.ones(1000)
    assert torch.equal(site.eval()(x), x)
    assert 300 < int((site.train()(x) == 0).sum()) < 700


@pytest.mark.parametrize("ceiling", [math.inf, 6.0])
def test_an_activation_leaves_zero_to_a_grid_that_clips_there(ceiling: float) -> None:
    """So that a quantizer whose gradient ends softly lets it through below, too."""
    quantizer = SoftEndsActivation(2)
    with torch.no_grad():
        quantizer.begin(3.0)  # levels of 0, 3, 6, 9
    site = AddSite("add", [None, None], quantizer, ceiling).train()
    x = torch.tensor([-1.6, -0.75, 0.0, 1.0, 5.5, 6.5, 7.0], requires_grad=True)
    out = site(x, torch.zeros_like(x))
    out.sum().backward()
    assert out.tolist() == [0, 0, 0, 0, 6, 6, 6]
    inside = [0.0, 0.25, 0.5, 0.5 + 1 / 3, 1.0]
    above = [1.0, 1.0] if math.isinf(ceiling) else [0.0, 0.0]
    torch.testing.assert_close(x.grad, torch.tensor(inside + above))


def test_whole_channels_are_dropped() -> None:
    torch.manual_seed(0)
    site = DropoutSite("drop", [None], 0.5, axes=2).train()
    means = site(torch.ones(8, 16, 3, 5)).mean((2, 3))
    assert {*means.flatten().tolist()} == {0.0, 2.0}
    images = DropoutSite("drop", [None], 0.5, axes=1).train()(torch.ones(64, 16, 3))
    assert {*images.mean((1, 2)).tolist()} == {0.0, 2.0}
