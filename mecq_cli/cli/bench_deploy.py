"""``mecq bench deploy``: how fast and how small the export is, beside what it competes with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mecq_cli.cli.common import DebugFlag, JsonFlag, QuietFlag, flags_of, working

_MODEL = "A model by its name"
_TIMES = "Times"


def deploy(
    ctx: typer.Context,
    target: Annotated[
        str | None,
        typer.Argument(
            metavar="TARGET",
            help="Run folder, integer artifact or model name. Default: the latest run.",
            show_default=False,
        ),
    ] = None,
    threads: Annotated[
        str | None,
        typer.Option(metavar="N,...", help="Of onnxruntime (default 1,2).", rich_help_panel=_TIMES),
    ] = None,
    batch_sizes: Annotated[
        str | None,
        typer.Option(
            metavar="N,...", help="Images at a time (default 1,8).", rich_help_panel=_TIMES
        ),
    ] = None,
    seconds: Annotated[
        float | None,
        typer.Option(
            metavar="F",
            help="For each of their combinations (default 5).",
            rich_help_panel=_TIMES,
        ),
    ] = None,
    repeats: Annotated[
        int | None,
        typer.Option(metavar="N", help="Rounds of each instead.", rich_help_panel=_TIMES),
    ] = None,
    wbits: Annotated[
        int | None, typer.Option(metavar="W", help="Bits of the weights.", rich_help_panel=_MODEL)
    ] = None,
    abits: Annotated[
        int | None,
        typer.Option(metavar="A", help="Bits of the activations.", rich_help_panel=_MODEL),
    ] = None,
    first_last_bits: Annotated[
        int | None,
        typer.Option(
            metavar="B",
            help="Bits of the first and last layer (default 8).",
            rich_help_panel=_MODEL,
        ),
    ] = None,
    residual_bits: Annotated[
        int | None,
        typer.Option(
            metavar="B",
            help="Bits of the residual stream: 8, 32 is float (default 8).",
            rich_help_panel=_MODEL,
        ),
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            readable=False,
            help="Its weights (default: random ones).",
            rich_help_panel=_MODEL,
        ),
    ] = None,
    img_size: Annotated[
        int | None,
        typer.Option(
            metavar="PX", help="Side of the input (default: the model's).", rich_help_panel=_MODEL
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(metavar="DATA", help="Images to calibrate with (default: synthetic ones)."),
    ] = None,
    calibration_images: Annotated[
        int | None, typer.Option(metavar="N", help="How many (default 32).")
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE.svg", help="Draw the result (needs mecq\\[report])."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace that file.")] = False,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Example: [bold]mecq bench deploy resnet18 --wbits 2 --abits 2[/bold]

    Latency, throughput and size of the ONNX export, of the float model, and
    of onnxruntime's own static INT8, measured in turns. Speed does not depend
    on the weights: random ones will do.
    """
    from mecq_cli.cli import render
    from mecq_cli.cli.views import deployment
    from mecq_cli.config import from_flags
    from mecq_cli.workflow.deploy_settings import DeployConfig

    config = from_flags(DeployConfig, flags_of(ctx))
    with working(quiet=quiet) as listener:
        from mecq_cli.workflow.bench_deploy import bench

        document = bench(config, listener)
    render.show(document, deployment.tables, as_json=as_json)
