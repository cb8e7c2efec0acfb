"""``mecq bench train``: the cost of a training step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mecq_cli.cli.common import DebugFlag, JsonFlag, QuietFlag, working

if TYPE_CHECKING:
    from rich.console import RenderableType


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
        str, typer.Option(metavar="auto|model|quantizers|off", help="The same for all arms.")
    ] = "auto",
    amp: Annotated[str, typer.Option(metavar="auto|bf16|off", help="The same for all.")] = "auto",
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
    render.show(document, _table, as_json=as_json)


def _table(document: Mapping[str, Any]) -> Iterable[RenderableType]:
    from rich.table import Table

    machine = document["machine"]
    yield (
        f"{document['model']} W{document['wbits']} A{document['abits']}, batch of "
        f"{document['batch_size']}, compile {document['compile']}, {document['device']}, "
        f"{machine['threads']} threads, torch {machine['torch']}"
    )
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("step of", overflow="fold")
    for title in ("ms", "x FP", "images/s", "peak MB"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in document["rows"]:
        peak = "-" if row["peak_mb"] is None else f"{row['peak_mb']:.0f}"
        cells = (f"{row['step_ms']:.1f}", f"{row['ratio']:.2f}", f"{row['images_per_second']:.0f}")
        table.add_row(row["what"], *cells, peak)
    yield table
    yield f"the regularizer's share of its step: {100 * document['regularizer_share']:.1f} %"
