"""Runs side by side."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import RenderableType

from mecq_cli.cli.render import Document
from mecq_cli.cli.views.cells import headed, plain
from mecq_cli.report.comparison import ROWS, names, setting, written

_BESIDE = 4
"""Runs that have room beside each other in 80 columns; of more, each gets a row."""

_SHORT = {
    "top1": "top-1",
    "miou": "mIoU",
    "map": "mAP",
    "drop": "change",
    "packed_bytes": "artifact",
    "steps": "steps",
    "seconds": "time, s",
    "loss_task": "task loss",
}


def tables(document: Document) -> Iterable[RenderableType]:
    """The result of ``mecq compare``."""
    runs = document["runs"]
    called = [plain(name) for name in names(runs)]
    if len(runs) <= _BESIDE:
        yield from _columns(document, called)
    else:
        yield from _rows(document, called)
    if document["unknown"]:
        yield f"settings are not known of: {plain(', '.join(document['unknown']))}"
    elif not document["differing"]:
        yield "the settings are the same"
    if document.get("html"):
        yield f"page: {plain(document['html'])}"


def _columns(document: Document, called: list[str]) -> Iterable[RenderableType]:
    """A column a run."""
    runs = document["runs"]
    table = headed("", numbers=called, gap=2)
    for key, label, _ in ROWS:
        if any(run[key] is not None for run in runs):
            table.add_row(label, *(written(key, run[key]) for run in runs))
    if not all(run["finished"] for run in runs):
        table.add_row("finished", *("yes" if run["finished"] else "no" for run in runs))
    if document["differing"]:
        table.add_row()
        table.add_row("settings that differ", style="bold")
        for row in document["differing"]:
            table.add_row(row["setting"], *(plain(setting(value)) for value in row["values"]))
    yield table


def _rows(document: Document, called: list[str]) -> Iterable[RenderableType]:
    """A row a run, and one a setting."""
    runs = document["runs"]
    short = {key: title for key, title in _SHORT.items() if any(r[key] is not None for r in runs)}
    table = headed("run", numbers=list(short.values()), gap=2)
    for name, run in zip(called, runs, strict=True):
        end = "" if run["finished"] else " (not finished)"
        table.add_row(name + end, *(written(key, run[key]) for key in short))
    yield table
    if document["differing"]:
        settings = headed("settings that differ", "in the order of the runs", gap=2)
        for row in document["differing"]:
            settings.add_row(row["setting"], plain(", ".join(map(setting, row["values"]))))
        yield settings
