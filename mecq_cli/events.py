"""What a long job tells whoever watches it. The command line draws it; a test may record it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class Listener:
    """Hears of the stations of a job. This base class ignores everything."""

    def note(self, text: str) -> None:
        """One line a person should see (a choice that was made, a station reached)."""

    def warn(self, text: str) -> None:
        """One line about something that may be wrong, though the job goes on."""

    def start(self, task: str, total: int) -> None:
        """A part of the job begins: "calibrate", "train", "evaluate", ... of ``total`` steps."""

    def advance(self, task: str, done: int, row: Mapping[str, Any] | None = None) -> None:
        """``done`` steps are over. In training ``row`` has step, epoch, loss, loss_task,
        loss_mec, lr, seconds, data_seconds (the wait for the batch) and the share of answers that
        are right, where the task has one."""

    def finish(self, task: str) -> None:
        """That part of the job is over."""
