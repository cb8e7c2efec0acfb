"""``mecq export``: write the integer model of a run as a file that other programs run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mecq_cli.cli import early
from mecq_cli.cli.common import DebugFlag, JsonFlag, QuietFlag, flags_of, working
from mecq_cli.cli.completion import FORMATS, one_of


def export(
    ctx: typer.Context,
    run: Annotated[
        str | None,
        typer.Argument(
            metavar="RUN",
            help="Run folder or integer artifact. Default: the latest run.",
            show_default=False,
        ),
    ] = None,
    format: Annotated[  # the flag's name is the contract, the builtin is not needed here
        str | None,
        typer.Option(
            "--format",
            "-f",
            autocompletion=one_of(*FORMATS),
            metavar="NAME",
            help="What to write: onnx (default), safetensors or compressed-tensors.",
        ),
    ] = None,
    profile: Annotated[
        str | None,
        typer.Option(
            "--profile",
            "-p",
            autocompletion=one_of("ort", "portable", "qonnx"),
            metavar="NAME",
            help="Form of the ONNX file: ort (default; packed weights, for onnxruntime), portable "
            "(int8, for others too) or qonnx.",
        ),
    ] = None,
    verify: Annotated[
        bool | None,
        typer.Option(
            "--verify/--no-verify",
            help="Replay it layer by layer, in every way there is; or do not check it at all. "
            "If not given, the logits are compared.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="Default: model.onnx in the run."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(metavar="DATA", help="Images to verify on (default: the data of the run)."),
    ] = None,
    images: Annotated[
        int | None, typer.Option(metavar="N", help="How many to verify on; 256 if not given.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that exists.")] = False,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Example: [bold]mecq export --format onnx --output model.onnx[/bold]

    Write the integer model, load it again, and compare it with the simulator
    on real images.
    docs/export.md says what the profiles are for.
    """
    from mecq_cli.cli import following, render
    from mecq_cli.cli.views.exported import exported
    from mecq_cli.config import ExportConfig, from_flags

    config = from_flags(ExportConfig, flags_of(ctx))
    early.check_target(config.run, config.data)
    with working(quiet=quiet) as listener:
        from mecq_cli.runs import latest_run
        from mecq_cli.workflow.export import export as export_run

        document = export_run(config, listener)
    render.show(document, exported, as_json=as_json)
    last = as_json or quiet or "config" in document or document.get("profile") == "qonnx"
    if not last:
        predict = ["mecq", "predict", str(document["path"]), "IMAGE"]
        of_run = config.run is None or Path(config.run).is_dir()
        name = config.run or str(latest_run().path)
        following.next_command(*([following.about_run("report", name)] if of_run else []), predict)
