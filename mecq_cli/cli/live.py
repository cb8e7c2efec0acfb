"""What a person sees while a job runs: on stderr, a live view on a terminal, else plain lines."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import zip_longest
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from mecq_cli.cli.errors import one_line
from mecq_cli.cli.sparkline import Sparkline
from mecq_cli.events import Listener
from mecq_cli.tasks.figures import FIGURES

SLOW_DATA = 0.1
"""The time waited for images is shown where it is more than this share of the step's."""
_TRAINED = {of.train_key for of in FIGURES.values()}
"""What is right in a batch, by the key of each task."""
CURVE = 20
"""Columns of a curve beside its number."""
PLAIN_INTERVAL = 10.0
"""Seconds between two lines about one task where there is no terminal."""


@contextmanager
def listening(*, quiet: bool) -> Iterator[Listener]:
    """The listener that fits: --quiet, a terminal, or a file."""
    console = Console(stderr=True, highlight=False)
    if quiet:
        yield QuietListener(console)
    elif sys.stderr.isatty() and not console.is_dumb_terminal:
        with LiveListener(console) as listener:
            yield listener
    else:
        yield PlainListener(console)


class QuietListener(Listener):
    """Tells nothing but warnings."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def warn(self, text: str) -> None:
        self._say(f"warning: {text}", "yellow")

    def _say(self, text: str, style: str = "") -> None:
        # A terminal breaks between words; the line of a file stays one.
        whole = not self._console.is_terminal
        self._console.print(Text(one_line(text), style=style), soft_wrap=whole)


class PlainListener(QuietListener):
    """A line now and then: every `PLAIN_INTERVAL` seconds, after an evaluation, at the end."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(console)
        self._clock = clock
        self._tasks: dict[str, _Task] = {}

    def note(self, text: str) -> None:
        self._say(text)

    def start(self, task: str, total: int) -> None:
        self._tasks[task] = _Task(task, total, self._clock())

    def advance(self, task: str, done: int, row: Mapping[str, Any] | None = None) -> None:
        state = self._tasks.get(task)
        if state is None:
            return
        now = self._clock()
        row = state.reach(done, now, row)
        if now - state.told >= PLAIN_INTERVAL:
            state.told = now
            self._say("  ".join(filter(None, (state.progress(now), row_text(row)))))

    def finish(self, task: str) -> None:
        state = self._tasks.pop(task, None)
        if state is not None:
            self._say(state.ended(self._clock()))


class LiveListener(QuietListener):
    """A bar for each task that runs, and under it the last training step, and how it went so far.

    All of it fits 80 columns.
    """

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._row: Mapping[str, Any] = {}
        self._curves: dict[str, Sparkline] = {}
        self._tasks: dict[str, tuple[TaskID, _Task]] = {}
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TaskProgressColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("left"),
            console=console,
            expand=True,
        )
        self._live = Live(
            console=console, get_renderable=self._draw, transient=True, refresh_per_second=5
        )

    def __enter__(self) -> LiveListener:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def note(self, text: str) -> None:
        self._say(text, "dim")

    def start(self, task: str, total: int) -> None:
        handle = self._progress.add_task(one_line(task), total=total)
        self._tasks[task] = (handle, _Task(task, total, time.monotonic()))

    def advance(self, task: str, done: int, row: Mapping[str, Any] | None = None) -> None:
        if task not in self._tasks:
            return
        handle, state = self._tasks[task]
        row = state.reach(done, time.monotonic(), row)
        self._progress.update(handle, completed=done)
        if row:
            self._row = row
            for key, value in _followed(row).items():
                self._curves.setdefault(key, Sparkline()).add(value)

    def finish(self, task: str) -> None:
        handle, state = self._tasks.pop(task, (None, None))
        if handle is not None and state is not None:
            self._progress.remove_task(handle)
            self._say(state.ended(time.monotonic()), "dim")
        if not self._tasks:
            self._row, self._curves = {}, {}

    def _draw(self) -> RenderableType:
        row = self._row
        if not row:
            return self._progress
        return Group(self._progress, self._table(row))

    def _table(self, row: Mapping[str, Any]) -> Table:
        """Left what is followed over the steps, with its curve; right what is told once."""
        table = Table.grid(padding=(0, 2, 0, 0))
        for style, justify in (
            ("dim", "left"), ("bold", "right"), ("cyan", "left"), ("dim", "left"), ("", "right"),
        ):  # fmt: skip
            table.add_column(style=style, justify=justify, no_wrap=True)  # type: ignore[arg-type]
        width = 0 if self._console.options.ascii_only else CURVE
        followed = _followed(row)
        left = [
            (label, form.format(followed[key]), self._curves[key].text(width))
            for key, label, form in _FOLLOWED
            if key in followed and key in self._curves
        ]
        for one, other in zip_longest(left, _told(row), fillvalue=None):
            table.add_row(*(one or ("", "", "")), *(other or ("", "")))
        return table


_FOLLOWED = (
    ("loss_task", "task loss", "{:.3f}"),
    ("loss_mec", "entropy term", "{:.3f}"),
    ("length", "coding length", "{:.1f}"),
    *((of.train_key, f"train {of.train_label.split()[0]}", "{:.1f} %") for of in FIGURES.values()),
)
"""What has a curve: its key, its name, and how it is written."""


def _followed(row: Mapping[str, Any]) -> dict[str, float]:
    """Numbers of a step that have a curve; without the regularizer its term is none."""
    lengths = row.get("coding_length") or {}
    values = {
        "loss_task": row.get("loss_task"),
        "loss_mec": row.get("loss_mec") or None,
        "length": sum(lengths.values()) / len(lengths) if lengths else None,
        **{of.train_key: row.get(of.train_key) for of in FIGURES.values()},
    }
    return {key: value for key, value in values.items() if value is not None}


def _told(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Names and values of the right side."""
    rows = []
    if row.get("epoch") is not None:
        rows.append(("epoch", str(row["epoch"] + 1)))
    if row.get("lr") is not None:
        rows.append(("learning rate", f"{row['lr']:.2g}"))
    if row.get("seconds") is not None:
        rows.append(("step", f"{1000 * row['seconds']:.0f} ms"))
        if _waits(row):
            rows.append(("wait for images", f"{1000 * row['data_seconds']:.0f} ms"))
    return rows


def _waits(row: Mapping[str, Any]) -> bool:
    """Whether the time waited for images is worth a word."""
    return bool((row.get("data_seconds") or 0.0) > SLOW_DATA * row["seconds"])


class _Task:
    """How far a task is, and how fast it goes."""

    def __init__(self, name: str, total: int, started: float) -> None:
        self.name, self.total, self.started, self.told = name, total, started, started
        self.done = 0
        # A resumed training starts in the middle: speed counts from the first report on.
        self._first: tuple[float, int] | None = None
        self._right, self._batches = 0.0, 0

    def reach(self, done: int, now: float, row: Mapping[str, Any] | None) -> dict[str, Any]:
        """Take a report; returns its row, with the accuracy of some 50 batches, not of one."""
        self.done = done
        if self._first is None:
            self._first = (now, done)
        shown = dict(row or {})
        for key in _TRAINED & shown.keys():
            # A plain mean until there are 50: else the first batch would weigh on all of them.
            self._batches = min(self._batches + 1, 50)
            self._right += (shown[key] - self._right) / self._batches
            shown[key] = self._right
        return shown

    def progress(self, now: float) -> str:
        line = f"{self.name} {self.done}/{self.total}"
        if self.total <= 0:
            return line
        line += f" ({100 * self.done // self.total}%"
        since, first = self._first or (now, self.done)
        if self.done > first:
            left = (now - since) * (self.total - self.done) / (self.done - first)
            line += f", {duration(left)} left"
        return line + ")"

    def ended(self, now: float) -> str:
        return f"{self.name}: {self.done} of {self.total} in {duration(now - self.started)}"


def row_text(row: Mapping[str, Any]) -> str:
    """The numbers of a training step, each with its name, in 80 columns; epochs count from 1.

    H is the coding length in nats, the mean of all coded sites.
    """
    parts = []
    if row.get("epoch") is not None:
        parts.append(f"epoch {row['epoch'] + 1}")
    for key, name in (("loss_task", "task"), ("loss_mec", "mec")):
        if row.get(key) is not None:
            parts.append(f"{name} {row[key]:.3f}")
    lengths = row.get("coding_length")
    if lengths:
        parts.append(f"H {sum(lengths.values()) / len(lengths):.1f}")
    if row.get("lr") is not None:
        parts.append(f"lr {row['lr']:.2g}")
    parts += [f"train {row[key]:.1f} %" for key in _TRAINED if row.get(key) is not None]
    if row.get("seconds") is not None:
        parts.append(f"{1000 * row['seconds']:.0f} ms")
        if _waits(row):
            parts.append(f"+ {1000 * row['data_seconds']:.0f} ms for data")
    return "  ".join(parts)


def duration(seconds: float) -> str:
    """2.1 s, 5:07, 1:02:03."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
