"""``mecq eval``: the accuracy of a run, an artifact, an ONNX file or a float model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mecq_cli.cli import early
from mecq_cli.cli.common import DebugFlag, JsonFlag, QuietFlag, flags_of, working
from mecq_cli.cli.completion import TASKS, model_names, one_of

if TYPE_CHECKING:
    from mecq_cli.config import EvalConfig


def evaluate(
    ctx: typer.Context,
    target: Annotated[
        str | None,
        typer.Argument(
            metavar="TARGET",
            help="Run folder, .safetensors artifact, .onnx file or model name (float). Default: "
            "the latest run.",
            show_default=False,
            autocompletion=model_names,
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="DATA", help="Images, as in mecq quantize (default: the data of the run)."
        ),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            autocompletion=one_of(*TASKS),
            metavar="NAME",
            help="What the target does: classify, segment or detect (default auto: what it is "
            "made for).",
        ),
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", readable=False, help="Weights of a float model: .pth or .safetensors."
        ),
    ] = None,
    pretrained: Annotated[
        bool | None,
        typer.Option(
            "--pretrained/--no-pretrained",
            help="Without --checkpoint: the library's weights, or random ones.",
            show_default=False,
        ),
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Folder in DIR (default: the first of val, valid, validation, test).",
        ),
    ] = None,
    simulator: Annotated[
        bool,
        typer.Option("--simulator", help="Of a run: the simulator, not the integer artifact."),
    ] = False,
    img_size: Annotated[
        int | None, typer.Option(metavar="PX", help="Side of the input (default: the model's).")
    ] = None,
    crop_pct: Annotated[
        float | None,
        typer.Option(
            metavar="F", help="Share of the image that is kept (default: the model's). 1 keeps all."
        ),
    ] = None,
    batch_size: Annotated[int | None, typer.Option(metavar="N", help="Images at a time.")] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Loader processes (default: one a core with a GPU, else 0)."
        ),
    ] = None,
    device: Annotated[
        str | None, typer.Option(metavar="NAME", help="cpu, cuda, cuda:1, ... (default auto).")
    ] = None,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Example: [bold]mecq eval runs/latest --data DIR[/bold]

    Measure top-1 and top-5 accuracy; of what segments mean IoU and pixel accuracy,
    of what detects mean average precision.
    """
    from mecq_cli.cli import following, render
    from mecq_cli.cli.views.evaluation import evaluation
    from mecq_cli.config import EvalConfig, from_flags

    config = from_flags(EvalConfig, flags_of(ctx))
    early.check_target(config.target, config.data, config.checkpoint)
    with working(quiet=quiet) as listener:
        from mecq_cli.workflow.evaluate import evaluate as evaluate_target

        document = evaluate_target(config, listener)
    render.show(document, evaluation, as_json=as_json)
    command = _following(config, document)
    if command and not (as_json or quiet):
        following.next_command(command)


def _following(config: EvalConfig, document: Mapping[str, Any]) -> list[str] | None:
    """After a float model its quantization, after a run its export or its report."""
    from mecq_cli.cli import following

    if document["kind"] != "model":
        return following.after_look(str(document["target"]), config.data)
    words = ["mecq", "quantize", str(document["target"]), "--wbits", "4", "--abits", "4"]
    for flag, value in (
        ("--data", config.data),
        ("--checkpoint", config.checkpoint),
        ("--img-size", config.img_size),
        ("--crop-pct", config.crop_pct),
    ):
        words += [] if value is None else [flag, str(value)]
    words += ["--val-split", "0.1"] if config.split == "." else []
    return [*words, *([] if config.pretrained else ["--no-pretrained"])]
