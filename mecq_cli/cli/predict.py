"""``mecq predict``: what is in these images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mecq_cli.cli import early
from mecq_cli.cli.common import DebugFlag, JsonFlag, QuietFlag, flags_of, working


def predict(
    ctx: typer.Context,
    target: Annotated[
        str,
        typer.Argument(
            metavar="TARGET",
            help="Run folder, .safetensors artifact or .onnx file.",
            show_default=False,
        ),
    ],
    images: Annotated[
        list[Path],
        typer.Argument(metavar="IMAGE", help="One or more image files.", show_default=False),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="DIR",
            help="Of a network that segments or detects: where its files go (default: here).",
        ),
    ] = None,
    force: Annotated[bool | None, typer.Option("--force", help="Replace files that exist.")] = None,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Example: [bold]mecq predict runs/latest cat.jpg dog.png[/bold]

    The five most probable classes of each image. Of a network that segments: how much of the image
    each class covers, its mask as a PNG, and the mask drawn over the picture. Of one that detects:
    the boxes as JSON, and drawn onto the picture.
    """
    from mecq_cli.cli import render
    from mecq_cli.cli.views.predictions import predictions
    from mecq_cli.config import PredictConfig, from_flags

    config = from_flags(PredictConfig, flags_of(ctx))
    early.check_target(config.target)
    with working(quiet=quiet) as listener:
        from mecq_cli.workflow.predict import predict as predict_images

        document = predict_images(config, listener)
    render.show(document, predictions, as_json=as_json)
