"""``mecq compare``: runs side by side."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mecq_cli.cli.common import DebugFlag, JsonFlag, QuietFlag, flags_of, working

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table


def compare(
    ctx: typer.Context,
    runs: Annotated[
        list[str],
        typer.Argument(metavar="RUN RUN", help="Two or more run folders.", show_default=False),
    ],
    html: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write a page too, with curves over each other."),
    ] = None,
    force: Annotated[
        bool,
        typer.Option("--force", help="Replace a file that is no such page; such are replaced."),
    ] = False,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Example: [bold]mecq compare runs/a runs/b --html compare.html[/bold]

    Accuracy, size, time, final losses, and the settings that differ, from what
    the runs wrote.
    """
    from mecq_cli.cli import render
    from mecq_cli.config import CompareConfig, from_flags

    config = from_flags(CompareConfig, flags_of(ctx))
    with working(quiet=quiet) as listener:
        from mecq_cli.workflow.compare import compare as compare_runs

        document = compare_runs(config, listener)
    render.show(document, _tables, as_json=as_json)
    if as_json or quiet:
        return
    if html:
        render.next_page(document["html"])
    else:
        render.next_command(["mecq", "compare", *runs, "--html", "compare.html"])


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


def _tables(document: Mapping[str, Any]) -> Iterable[RenderableType]:
    from mecq_cli.report.comparison import names

    runs = document["runs"]
    called = [_plain(name) for name in names(runs)]
    if len(runs) <= _BESIDE:
        yield from _columns(document, called)
    else:
        yield from _rows(document, called)
    if not document["differing"]:
        yield "the settings are the same"
    if document.get("html"):
        yield f"page: {_plain(document['html'])}"


def _columns(document: Mapping[str, Any], called: list[str]) -> Iterable[RenderableType]:
    """A column a run."""
    from mecq_cli.report.comparison import ROWS, setting, written

    runs = document["runs"]
    table = _table("", *called)
    for key, label, _ in ROWS:
        if any(run[key] is not None for run in runs):
            table.add_row(label, *(written(key, run[key]) for run in runs))
    if not all(run["finished"] for run in runs):
        table.add_row("finished", *("yes" if run["finished"] else "no" for run in runs))
    if document["differing"]:
        table.add_row()
        table.add_row("settings that differ", style="bold")
        for row in document["differing"]:
            table.add_row(row["setting"], *(_plain(setting(value)) for value in row["values"]))
    yield table


def _rows(document: Mapping[str, Any], called: list[str]) -> Iterable[RenderableType]:
    """A row a run, and one a setting."""
    from mecq_cli.report.comparison import setting, written

    runs = document["runs"]
    short = {key: title for key, title in _SHORT.items() if any(r[key] is not None for r in runs)}
    table = _table("run", *short.values())
    for name, run in zip(called, runs, strict=True):
        end = "" if run["finished"] else " (not finished)"
        table.add_row(name + end, *(written(key, run[key]) for key in short))
    yield table
    if document["differing"]:
        settings = _table("settings that differ", "in the order of the runs", left=True)
        for row in document["differing"]:
            settings.add_row(row["setting"], _plain(", ".join(map(setting, row["values"]))))
        yield settings


def _table(first: str, *others: str, left: bool = False) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column(first, overflow="fold")
    for title in others:
        table.add_column(title, justify="left" if left else "right", overflow="fold")
    return table


def _plain(value: object) -> str:
    from rich.markup import escape

    from mecq_cli.cli.errors import one_line

    return escape(one_line(str(value)))
