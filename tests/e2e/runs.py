"""What tests ask of a run folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tests.e2e.command import mecq


def summary(run: Path) -> dict[str, Any]:
    """What a run ended with."""
    document: dict[str, Any] = json.loads((run / "summary.json").read_text())
    return document


def rows(run: Path) -> list[dict[str, Any]]:
    """The metrics without what a clock decides."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.endswith("seconds")} for row in found]


def check_continued(run: Path, keys: Iterable[str]) -> None:
    """A copy of a run of two steps, stopped after the first and continued, ends as the run did.

    Args:
        run: a finished run, with a checkpoint of each step.
        keys: of the summary.
    """
    stopped = Path(shutil.copytree(run, run.parent / "stopped"))
    sorted((stopped / "checkpoints").iterdir())[-1].unlink()
    for name in ("summary.json", "model.safetensors"):
        (stopped / name).unlink()
    resumed = mecq("quantize", "--resume", "--output", "stopped", "--json", cwd=run.parent).document
    assert resumed["resumed_at"] == 1
    assert rows(stopped) == rows(run)
    files = [folder / "model.safetensors" for folder in (stopped, run)]
    assert files[0].read_bytes() == files[1].read_bytes()
    for key in keys:
        assert resumed[key] == summary(run)[key]
