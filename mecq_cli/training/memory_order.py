"""Updates read weights in the order they lie in memory.

Where the channels of a pixel lie side by side, so do those of the weights (channels_last). A fused
update of PyTorch on a CPU copies gradients of that kind first, which takes as long as the update
itself. Seen as [O, H, W, I] the same numbers are in order, and to an update of each element by
itself, as SGD's and Adam's are, the shape is all the same.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class InMemoryOrder:
    """A context for an update: ``with order: optimizer.step()``.

    Inside of it weights of an order of their own, their gradients and what the optimizer remembers
    of them have their dimensions in the order of memory; behind it all are as they were. Nothing is
    copied, but a gradient whose order differs from its weight's.

    Args:
        optimizer: which updates each element by itself.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.orders: dict[nn.Parameter, tuple[int, ...]] = {}
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            if parameter.device.type == "cpu" and not parameter.is_contiguous():
                strides = parameter.stride()
                order = tuple(sorted(range(parameter.dim()), key=lambda d: -strides[d]))
                if parameter.permute(order).is_contiguous():
                    self.orders[parameter] = order

    def __enter__(self) -> None:
        for parameter, order in self.orders.items():
            self._turn(parameter, order)

    def __exit__(self, *_: object) -> None:
        for parameter, order in self.orders.items():
            self._turn(parameter, tuple(order.index(d) for d in range(len(order))), back=True)

    def _turn(self, parameter: nn.Parameter, order: tuple[int, ...], *, back: bool = False) -> None:
        shape, gradient = parameter.shape, parameter.grad
        state = self.optimizer.state.get(parameter, {})
        parameter.grad = None
        parameter.data = parameter.data.permute(order)
        if gradient is not None:
            turned = gradient.permute(order)
            parameter.grad = turned if back else turned.contiguous()
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == shape:
                state[name] = value.permute(order)
