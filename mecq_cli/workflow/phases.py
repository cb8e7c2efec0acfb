"""How long each part of a job took."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Phases:
    """Adds up seconds by name, in the order in which the names came up."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """What runs inside counts as ``name``."""
        started = time.perf_counter()
        try:
            yield
        finally:
            passed = time.perf_counter() - started
            self._seconds[name] = self._seconds.get(name, 0.0) + passed

    def seconds(self) -> dict[str, float]:
        """By name, rounded to milliseconds."""
        return {name: round(seconds, 3) for name, seconds in self._seconds.items()}
