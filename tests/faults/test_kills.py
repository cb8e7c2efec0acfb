"""A run that is killed again and again, at random moments, ends as one that nobody stopped."""

from __future__ import annotations

import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.conftest import Course, assert_same, start
from tests.faults.warm import Warm

Report = Callable[[str], None]
STEPS = 24
ENDS = {
    signal.SIGKILL: {-signal.SIGKILL},
    signal.SIGTERM: {128 + signal.SIGTERM, -signal.SIGTERM},
    signal.SIGINT: {128 + signal.SIGINT},
}


def where(run: Path) -> str:
    """What a killed run was doing, by what it left."""
    leftovers = [path.name for path in run.rglob(".*.tmp")]
    if any(name.startswith(".step-") for name in leftovers):
        return "within a checkpoint write"
    if leftovers:
        return "within another write"
    steps = sorted((run / "checkpoints").glob("step-*"))
    if not steps:
        return "before the first checkpoint"
    if (run / "summary.json").exists() or steps[-1].stem == f"step-{STEPS:08d}":
        return "after the training"
    return "between"


def soak(
    warm: Warm, course: Course, stops: int, seed: int, signals: tuple[signal.Signals, ...]
) -> tuple[Counter[str], int, float]:
    """Stop runs until there were ``stops``; (what they were doing, runs finished, seconds)."""
    chance = random.Random(seed)
    met: Counter[str] = Counter()
    runs, started = 0, time.perf_counter()
    while met.total() < stops:
        output = f"soak-{seed}-{runs}"
        for _ in range(100):
            number = chance.choice(signals)
            # Even the shortest continuation must be met anywhere, also near its end.
            after = chance.uniform(0.0, course.seconds * chance.choice((0.5, 1.0, 1.2)))
            if met.total() >= stops:
                after = 600.0
            done = warm.run(
                *course.arguments, "--resume", "--output", output, cwd=course.work,
                signal_after=after, signal_number=number,
            )  # fmt: skip
            if done.code == 0:
                break
            about = f"seed {seed}, run {runs}, {number.name} after {after:.3f} s: {done}"
            assert done.code in ENDS[number], about
            assert "error" not in done.err, about
            assert "warning" not in done.err, about
            met[where(course.work / output)] += 1
        assert done.code == 0, "a run that is stopped 100 times makes no progress"
        assert_same(course.work / output, course.whole)
        shutil.rmtree(course.work / output)
        runs += 1
    return met, runs, time.perf_counter() - started


def told(what: str, met: Counter[str], runs: int, seconds: float, seed: int) -> str:
    parts = ", ".join(f"{count} {place}" for place, count in sorted(met.items()))
    return f"{what}: {met.total()} ({parts}); {runs} runs, all equal; seed {seed}; {seconds:.0f} s"


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("kills", "workers", "seed"),
    [
        (20, 0, 1),
        (4, 2, 2),
        *(pytest.param(50, 0, seed, marks=pytest.mark.long) for seed in range(10, 14)),
        *(pytest.param(50, 2, seed, marks=pytest.mark.long) for seed in range(20, 24)),
    ],
)
def test_kills_at_random_moments(
    warm: Warm, tmp_path: Path, report: Report, kills: int, workers: int, seed: int
) -> None:
    # Small images are kept in memory, where workers have nothing to do.
    course = start(warm, tmp_path, size=72 if workers else 16, workers=workers, steps=STEPS)
    met, runs, seconds = soak(warm, course, kills, seed, (signal.SIGKILL,))
    report(told(f"SIGKILL, {workers} workers", met, runs, seconds, seed))
    if kills >= 50:
        limit = time.monotonic() + 30
        while warm.others() and time.monotonic() < limit:
            time.sleep(0.5)
        assert warm.others() == 0, "workers of a killed run must end by themselves"


@pytest.mark.parametrize(
    ("stops", "seed"),
    [(4, 5), *(pytest.param(50, seed, marks=pytest.mark.long) for seed in (6, 7))],
)
@pytest.mark.timeout(3600)
def test_signals_at_random_moments(
    warm: Warm, tmp_path: Path, report: Report, stops: int, seed: int
) -> None:
    course = start(warm, tmp_path, steps=STEPS)
    met, runs, seconds = soak(warm, course, stops, seed, (signal.SIGTERM, signal.SIGINT))
    report(told("SIGTERM and SIGINT", met, runs, seconds, seed))
