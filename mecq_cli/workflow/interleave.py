"""Times of several things that take turns, so that what else the machine does meets all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

WARM_ROUNDS = 2
_BUSY = 1.25
"""Time by the clock over time of the processor, on one thread, from which on a core was shared."""
LEAST_ROUNDS = 5
"""Of a run by seconds; medians of fewer say little."""


@dataclass
class Times:
    """Seconds of each round: by the clock, and of the processor for this process."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)


def interleave(
    arms: Mapping[str, Callable[[], object]], *, seconds: float, repeats: int | None = None
) -> dict[str, Times]:
    """Call each arm once a round, beginning with another one in each round.

    Args:
        arms: what to time, by name.
        seconds: rounds begin for so long, but there are at least `LEAST_ROUNDS`.
        repeats: exactly so many rounds instead.
    """
    names = list(arms)
    for _ in range(WARM_ROUNDS):
        for name in names:
            arms[name]()
    times = {name: Times() for name in names}
    started, done = time.perf_counter(), 0

    def goes_on() -> bool:
        if repeats is not None:
            return done < repeats
        return done < LEAST_ROUNDS or time.perf_counter() - started < seconds

    while goes_on():
        first = done % len(names)
        for name in names[first:] + names[:first]:
            wall, cpu = time.perf_counter(), time.process_time()
            arms[name]()
            times[name].cpu.append(time.process_time() - cpu)
            times[name].wall.append(time.perf_counter() - wall)
        done += 1
    return times


def is_busy(times: Times) -> bool:
    """Whether other work shared the core of what ran on one thread."""
    return sum(times.wall) > _BUSY * sum(times.cpu)


def ratio(slow: Sequence[float], fast: Sequence[float]) -> dict[str, float]:
    """How many times faster: median and quartiles of the ratios of each round."""
    ratios = [a / b for a, b in zip(slow, fast, strict=True)]
    low, median, high = quartiles(ratios)
    return {"median": median, "low": low, "high": high}


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """25, 50 and 75 %; of a single value that value."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high


def summary(times: Times, batch: int) -> dict[str, Any]:
    """Median latency and its quartiles in milliseconds, images a second, and the time of the
    processor: its median, and that of the round which other work disturbed least.
    """
    low, median, high = quartiles(times.wall)
    return {
        "latency_ms": 1e3 * median,
        "latency_low_ms": 1e3 * low,
        "latency_high_ms": 1e3 * high,
        "cpu_ms": 1e3 * statistics.median(times.cpu),
        "cpu_least_ms": 1e3 * min(times.cpu),
        "images_per_second": batch / median,
    }
