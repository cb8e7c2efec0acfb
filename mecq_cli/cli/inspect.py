"""``mecq inspect``: the layers of a run or an artifact, their bits and sizes."""

from __future__ import annotations

from typing import Annotated

import typer

from mecq_cli.cli import early
from mecq_cli.cli.common import DebugFlag, JsonFlag, QuietFlag, flags_of, working


def inspect(
    ctx: typer.Context,
    target: Annotated[
        str | None,
        typer.Argument(
            metavar="TARGET",
            help="Run folder or .safetensors artifact. Default: the latest run.",
            show_default=False,
        ),
    ] = None,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Example: [bold]mecq inspect runs/latest[/bold]

    The site table: layer, shape, bits, scales and bytes, and the totals.
    """
    from mecq_cli.cli import following, render
    from mecq_cli.cli.views.sites import sites
    from mecq_cli.config import InspectConfig, from_flags

    config = from_flags(InspectConfig, flags_of(ctx))
    early.check_target(config.target)
    with working(quiet=quiet) as listener:
        from mecq_cli.workflow.inspect import inspect as inspect_target

        document = inspect_target(config, listener)
    render.show(document, sites, as_json=as_json)
    command = following.after_look(str(document["target"]))
    if command and not (as_json or quiet):
        following.next_command(command)
