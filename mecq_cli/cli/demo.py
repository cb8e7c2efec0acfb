"""``mecq demo``: the whole path on a small data set that is already on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mecq_cli.cli.common import DebugFlag, JsonFlag, QuietFlag, flags_of, working


def demo(
    ctx: typer.Context,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="DIR", help="Folder to work in (default: runs/demo)."
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Start over in a folder that is in use.")
    ] = False,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Example: [bold]mecq demo[/bold]

    Train, quantize to 2 bits, evaluate, export and verify a small net: about
    a minute, offline.
    """
    from mecq_cli.cli import following, render
    from mecq_cli.cli.views import run as views
    from mecq_cli.config import DemoConfig, from_flags

    config = from_flags(DemoConfig, flags_of(ctx))
    with working(quiet=quiet) as listener:
        from mecq_cli.workflow.demo import demo as run_demo

        document = run_demo(config, listener)
    render.show(document, views.demo, as_json=as_json)
    if not (as_json or quiet):
        following.next_command(
            following.about_run("report", str(document["run"])),
            ["mecq", "quantize", "resnet18", "--wbits", "4", "--abits", "4", "--data", "DIR"],
        )
