"""First steps fit what flows through a network, and batch norms are measured anew."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mecq_cli import calibration
from mecq_cli.calibration import calibrate, reestimate_batch_norm
from mecq_cli.errors import NumericError
from mecq_cli.insertion import BitPlan, insert
from mecq_cli.quantizers import ActivationQuantizer, LsqActivation
from mecq_cli.sites import ProductSite
from tests.exactness import float_network, random_images

SHAPE = (3, 32, 32)


@torch.no_grad()
@pytest.mark.parametrize(("bits", "error"), [(8, 0.05), (4, 0.4)])
def test_a_calibrated_network_follows_the_float_one(bits: int, error: float) -> None:
    model = float_network("resnet20_cifar", 32).eval()
    images = random_images(16, 32)
    network = insert(model, SHAPE, BitPlan(8, bits))
    before = {name: p.clone() for name, p in network.named_parameters() if "scale" not in name}
    calibrate(network, images.split(4), 4)
    wanted, got = model(images), network.eval()(images)
    assert float((got - wanted).norm() / wanted.norm()) < error
    for name, p in network.named_parameters():
        if name in before:
            assert torch.equal(p, before[name]), name
    for module in network.modules():
        if isinstance(module, ActivationQuantizer):
            assert module.active
            grid = module.grid()
            assert 0 <= grid.zero_point <= grid.qmax == 2**module.bits - 1


@pytest.mark.parametrize(("power_of_two", "scale"), [(False, 1 / 15), (True, 1 / 16)])
def test_a_dead_activation_gets_a_grid_that_serves_when_it_wakes(
    power_of_two: bool, scale: float
) -> None:
    """The error is 0 at any step; the smallest one would clip all that comes later."""
    quantizer = LsqActivation(4, power_of_two=power_of_two)
    quantizer.initialize(torch.zeros(100))
    grid = quantizer.grid()
    assert grid.scale == pytest.approx(scale)
    assert grid.zero_point == 0


def test_values_that_are_not_finite_name_the_layer() -> None:
    model = float_network("resnet20_cifar", 32)
    with torch.no_grad():
        model.layer2[0].conv1.weight[0, 0, 0, 0] = float("nan")  # type: ignore[union-attr, index]
    network = insert(model, SHAPE, BitPlan(32, 4))
    with pytest.raises(NumericError, match=r"layer layer2\.0\.conv1\S* .*NaN or Inf"):
        calibrate(network, [random_images(2, 32)], 1)


def test_a_network_without_statistics_is_calibrated_by_those_of_the_batches() -> None:
    """Else its values fade from layer to layer, the grids with them, and gradients overflow."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(3, 8, 1)]
    for _ in range(6):
        convolution = nn.Conv2d(8, 8, 1, bias=False)
        nn.init.normal_(convolution.weight, std=0.02)
        layers += [convolution, nn.BatchNorm2d(8), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * 64, 5))
    network = insert(model, (3, 8, 8), BitPlan(8, 8))
    images = random_images(16, 8)
    calibrate(network, [images], 1, to_be_trained=True)

    def largest(of: nn.Module) -> float:
        of.zero_grad()
        of.train()(images).square().sum().backward()
        return max(float(p.grad.abs().max()) for p in model.parameters() if p.grad is not None)

    assert 0.3 < largest(network) / largest(model) < 3.0
    calibrate(network, [images[:1]], 1, to_be_trained=True)  # one image has no statistics


@torch.no_grad()
def test_statistics_are_the_average_over_the_batches() -> None:
    network = insert(float_network("resnet20_cifar", 32), SHAPE, BitPlan(4, 4))
    batches = random_images(12, 32).split(4)
    calibrate(network, batches, 3)
    norm = next(m for m in network.modules() if isinstance(m, nn.BatchNorm2d))
    means, variances = [], []

    def keep(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        means.append(inputs[0].mean((0, 2, 3)))
        variances.append(inputs[0].var((0, 2, 3)))

    handle = norm.register_forward_pre_hook(keep)
    network.eval()
    assert reestimate_batch_norm(network, batches) == 3
    handle.remove()
    assert not network.training
    assert norm.momentum == 0.1
    assert norm.running_mean is not None
    assert norm.running_var is not None
    torch.testing.assert_close(norm.running_mean, torch.stack(means).mean(0))
    torch.testing.assert_close(norm.running_var, torch.stack(variances).mean(0))

    statistics = norm.running_mean.clone()
    assert reestimate_batch_norm(network, []) == 0
    assert torch.equal(norm.running_mean, statistics)


def test_a_trained_network_is_calibrated_as_it_is_rounded() -> None:
    plan = BitPlan(1, 1)
    images = random_images(8, 32)
    steps = []
    for factor, mean in ((1.0, 0.0), (30.0, 5.0)):
        network = insert(float_network("resnet20_cifar", 32), (3, 32, 32), plan)
        for site in network.sites():
            if isinstance(site, ProductSite) and site.weight_quantizer is not None:
                site.weight_quantizer.initialize(site.weight)
                if site.wbits == 1:  # where only signs count
                    site.weight.data.mul_(factor)
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
                module.running_mean.fill_(mean)
        before = {name: value.clone() for name, value in network.named_buffers()}
        calibrate(network, images.split(4), 2, to_be_trained=True, trained=True)
        for name, value in network.named_buffers():
            assert torch.equal(value, before[name]) or "running" not in name, name
        found = [site.output_quantizer for site in network.sites()]
        steps.append(torch.stack([q.effective_scale() for q in found if q is not None]))
    torch.testing.assert_close(steps[0], steps[1])


def test_a_sample_is_kept_without_what_it_was_taken_from() -> None:
    """The activations of all calibration images would not fit a GPU."""
    quantizer = LsqActivation(4)
    samples: dict[ActivationQuantizer, list[torch.Tensor]] = {}
    with calibration._listening(quantizer, samples, share=100):
        quantizer.active = False
        quantizer(torch.rand(4, 16, 32, 32))
    (sample,) = samples[quantizer]
    assert 50 < sample.numel() < 110
    assert sample.untyped_storage().nbytes() == 4 * sample.numel()


def test_every_channel_is_seen_whatever_their_number() -> None:
    """Of 197 tokens of 768 channels a step of 387 would see every third one."""

    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(8, 768), nn.Linear(768, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.last(torch.relu(self.first(x.flatten(2).transpose(1, 2))))
            return found.mean(1)

    for channel in (98, 99, 100):
        torch.manual_seed(0)
        net = Wide()
        with torch.no_grad():
            net.first.weight[channel] *= 50
            net.first.bias[channel] = 30.0
        network = insert(net, (8, 197, 1), BitPlan(8, 8), ())
        calibrate(network, torch.randn(512, 8, 197, 1).split(32), 16)
        ends = [
            float(m.grid().scale) * m.grid().qmax
            for m in network.modules()
            if isinstance(m, ActivationQuantizer)
        ]
        assert max(ends) > 25, channel
