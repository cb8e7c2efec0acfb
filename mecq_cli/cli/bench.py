"""``mecq bench``: how fast and how right parts of the program are on this machine."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mecq_cli.cli.common import DebugFlag, JsonFlag, QuietFlag, working
from mecq_cli.errors import UsageError

if TYPE_CHECKING:
    from rich.console import RenderableType

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
    render.show(document, _entropy_tables, as_json=as_json)


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


def _entropy_tables(document: Mapping[str, Any]) -> Iterable[RenderableType]:
    from rich.table import Table

    machine = document["machine"]
    yield f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}"
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("size", no_wrap=True)
    table.add_column("spectrum", no_wrap=True)
    for title in ("eps", "exact ms", "taylor", "moe", "alone", "error", "1-cos"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("answered by", overflow="fold")
    for row in document["rows"]:
        moe = row["moe"]
        table.add_row(
            f"{row['samples']}x{row['features']}",
            row["family"],
            f"{row['distortion']:g}",
            f"{1e3 * row['exact']['seconds']:.1f}",
            *(_times(row[name]) for name in ("taylor", "moe", "moe_alone")),
            f"{moe['value_error']:.0e}",
            f"{max(moe['one_minus_cosine'], 0.0):.0e}",
            _shares(row["experts"]),
        )
    yield table
    yield "times faster than exact, forward and backward; -: the series does not hold"
    yield f"all calls of moe: {_shares(document['experts'])}"


def _times(summary: Mapping[str, float] | None) -> str:
    return "-" if summary is None else f"{summary['speedup']:.1f}x"


def _shares(shares: Mapping[str, float]) -> str:
    if len(shares) == 1:
        return next(iter(shares))
    return ", ".join(f"{name} {100 * share:.0f} %" for name, share in shares.items())
