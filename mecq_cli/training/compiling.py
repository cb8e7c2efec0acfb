"""torch.compile where it works, and the plain network with one line of warning where not."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch._functorch.config
from torch import nn
from torch._dynamo.exc import TorchDynamoException
from torch._inductor.exc import InductorError

from mecq_cli.errors import first_line
from mecq_cli.events import Listener
from mecq_cli.quantizers import Kernels, Quantizer


class Compiler:
    """Compiles functions at their first call, as long as that works.

    A compiler that is missing or fails is not the user's problem: from then on every function
    runs as it is, slower, and the listener hears of it once.
    """

    def __init__(self, listener: Listener) -> None:
        self.listener, self.works = listener, True
        _keep_programs()

    def compiled(
        self, function: Callable[..., Any], *, dynamic: bool = False
    ) -> Callable[..., Any]:
        """``function``, faster.

        Args:
            function: of tensors.
            dynamic: one program for all shapes. Else there is one for each: a run has one batch
                size, and a last smaller batch.
        """
        fast = torch.compile(function, dynamic=dynamic)

        def call(*arguments: Any) -> Any:
            if not self.works:
                return function(*arguments)
            try:
                with _quiet():
                    return fast(*arguments)
            except (TorchDynamoException, InductorError) as error:
                self.works = False
                self.listener.warn(
                    f"torch.compile does not work here ({first_line(error)}); going on without it"
                )
                return function(*arguments)

        return call

    def quantizers(self, model: nn.Module) -> None:
        """Let the quantizers of a model round by one program for all layers of an algorithm."""
        fast: dict[Kernels, Kernels] = {}

        def quicker(kernels: Kernels) -> Kernels:
            if kernels not in fast:
                forward, backward, _ = kernels
                fast[kernels] = Kernels(
                    self.compiled(forward, dynamic=True),
                    self.compiled(backward, dynamic=True),
                    dense=True,
                )
            return fast[kernels]

        for module in model.modules():
            if isinstance(module, Quantizer):
                module.quicken(quicker)


def _keep_programs() -> None:
    """Let PyTorch keep programs with gradients of their own on disk, too, as it keeps the others.

    A run that goes on, or a second one of the same settings, then begins within seconds. The key of
    a program holds the code of these gradients; PyTorch leaves it off since it is new.
    """
    name = "autograd_cache_allow_custom_autograd_functions"
    if hasattr(torch._functorch.config, name):
        setattr(torch._functorch.config, name, True)


class _quiet:
    """No advice of the compiler's on the terminal."""

    def __enter__(self) -> None:
        self._filters = warnings.catch_warnings()
        self._filters.__enter__()
        warnings.simplefilter("ignore")
        self._levels = {
            name: logging.getLogger(name).level
            for name in ("torch._dynamo", "torch._inductor", "torch.utils.cpp_extension")
        }
        for name in self._levels:
            logging.getLogger(name).setLevel(logging.ERROR)

    def __exit__(self, *_: object) -> None:
        self._filters.__exit__(None, None, None)
        for name, level in self._levels.items():
            logging.getLogger(name).setLevel(level)
