"""torch.compile where it works, and the plain network with one line of warning where not."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch._dynamo.exc import TorchDynamoException
from torch._inductor.exc import InductorError

from mecq_cli.events import Listener


def compiled(function: Callable[..., Any], listener: Listener) -> Callable[..., Any]:
    """``function``, compiled at its first call.

    A compiler that is missing or fails is not the user's problem: the function then runs as it
    is, slower, and the listener hears of it once.
    """
    # One batch size a run; a last smaller batch compiles once more rather than for any size.
    fast = torch.compile(function, dynamic=False)
    broken = False

    def call(*arguments: Any) -> Any:
        nonlocal broken
        if broken:
            return function(*arguments)
        try:
            with _quiet():
                return fast(*arguments)
        except (TorchDynamoException, InductorError) as error:
            broken = True
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            listener.warn(f"torch.compile does not work here ({first}); going on without it")
            return function(*arguments)

    return call


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
