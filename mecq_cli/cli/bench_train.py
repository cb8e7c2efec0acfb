"""``mecq bench train``: the cost of a training step."""

from __future__ import annotations

from typing import Annotated

import typer

from mecq_cli.cli.common import DebugFlag, JsonFlag, QuietFlag, working


def train(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="As for mecq quantize.")],
    wbits: Annotated[int, typer.Option(metavar="W", help="Bits of the weights.")] = 2,
    abits: Annotated[int, typer.Option(metavar="A", help="Bits of the activations.")] = 2,
    batch_size: Annotated[int, typer.Option(min=2, metavar="N", help="Images a step.")] = 128,
    img_size: Annotated[
        int | None, typer.Option(min=1, metavar="PX", help="Side (default: the model's own).")
    ] = None,
    rounds: Annotated[
        int, typer.Option(min=1, metavar="N", help="Timed steps of each arm, in turns.")
    ] = 15,
    compile: Annotated[
        str, typer.Option(metavar="WHAT", help="The same for all arms, as in mecq quantize.")
    ] = "auto",
    amp: Annotated[str, typer.Option(metavar="WHAT", help="The same for all.")] = "auto",
    mec_on: Annotated[str | None, typer.Option(metavar="WHAT", help="As for quantize.")] = None,
    mec_views: Annotated[str | None, typer.Option(metavar="VIEWS", help="As for quantize.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:1.")] = "auto",
    threads: Annotated[
        int | None, typer.Option(min=1, max=1024, help="CPU threads (default: PyTorch's).")
    ] = None,
    memory: Annotated[
        bool, typer.Option("--memory/--no-memory", help="Peak memory, in processes of their own.")
    ] = True,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Example: [bold]mecq bench train resnet18 --batch-size 8[/bold]

    Time and memory of a training step: of the FP network, with quantizers,
    with the regularizer.
    """
    from mecq_cli.cli import render
    from mecq_cli.cli.views import training_step
    from mecq_cli.config import resolve

    flags = {
        "model": model,
        "wbits": wbits,
        "abits": abits,
        "data": ".",
        "img_size": img_size,
        "compile": compile,
        "amp": amp,
        "mec_on": mec_on,
        "mec_views": mec_views,
        "device": device,
    }
    config, _ = resolve(None, flags)
    with working(quiet=quiet) as listener:
        import torch

        from mecq_cli.workflow.bench_train import Bench, bench_train

        if threads is not None:
            torch.set_num_threads(threads)
        document = bench_train(Bench(config, batch_size, rounds, memory), listener)
    render.show(document, training_step.tables, as_json=as_json)
