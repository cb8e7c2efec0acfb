"""Our batch norm against PyTorch's."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from mecq_cli.normalization import Norm, batch_norm


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("dim", [2, 4])
def test_agrees_with_pytorch(dim: int, affine: bool, momentum: float | None) -> None:
    torch.manual_seed(0)
    kind = nn.BatchNorm1d if dim == 2 else nn.BatchNorm2d
    ours: Norm = kind(5, affine=affine, momentum=momentum)
    if affine:
        nn.init.normal_(ours.weight)
        nn.init.normal_(ours.bias)
    theirs = copy.deepcopy(ours)
    for _ in range(3):
        x = torch.randn((7, 5, 4, 3)[:dim]) * 3 + 2
        upstream = torch.randn_like(x)
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, z = batch_norm(ours, a), theirs(b)
        torch.testing.assert_close(y, z, rtol=1e-5, atol=1e-5)
        y.backward(upstream)
        z.backward(upstream)
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-4, msg=name)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())


def test_a_mean_far_from_zero_does_not_swallow_the_variance() -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(2)
    x = torch.randn(64, 2, 16, 16) + 3000.0
    for _ in range(100):  # the running mean gets there
        out = batch_norm(norm, x)
    exact = (x.double() - x.double().mean((0, 2, 3), keepdim=True)) / x.double().std(
        (0, 2, 3), keepdim=True, unbiased=False
    )
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=2e-3)
