"""The first steps are the best of their kind."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mecq_cli.quantizers.search import CANDIDATES, best_activation_grid


def _error(values: Tensor, scale: float, zero_point: int, qmax: int) -> float:
    q = torch.clamp(torch.round(values / scale) + zero_point, 0, qmax)
    return float(((q - zero_point) * scale - values).square().sum())


def _samples() -> dict[str, Tensor]:
    torch.manual_seed(0)
    normal = torch.randn(4000)
    return {
        "a gate that is hardly trained": torch.sigmoid(0.2 * normal),
        "a gate that is open": torch.sigmoid(4 + normal),
        "after a ReLU": normal.relu(),
        "with negative values": 3 * normal,
        "a constant": torch.full((500,), 0.9),
    }


@pytest.mark.parametrize("name", _samples())
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_no_other_power_of_two_is_better(name: str, bits: int) -> None:
    values, qmax = _samples()[name], 2**bits - 1
    scale, zero_point = best_activation_grid(values, qmax, True)
    least = min(_error(values, 2.0**e, zero_point, qmax) for e in range(-24, 8))
    assert _error(values, scale, zero_point, qmax) <= least * (1 + 1e-6)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("name", ["gelu", "silu", "one far off", "skewed"])
def test_no_other_zero_point_is_better(name: str, bits: int) -> None:
    """Of all on all steps that are tried; what is not worth a level gets none."""
    torch.manual_seed(0)
    normal, qmax = torch.randn(20_000), 2**bits - 1
    values = {
        "gelu": torch.nn.functional.gelu(normal),
        "silu": torch.nn.functional.silu(3 * normal),
        "one far off": torch.cat([normal, torch.tensor([12.0])]),
        "skewed": normal.exp() - 1.2,
    }[name]
    scale, zero_point = best_activation_grid(values, qmax, False)
    span = float(values.max() - values.min())
    steps = [span * i / CANDIDATES / qmax for i in range(1, CANDIDATES + 1)]
    least = min(_error(values, step, z, qmax) for step in steps for z in range(qmax + 1))
    assert _error(values, scale, zero_point, qmax) <= least * 1.001
    if name == "gelu" and bits == 2:
        assert zero_point == 0


def test_a_gate_is_not_clipped_in_its_middle() -> None:
    values = _samples()["a gate that is hardly trained"]
    scale, zero_point = best_activation_grid(values, 255, True)
    assert zero_point == 0
    assert float((values > 255.5 * scale).float().mean()) < 0.01
