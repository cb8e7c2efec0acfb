"""A GPU that is not there: tensors that have its device and a shape, but no values.

PyTorch calls them fake tensors. Autograd asks for a real GPU where a gradient passes through them,
so a backward pass cannot be tried on them.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

READ = "_local_scalar_dense"
WAITING = (READ, "nonzero", "equal", "is_nonzero")


class Watch(TorchDispatchMode):
    """Counts operations whose answer a GPU is waited for; ``answer`` is that of simulated ones."""

    def __init__(self, *, answer: float | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.answer = answer
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = function.overloadpacket.__name__
        self.found[name] += name in WAITING
        if name == READ and self.answer is not None:
            return bool(self.answer) if args[0].dtype == torch.bool else self.answer
        return function(*args, **(kwargs or {}))


def put_on_gpu(module: nn.Module, simulated: FakeTensorMode) -> None:
    """Replace all tensors; what several modules share stays shared."""
    moved: dict[int, Any] = {}
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in moved:
                    plain = tensor.detach()
                    with simulated:
                        fake: Tensor = simulated.from_tensor(plain).to("cuda")
                        if isinstance(tensor, nn.Parameter):
                            fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
                    moved[id(tensor)] = fake
                tensors[name] = moved[id(tensor)]
