"""``mecq compare``: runs side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mecq_cli.cli.common import DebugFlag, JsonFlag, QuietFlag, flags_of, working


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
    from mecq_cli.cli import following, render
    from mecq_cli.cli.views import comparison
    from mecq_cli.config import CompareConfig, from_flags

    config = from_flags(CompareConfig, flags_of(ctx))
    with working(quiet=quiet) as listener:
        from mecq_cli.workflow.compare import compare as compare_runs

        document = compare_runs(config, listener)
    render.show(document, comparison.tables, as_json=as_json)
    if as_json or quiet:
        return
    if html:
        following.next_page(document["html"])
    else:
        following.next_command(["mecq", "compare", *runs, "--html", "compare.html"])
