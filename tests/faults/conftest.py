"""A warm process, a run that nobody stopped, and lines that are shown after the tests."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.command import write_patterns
from tests.faults.warm import Warm

_LINES: list[str] = []


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _LINES:
        terminalreporter.section("faults")
    for line in _LINES:
        terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def report() -> Callable[[str], None]:
    """Adds a line to what is shown at the end."""
    return _LINES.append


@pytest.fixture(scope="session")
def warm() -> Iterator[Warm]:
    """Command lines without the seconds that importing torch takes."""
    if not sys.platform.startswith("linux"):
        pytest.skip("made for Linux: pidfd, /proc, and fork after importing torch")
    with Warm() as process:
        yield process


@dataclass(frozen=True)
class Course:
    """A run to be disturbed.

    Attributes:
        place: holds data/ and work/; commands run in work/.
        arguments: of the command line, without --output.
        whole: the finished run that nobody disturbed.
        seconds: it took.
        calls: what it did to files, see `inject`.
    """

    place: Path
    arguments: tuple[object, ...]
    whole: Path
    seconds: float
    calls: tuple[str, ...]

    @property
    def work(self) -> Path:
        """Where commands run."""
        return self.place / "work"


SETTINGS = """\
model = "tiny_for_faults"
wbits = 2
abits = 2
pretrained = false
data = "../data"
batch_size = 8
lr = 0.05
mec_on = "penultimate"
calibration_images = 16
bn_images = 32
device = "cpu"
compile = "off"
amp = "off"
checkpoint_every = 2
"""


def start(warm: Warm, place: Path, *, size: int = 16, workers: int = 0, steps: int) -> Course:
    """Make images and settings, and the run that nobody disturbs."""
    write_patterns(place / "data", {"train": 16, "val": 4}, size=size)
    work = place / "work"
    work.mkdir()
    (place / "run.toml").write_text(SETTINGS)
    arguments = (
        "quantize", "--config", place / "run.toml", "--epochs", -(-steps // 4),
        "--max-steps", steps, "--workers", workers, "--img-size", size,
    )  # fmt: skip
    done = warm.run(*arguments, "--output", "whole", cwd=work, fault=(work, 0, "eio"))
    assert done.code == 0, done.err
    return Course(place, arguments, work / "whole", done.seconds, tuple(done.calls))


@pytest.fixture(scope="session")
def short(warm: Warm, tmp_path_factory: pytest.TempPathFactory) -> Course:
    """4 steps, a checkpoint every 2."""
    return start(warm, tmp_path_factory.mktemp("short"), steps=4)


def rows(run: Path) -> list[dict[str, Any]]:
    """The metrics without what a clock decides."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.endswith("seconds")} for row in found]


def assert_same(run: Path, whole: Path) -> None:
    """Weights, artifact, log and results are those of the run that nobody disturbed."""
    assert rows(run) == rows(whole)
    # A signal saves at a step of its own, which may then be the one before the last.
    names = [
        sorted(re.sub(r"step-\d+", "step", path.name) for path in one.rglob("*"))
        for one in (run, whole)
    ]
    assert names[0] == names[1], "something is left over, or missing"
    assert (run / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    last = sorted((whole / "checkpoints").iterdir())[-1].name
    one, two = ((folder / "checkpoints" / last).read_bytes() for folder in (run, whole))
    assert one == two, "weights, optimizer, random state or progress differ"
    results = [json.loads((folder / "summary.json").read_text()) for folder in (run, whole)]
    for key in ("top1", "simulator_top1", "fp_top1", "sizes", "steps", "images"):
        assert results[0][key] == results[1][key], key
