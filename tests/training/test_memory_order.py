"""An update in the order of memory is the same update, and leaves everything as it found it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from mecq_cli.training.memory_order import InMemoryOrder

SHAPE = (6, 5, 3, 3)


def trained(optimizer: type[torch.optim.Optimizer], ordered: bool, **settings: Any) -> Any:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(SHAPE).to(memory_format=torch.channels_last))
    vector = nn.Parameter(torch.randn(5))
    made = optimizer([weight, vector], **settings)
    context = InMemoryOrder(made)
    assert list(context.orders) == [weight]
    for k in range(4):
        weight.grad, vector.grad = torch.randn(SHAPE), torch.randn(5)
        if k % 2:  # of either order, whatever the weight's is
            weight.grad = weight.grad.contiguous(memory_format=torch.channels_last)
        gradient = weight.grad
        if ordered:
            with context:
                assert weight.is_contiguous()
                made.step()
        else:
            made.step()
        assert weight.shape == SHAPE
        assert weight.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(weight.grad, gradient, rtol=0, atol=0)
    return [weight.detach(), vector.detach()], made.state_dict()


@pytest.mark.parametrize(
    ("optimizer", "settings"),
    [
        (torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.1, "nesterov": True}),
        (torch.optim.AdamW, {"weight_decay": 0.1}),
    ],
)
def test_the_update_is_that_of_one_element_after_the_other(
    optimizer: type[torch.optim.Optimizer], settings: dict[str, Any]
) -> None:
    plain, state = trained(optimizer, ordered=False, lr=0.1, foreach=False, **settings)
    ordered, same = trained(optimizer, ordered=True, lr=0.1, fused=True, **settings)
    torch.testing.assert_close(ordered, plain)
    for mine, theirs in zip(same["state"].values(), state["state"].values(), strict=True):
        assert mine.keys() == theirs.keys()
        for name in mine:
            assert mine[name].shape == theirs[name].shape
            torch.testing.assert_close(mine[name], theirs[name])


def test_an_update_that_fails_leaves_the_shapes() -> None:
    weight = nn.Parameter(torch.randn(SHAPE).to(memory_format=torch.channels_last))
    weight.grad = torch.ones_like(weight)
    with pytest.raises(KeyboardInterrupt), InMemoryOrder(torch.optim.SGD([weight], 0.1)):
        raise KeyboardInterrupt
    assert weight.shape == weight.grad.shape == SHAPE
