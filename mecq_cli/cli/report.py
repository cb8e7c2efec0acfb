"""``mecq report``: what there is to say about a run, as one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mecq_cli.cli import early
from mecq_cli.cli.common import DebugFlag, JsonFlag, QuietFlag, flags_of, working


def report(
    ctx: typer.Context,
    run: Annotated[
        str | None,
        typer.Argument(
            metavar="RUN", help="Run folder. Default: the latest run.", show_default=False
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="FILE", help="The page (default: report.html in the run)."
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(metavar="DATA", help="Images to look at (default: the data of the run)."),
    ] = None,
    images: Annotated[
        int | None, typer.Option(metavar="N", help="How many at most (default 5000).")
    ] = None,
    force: Annotated[
        bool,
        typer.Option("--force", help="Replace a file that is no report; reports are replaced."),
    ] = False,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Example: [bold]mecq report runs/latest[/bold]

    Write one HTML page about a run, which works offline: accuracy, curves,
    bits and entropy of each layer, histograms, what went wrong, sizes and
    speed. --json prints its numbers too.
    """
    from mecq_cli.cli import following, render
    from mecq_cli.cli.views import lists
    from mecq_cli.config import ReportConfig, from_flags

    config = from_flags(ReportConfig, flags_of(ctx))
    early.check_target(config.run, config.data)
    with working(quiet=quiet) as listener:
        from mecq_cli.workflow.report import report as report_run

        document = report_run(config, listener)
    render.show(document, lists.reported, as_json=as_json)
    if not (as_json or quiet):
        following.next_page(document["path"])
