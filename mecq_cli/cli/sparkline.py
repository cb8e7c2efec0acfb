"""A curve in one line of text."""

from __future__ import annotations

import math
from itertools import pairwise

BLOCKS = "▁▂▃▄▅▆▇█"

_KEPT = 512
"""Values that are remembered; of more, neighbours are averaged."""


class Sparkline:
    """Remembers values, however many come, and draws them in a given width."""

    def __init__(self) -> None:
        self._values: list[float] = []
        self._each = 1
        """Steps that one of them stands for."""
        self._sum, self._count = 0.0, 0

    def add(self, value: float) -> None:
        """The next value; one that is not finite is left out."""
        if not math.isfinite(value):
            return
        self._sum, self._count = self._sum + value, self._count + 1
        if self._count < self._each:
            return
        self._values.append(self._sum / self._count)
        self._sum, self._count = 0.0, 0
        if len(self._values) >= _KEPT:
            pairs = zip(self._values[::2], self._values[1::2], strict=True)
            self._values = [(a + b) / 2 for a, b in pairs]
            self._each *= 2

    def text(self, width: int) -> str:
        """At most ``width`` blocks, from the lowest value to the highest; "" of less than two."""
        count = min(len(self._values), width)
        if count < 2:
            return ""
        edges = [i * len(self._values) // count for i in range(count + 1)]
        parts = pairwise(edges)
        means = [sum(self._values[a:b]) / (b - a) for a, b in parts]
        low, high = min(means), max(means)
        span = (high - low) or 1.0
        return "".join(BLOCKS[round((m - low) / span * (len(BLOCKS) - 1))] for m in means)
