"""What all commands share."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Annotated, Any

import typer

from mecq_cli.events import Listener

JsonFlag = Annotated[
    bool,
    typer.Option("--json", help="Print one JSON document and no tables.", rich_help_panel="Output"),
]
QuietFlag = Annotated[
    bool,
    typer.Option("--quiet", "-q", help="No progress, no notes.", rich_help_panel="Output"),
]
DebugFlag = Annotated[
    bool,
    typer.Option("--debug", help="Show the traceback of an error.", rich_help_panel="Output"),
]


@contextmanager
def working(*, quiet: bool) -> Iterator[Listener]:
    """A listener that draws on stderr while a library call runs.

    Whatever a library prints in the meantime goes to stderr too: stdout is for the result.
    """
    from mecq_cli.cli.live import listening

    with redirect_stdout(sys.stderr), listening(quiet=quiet) as listener:
        yield listener


@contextmanager
def progress() -> Iterator[Listener]:
    """Show what a long call does, on stderr: the listener it gives is an argument of that call."""
    from mecq_cli.cli.live import listening

    with listening(quiet=False) as listener:
        yield listener


def flags_of(ctx: typer.Context, *left_out: str) -> dict[str, Any]:
    """The parameters of a command by name, without those that only concern the output."""
    skipped = {"as_json", "quiet", "debug", *left_out}
    return {key: value for key, value in ctx.params.items() if key not in skipped}
