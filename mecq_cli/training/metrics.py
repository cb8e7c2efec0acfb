"""metrics.jsonl: a row a training step, also where the run was stopped and continued."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from mecq_cli.storage import atomic_write, write_failure


class MetricsLog:
    """Appends rows, each handed to the system before the next step begins.

    Used as a context manager. Every method raises EnvironmentFailure where the disk refuses.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = path.open("a", encoding="utf-8", buffering=1)
        except OSError as error:
            raise write_failure(path, error) from error

    def write(self, row: Mapping[str, Any]) -> None:
        """One row."""
        try:
            self._file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise write_failure(self.path, error) from error

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        try:
            self._file.close()
        except OSError as failure:
            # What could not be written a moment ago is tried again; the first error is the cause.
            if error is None:
                raise write_failure(self.path, failure) from failure


def read_rows(metrics: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; [] where there is none.

    A last line without its end, as a killed process leaves it, is passed over.
    """
    if not metrics.exists():
        return []
    rows = []
    for line in metrics.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


def cut(path: Path, step: int) -> None:
    """Forget rows of ``step`` and later: those steps are done again.

    A last line without its end, as a killed process leaves it, is forgotten too.
    """
    if not path.exists():
        return
    kept: list[str] = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if row["step"] < step:
            kept.append(line)
    atomic_write(path, "".join(line + "\n" for line in kept).encode(), force=True)
