"""``mecq bench``: how fast and how right parts of the program are on this machine."""

from __future__ import annotations

from typing import Annotated

import typer

from mecq_cli.cli.common import DebugFlag, JsonFlag, QuietFlag, working
from mecq_cli.errors import UsageError

_LARGEST = 16384

bench = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode="rich")


@bench.callback()
def _group() -> None:
    """Example: mecq bench entropy

    Measure parts of the program on this machine.
    """


@bench.command("entropy", short_help="Error and time of the coding length's estimators.")
def entropy(
    sizes: Annotated[
        str,
        typer.Option(metavar="MxD,...", help="Samples x features, several with commas."),
    ] = "512x512,1024x512,1024x2048",
    families: Annotated[
        str | None,
        typer.Option(metavar="NAME,...", help="Kinds of spectra (default: all)."),
    ] = None,
    distortions: Annotated[
        str, typer.Option(metavar="F,...", help="Distortions eps_d^2 of the coding length.")
    ] = "0.06,0.01",
    repeats: Annotated[int, typer.Option(min=1, max=1000, help="Timed calls of each.")] = 5,
    threads: Annotated[
        int | None, typer.Option(min=1, max=1024, help="CPU threads (default: PyTorch's).")
    ] = None,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Example: [bold]mecq bench entropy --sizes 512x512,1024x2048[/bold]

    Error against float64, time of forward and backward, and which expert of
    the mixture answered.
    """
    from mecq_cli.cli import render
    from mecq_cli.cli.views import entropy as views

    shapes = [_shape(text) for text in sizes.split(",")]
    values = [_number(text) for text in distortions.split(",")]
    with working(quiet=quiet) as listener:
        import torch

        from mecq_cli.workflow.bench_entropy import FAMILIES
        from mecq_cli.workflow.bench_entropy import bench as bench_entropy

        if threads is not None:
            torch.set_num_threads(threads)
        names = list(FAMILIES) if families is None else families.split(",")
        document = bench_entropy(shapes, names, values, repeats, listener)
    render.show(document, views.tables, as_json=as_json)


def _shape(text: str) -> tuple[int, int]:
    parts = text.strip().split("x")
    if len(parts) != 2 or not all(p.isdigit() and 1 <= int(p) <= _LARGEST for p in parts):
        raise UsageError(
            f"--sizes: got {text!r}; allowed: samples x features up to {_LARGEST}, as in 512x1024"
        )
    return int(parts[0]), int(parts[1])


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 < value < float("inf"):
        raise UsageError(f"--distortions: got {text!r}; allowed: positive numbers")
    return value
