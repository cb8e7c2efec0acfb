"""``mecq bench features``: the representations of runs beside those of the FP network."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mecq_cli.cli.common import DebugFlag, JsonFlag, QuietFlag, working

if TYPE_CHECKING:
    from rich.console import RenderableType


def features(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Finished run folders.")],
    images: Annotated[int, typer.Option(min=2, metavar="N", help="Of each split.")] = 2000,
    distortion: Annotated[
        float, typer.Option(min=1e-6, metavar="F", help="Of the coding lengths.")
    ] = 0.06,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.svg", help="Draw the spectra.")] = None,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Example: [bold]mecq bench features runs/with runs/without --plot spectra.svg[/bold]

    Spectra, effective rank and coding length of the features, likeness to the
    FP network, accuracy by class, and the gap between training and evaluation
    images.
    """
    from mecq_cli.cli import render

    with working(quiet=quiet) as listener:
        from mecq_cli.report import figures
        from mecq_cli.workflow import plots
        from mecq_cli.workflow.bench_features import bench_features

        if plot is not None:
            figures.require("--plot")  # before the work, not after it
        document = bench_features(runs, images, distortion, listener)
        if plot is not None:
            plots.spectra(document, plot)
    render.show(document, _tables, as_json=as_json)


def _tables(document: Mapping[str, Any]) -> Iterable[RenderableType]:
    from rich.table import Table

    yield f"{document['model']}, {document['images']} images"
    accuracy = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    accuracy.add_column("network", overflow="fold")
    for title in ("train", "eval", "gap", "worst class"):
        accuracy.add_column(title, justify="right", no_wrap=True)
    for network in document["networks"]:
        worst = min(network["by_class"].items(), key=lambda item: item[1])
        numbers = (f"{network[key]:.2f}" for key in ("train_top1", "top1", "gap"))
        accuracy.add_row(network["name"], *numbers, f"{worst[0]} {worst[1]:.1f}")
    yield accuracy
    sites = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    sites.add_column("site", overflow="fold")
    sites.add_column("network", overflow="fold")
    for title in ("rank", "nats", "largest", "cosine", "CKA"):
        sites.add_column(title, justify="right", no_wrap=True)
    for i, first in enumerate(document["networks"][0]["sites"]):
        for network in document["networks"]:
            site = network["sites"][i]
            sites.add_row(
                first["site"],
                network["name"],
                f"{site['effective_rank']:.1f}",
                f"{site['coding_length']:.2f}",
                f"{100 * site['eigenvalues'][0]:.1f} %",
                f"{site['cosine']:.3f}",
                f"{site['cka']:.3f}",
            )
    yield sites
