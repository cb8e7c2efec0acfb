"""``mecq bench mec``: the entropy regularizer against the same recipe without it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mecq_cli.cli.common import DebugFlag, JsonFlag, QuietFlag, working


def mec(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="As for mecq quantize.")],
    wbits: Annotated[int, typer.Option(metavar="W", help="Bits of the weights.")],
    abits: Annotated[int, typer.Option(metavar="A", help="Bits of the activations.")],
    data: Annotated[str, typer.Option(metavar="DATA", help="Images, as in mecq quantize.")],
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="DIR", help="Keeps the runs; started again, it goes on."
        ),
    ],
    epochs: Annotated[int, typer.Option(metavar="N", help="The same for every arm.")],
    checkpoint: Annotated[
        Path | None, typer.Option(metavar="FILE", readable=False, help="Weights to start from.")
    ] = None,
    arms: Annotated[
        str,
        typer.Option(metavar="NAME;...", help="Some of mecq bench arms ('all': days of work)."),
    ] = "default;none",
    seeds: Annotated[int, typer.Option(min=1, metavar="N", help="Runs of each arm.")] = 3,
    per_class: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Training images of each class.")
    ] = None,
    tune: Annotated[
        bool, typer.Option("--tune", help="Evaluate on a tenth held out of train, not on val.")
    ] = False,
    img_size: Annotated[int | None, typer.Option(metavar="PX", help="Side of the input.")] = None,
    max_steps: Annotated[int | None, typer.Option(metavar="N", help="Stop runs early.")] = None,
    compile: Annotated[
        str | None, typer.Option(metavar="WHAT", help="As for mecq quantize.")
    ] = None,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Example: [bold]mecq bench mec resnet20_cifar --wbits 2 --abits 2 --data DIR ...[/bold]

    Quantize once for each arm and seed, with everything else equal, and
    tabulate the accuracy. By default the recipe is compared with the same
    recipe without the regularizer.
    """
    from mecq_cli.cli import render
    from mecq_cli.cli.views import study as views
    from mecq_cli.config import resolve

    flags = {
        "model": model,
        "wbits": wbits,
        "abits": abits,
        "data": data,
        "output": output,
        "epochs": epochs,
        "checkpoint": checkpoint,
        "img_size": img_size,
        "max_steps": max_steps,
        "compile": compile,
    }
    base, _ = resolve(None, flags)
    with working(quiet=quiet) as listener:
        from mecq_cli.workflow.arms import ARMS
        from mecq_cli.workflow.study import Study, run_study

        names = list(ARMS) if arms == "all" else [name.strip() for name in arms.split(";")]
        study = Study(base, names, range(seeds), per_class, tune)
        document = run_study(study, listener)
    render.show(document, views.tables, as_json=as_json)


def arms(as_json: JsonFlag = False, quiet: QuietFlag = False, debug: DebugFlag = False) -> None:
    """Example: [bold]mecq bench arms[/bold]

    What `mecq bench mec --arms` can compare: names, and their settings.
    """
    from mecq_cli.cli import render
    from mecq_cli.cli.views import study as views
    from mecq_cli.workflow.arms import ARMS

    render.show({"arms": ARMS}, views.arms, as_json=as_json)
