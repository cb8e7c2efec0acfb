"""Grids without zero in networks: where values of several kinds share one, or are read twice."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mecq_cli.calibration import calibrate
from mecq_cli.insertion import BitPlan, QuantizedModel, insert
from mecq_cli.integer.validate import validate
from mecq_cli.integerize import integerize
from mecq_cli.report.layers import Watched

IMAGES = torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def block(inputs: int, outputs: int, *, relu: bool = True) -> nn.Sequential:
    layers = [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs)]
    return nn.Sequential(*layers, *([nn.ReLU()] if relu else []))


def scaled(norm: nn.BatchNorm2d, factor: float) -> nn.BatchNorm2d:
    nn.init.constant_(norm.weight, factor)
    return norm


class Joined(nn.Module):
    """Blocks, a concatenation, a head. What is joined is left to the kind."""

    channels = 48

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.signed = block(3, 8), block(8, 8, relu=False)
        self.wide = block(8, 40, relu=False)
        self.head, self.fc = block(self.channels, 8), nn.Linear(8, 4)

    def joined(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.head(self.joined(self.stem(x))).mean((2, 3)))
        return logits


class ResidualAndSigned(Joined):
    """A sum that is never negative, whose integers begin above the thresholds."""

    def __init__(self) -> None:
        super().__init__()
        self.wide.add_module("1", scaled(nn.BatchNorm2d(40), 3.0))

    def joined(self, x: Tensor) -> Tensor:
        x = torch.relu(x + self.signed(x))
        return torch.cat([x, self.wide(x)], 1)


class ReluAndWhatItRead(Joined):
    """A ReLU of its own, on a grid with negative values. (At 2 bits so many zeros want one.)"""

    channels = 56

    def joined(self, x: Tensor) -> Tensor:
        y = self.signed(x)
        return torch.cat([torch.relu(y), y, self.wide(x)], 1)


class ReadTwice(Joined):
    """By the concatenation and, on a finer grid, by a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.wide.add_module("1", scaled(nn.BatchNorm2d(40), 0.2))

    def joined(self, x: Tensor) -> Tensor:
        x = self.signed(x)
        return torch.cat([x, self.wide(x)], 1)


class Padded(Joined):
    """Zeros around, which are none of the codes."""

    def joined(self, x: Tensor) -> Tensor:
        x = self.signed(x)
        padded = nn.functional.pad(x, (3, 3, 3, 3))[:, :, 1:-1, 1:-1]
        return torch.cat([padded, nn.functional.pad(self.wide(x), (2, 2, 2, 2))], 1)


def quantized(kind: type[Joined], abits: int) -> QuantizedModel:
    torch.manual_seed(0)
    net = kind().train()
    for _ in range(20):
        net(IMAGES)
    model = insert(net.eval(), (3, 16, 16), BitPlan(2, abits, quantizer="auto"))
    calibrate(model, [IMAGES], 1)
    return model


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "abits"),
    [
        (ResidualAndSigned, 1),
        (ReluAndWhatItRead, 1),
        (ReadTwice, 1),
        (ReadTwice, 2),
        (Padded, 1),
        (Padded, 2),
    ],
)
def test_training_and_integers_have_the_same_values(kind: type[Joined], abits: int) -> None:
    model = quantized(kind, abits)
    validate(integerize(model, (3, 16, 16), {}))
    seen: dict[bool, dict[str, Tensor]] = {True: {}, False: {}}
    for training in (True, False):
        model.train(training)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        hooks = [
            site.register_forward_hook(
                lambda site, _, out, values=seen[training]: values.__setitem__(site.name, out)
            )
            for site in model.sites()
        ]
        model(IMAGES[:8])
        for hook in hooks:
            hook.remove()
    grids = {s.name: s.output_quantizer.grid() for s in model.sites() if s.output_quantizer}
    assert any(grid.spacing == 2 for grid in grids.values())
    for name, grid in grids.items():
        if grid.bits > 2 or "head" in name:
            continue  # biases are rounded to integers, which is felt behind all thresholds
        real = (seen[False][name] - grid.zero_point) * grid.scale
        unequal = (real - seen[True][name]).abs() > 1e-3
        assert float(unequal.float().mean()) < 0.01, name


def test_a_report_counts_codes_and_neither_padding_nor_the_grid_of_thresholds() -> None:
    model = integerize(quantized(Padded, 2), (3, 16, 16), {})
    watched = Watched(model)
    watched.see(IMAGES[:8])
    pads = [n for n in model.nodes if n.op == "pad" and n.grid is not None and n.grid.spacing == 2]
    assert pads
    by_name = {node.name: node for node in model.nodes}
    for pad in pads:
        codes, source = watched.codes[pad.name], watched.codes[pad.inputs[0]]
        assert codes.counts.tolist() == source.counts.tolist()
        assert len(codes.counts) == 4
        assert codes.spacing == 2
    for node in model.nodes:
        if node.op == "threshold":
            assert watched.codes[by_name[node.name].inputs[0]].clipped is None
