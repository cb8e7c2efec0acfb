"""A GPU that is not there: tensors that have its device and a shape, but no values.

PyTorch calls them fake tensors. Autograd asks for a real GPU where a gradient passes through them,
so a backward pass is tried on PyTorch's device "meta" instead, which has no values either.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
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
    _replace(module, lambda tensor: simulated.from_tensor(tensor).to("cuda"), simulated)


def put_on_meta(module: nn.Module) -> None:
    """Replace all tensors by those of the device that PyTorch has for tensors without values."""
    _replace(module, lambda tensor: tensor.to("meta"), nullcontext())


def _replace(
    module: nn.Module, moved: Callable[[Tensor], Tensor], within: AbstractContextManager[object]
) -> None:
    """What several modules share stays shared; ``within`` is where the new ones are made."""
    known: dict[int, tuple[Tensor, Tensor]] = {}
    for part in module.modules():
        both: list[dict[str, Any]] = [part._parameters, part._buffers]
        for tensors in both:
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in known:
                    bare = tensor.detach()
                    with within:
                        fresh = moved(bare)
                        if isinstance(tensor, nn.Parameter):
                            fresh = nn.Parameter(fresh, requires_grad=tensor.requires_grad)
                    known[id(tensor)] = tensor, fresh
                tensors[name] = known[id(tensor)][1]
