"""Networks with functions, gates and batch norms of all kinds go all the way at all bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mecq_cli.insertion import BitPlan
from mecq_cli.integerize import integerize
from tests.exactness import quantized, random_images, relative_error, taken_all_the_way


class Absolute(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.abs()


class Functions(nn.Module):
    """Each function behind a convolution, as a gate, and in a residual branch."""

    def __init__(self) -> None:
        super().__init__()
        functions = [
            *(nn.SiLU(), nn.GELU(), nn.GELU("tanh"), nn.Sigmoid(), nn.Tanh(), nn.Hardswish()),
            *(nn.Hardsigmoid(), nn.LeakyReLU(0.2), nn.ELU(), nn.Mish(), nn.Softplus()),
            *(nn.Hardtanh(-2.0, 3.0), Absolute()),
        ]
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), f) for f in functions
        )
        self.norm = nn.BatchNorm2d(8)
        self.squeeze = nn.Sequential(nn.Conv2d(8, 4, 1), nn.ReLU(), nn.Conv2d(4, 8, 1))
        self.head = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.BatchNorm1d(16), nn.Linear(16, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x - 0.5 * block(x)
        x = torch.relu(self.norm(x))
        x = x * torch.sigmoid(self.squeeze(x.mean((2, 3), keepdim=True)))
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


@pytest.mark.parametrize(
    "plan",
    [BitPlan(4, 4), BitPlan(2, 8), BitPlan(8, 32), BitPlan(4, 4, residual_bits=32), BitPlan(32, 4)],
    ids=["W4A4", "W2A8", "W8A32", "residual in float", "W32A4"],
)
def test_every_function_goes_all_the_way(plan: BitPlan, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network, images = Functions().eval(), random_images(4, 16)
    model, error = taken_all_the_way(network, plan, images, tmp_path)
    operations = {node.op for node in integerize(model, (3, 16, 16), {}).nodes}
    assert ("function" if plan.abits == 32 else "lookup") in operations
    if plan.wbits == 8:  # floats otherwise: little is lost
        assert error < 0.1


def test_8_bits_are_close_to_float() -> None:
    torch.manual_seed(0)
    network, images = Functions().eval(), random_images(16, 16)
    with torch.no_grad():
        expected = network(images)
    got = quantized(network, BitPlan(8, 8), images)(images)
    assert relative_error(got, expected) < 0.25
