"""A GPU that is not there: tensors that have its device and a shape, but no values.

PyTorch calls them fake tensors. Autograd asks for a real GPU where a gradient passes through them,
so a backward pass is tried on PyTorch's device "meta" instead, which has no values either.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

READ = "_local_scalar_dense"
WAITING = (READ, "nonzero", "equal", "is_nonzero")


class Watch(TorchDispatchMode):
    """Counts what a GPU is waited for: answers that are read, copies to it.

    Of simulated tensors the answer is ``answer``. A list is read at once, though one of simulated
    tensors is read number by number.
    """

    def __init__(self, *, answer: float | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.answer = answer
        self.found: Counter[str] = Counter()

    def __enter__(self) -> Watch:
        self._tolist = Tensor.tolist

        def counted(tensor: Tensor) -> Any:
            self.found["tolist"] += 1
            return self._tolist(tensor)

        Tensor.tolist = counted  # type: ignore[assignment, method-assign]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        Tensor.tolist = self._tolist  # type: ignore[method-assign]

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = function.overloadpacket.__name__
        self.found[name] += name in WAITING
        if name == "_to_copy" and args[0].device.type == "cpu":
            self.found["copy to the device"] += str((kwargs or {}).get("device", "cpu")) != "cpu"
        if name == READ and self.answer is not None:
            return bool(self.answer) if args[0].dtype == torch.bool else self.answer
        return function(*args, **(kwargs or {}))


def put_on_gpu(module: nn.Module, simulated: FakeTensorMode) -> None:
    """Replace all tensors by those of a simulated GPU."""

    def moved(tensor: Tensor) -> Tensor:
        plain = tensor.detach()
        with simulated:
            fake: Tensor = simulated.from_tensor(plain).to("cuda")
            if isinstance(tensor, nn.Parameter):
                fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
        return fake

    _replace(module, moved)


def put_on_meta(module: nn.Module) -> None:
    """Replace all tensors by those of the device that PyTorch has for tensors without values."""

    def moved(tensor: Tensor) -> Tensor:
        bare = tensor.detach().to("meta")
        if isinstance(tensor, nn.Parameter):
            bare = nn.Parameter(bare, requires_grad=tensor.requires_grad)
        return bare

    _replace(module, moved)


def _replace(module: nn.Module, moved: Callable[[Tensor], Tensor]) -> None:
    """What several modules share stays shared."""
    known: dict[int, tuple[Tensor, Tensor]] = {}
    for part in module.modules():
        both: list[dict[str, Any]] = [part._parameters, part._buffers]
        for tensors in both:
            for name, tensor in tensors.items():
                if tensor is not None:
                    if id(tensor) not in known:
                        known[id(tensor)] = tensor, moved(tensor)
                    tensors[name] = known[id(tensor)][1]
