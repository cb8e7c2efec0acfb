"""``mecq bench features``: the representations of runs beside those of the FP network."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mecq_cli.cli.common import DebugFlag, JsonFlag, QuietFlag, working


def features(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Finished run folders.")],
    images: Annotated[int, typer.Option(min=2, metavar="N", help="Of each split.")] = 2000,
    distortion: Annotated[
        float, typer.Option(min=1e-6, metavar="F", help="Of the coding lengths.")
    ] = 0.06,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.svg", help="Draw the spectra.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite FILE.svg.")] = False,
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
    from mecq_cli.cli.views import features

    with working(quiet=quiet) as listener:
        from mecq_cli.workflow import plots
        from mecq_cli.workflow.bench_features import bench_features

        if plot is not None:
            plots.require_place(plot, force=force)
        document = bench_features(runs, images, distortion, listener)
        if plot is not None:
            plots.spectra(document, plot, force=force)
    render.show(document, features.tables, as_json=as_json)
