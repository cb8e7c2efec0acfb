"""What is drawn while a job runs: lines in a file, a bar on a terminal."""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mecq_cli.cli.live import PLAIN_INTERVAL, PlainListener, duration, row_text

ROOT = Path(__file__).parents[2]
ROW: dict[str, Any] = {
    "step": 1234,
    "epoch": 11,
    "loss": 1.23456,
    "loss_task": 1.4567,
    "loss_mec": -0.23456,
    "coding_length": {"layer1": 10.0, "layer2": 15.0},
    "lr": 0.0123,
    "seconds": 0.3101,
    "train_top1": 50.0,
}


class Clock:
    """A clock that the test sets."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_file_gets_a_line_now_and_then() -> None:
    clock, stream = Clock(), io.StringIO()
    listener = PlainListener(Console(file=stream, width=80, highlight=False), clock)
    listener.note("weights from [b]x\x1b[2J.pth")
    listener.start("train", 1000)
    for step in range(501, 601):  # resumed at step 500
        clock.now += 1.0
        listener.advance("train", step, {**ROW, "train_top1": 100.0 * (step % 2)})
    listener.finish("train")
    lines = stream.getvalue().splitlines()
    assert lines[0] == r"weights from [b]x\x1b[2J.pth"
    assert len(lines) == 1 + 100 // PLAIN_INTERVAL + 1
    assert lines[1] == (
        "train 510/1000 (51%, 8:10 left)  epoch 12  task 1.457  mec -0.235  H 12.5  "
        "lr 0.012  train 50.0 %  310 ms"
    )
    assert lines[-1] == "train: 600 of 1000 in 1:40"


def test_the_numbers_of_a_step_fit_80_columns() -> None:
    assert len(row_text({**ROW, "train_top1": 100.0})) <= 80
    assert row_text({**ROW, "data_seconds": 0.02}) == row_text(ROW)
    assert row_text({**ROW, "data_seconds": 0.2}).endswith("310 ms  + 200 ms for data")
    assert row_text({}) == ""


@pytest.mark.parametrize(
    ("seconds", "text"), [(2.06, "2.1 s"), (59.96, "60.0 s"), (307, "5:07"), (3723, "1:02:03")]
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


SCRIPT = f"""
import time
from mecq_cli.cli.common import working

with working(quiet=False) as listener:
    listener.note("a note")
    listener.start("train", 10)
    for step in range(1, 6):
        listener.advance("train", step, {ROW!r})
        time.sleep(0.05)
    print("library noise")
    time.sleep(0.3)
    listener.finish("train")
print("the result")
"""


def draw(**environment: str) -> tuple[str, str]:
    """stderr, on a terminal of 80 columns, and stdout of `SCRIPT`."""
    ours, theirs = pty.openpty()
    cleared = {key: value for key, value in os.environ.items() if key != "NO_COLOR"}
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT],
        stdout=subprocess.PIPE,
        stderr=theirs,
        cwd=ROOT,
        env={**cleared, "TERM": "xterm-256color", "COLUMNS": "80", **environment},
    )
    os.close(theirs)
    drawn = b""
    while True:
        try:
            chunk = os.read(ours, 4096)
        except OSError:  # what Linux says when the other end is closed
            break
        if not chunk:
            break
        drawn += chunk
    os.close(ours)
    result, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    return drawn.decode(), result.decode()


def test_a_terminal_gets_a_live_view_on_stderr_and_the_result_on_stdout() -> None:
    drawn, result = draw()
    assert result == "the result\n"
    assert re.search(r"train .*5/10.*50%", re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", drawn))
    shown = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", drawn)
    for text in (
        r"task loss +1\.457 +█?▁* +epoch +12", r"entropy term +-0\.235", r"coding length +12\.5",
        r"train top-1 +50\.0 %", r"learning rate +0\.012", r"step +310 ms", r"left",
    ):  # fmt: skip
        assert re.search(text, shown), text
    assert max(map(len, shown.splitlines())) <= 80
    assert "library noise" in drawn
    assert "\x1b[36m" in drawn  # colour
    assert drawn.rstrip().endswith("\x1b[?25h"), "the cursor must be shown again"


def test_no_color_and_dumb_terminals_are_respected() -> None:
    drawn, _ = draw(NO_COLOR="1")
    assert "5/10" in drawn
    assert not re.search(r"\x1b\[[\d;]*3[0-7]m", drawn)
    drawn, _ = draw(TERM="dumb")
    assert "\x1b" not in drawn
    assert "train: 5 of 10" in drawn
