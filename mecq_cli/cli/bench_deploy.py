"""``mecq bench deploy``: how fast and how small the export is, beside what it competes with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mecq_cli.cli.common import DebugFlag, JsonFlag, QuietFlag, flags_of, working

if TYPE_CHECKING:
    from rich.console import RenderableType

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
            metavar="FILE", help="Its weights (default: random ones).", rich_help_panel=_MODEL
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
    from mecq_cli.config import from_flags
    from mecq_cli.workflow.deploy_settings import DeployConfig

    config = from_flags(DeployConfig, flags_of(ctx))
    with working(quiet=quiet) as listener:
        from mecq_cli.workflow.bench_deploy import bench

        document = bench(config, listener)
    render.show(document, _tables, as_json=as_json)


_NAMES = {"fp32": "FP32", "static_int8": "static INT8", "mecq": "mecq"}


def _tables(document: Mapping[str, Any]) -> Iterable[RenderableType]:
    machine = document["machine"]
    instructions = ", ".join(machine["integer_instructions"]) or "no 8-bit products"
    shape = "x".join(str(size) for size in document["input_shape"])
    yield (
        f"{document['model']}, W{document['wbits']} A{document['abits']}, input {shape}, "
        f"{document['weights']} weights"
    )
    yield f"{machine['cpu']} ({instructions}), onnxruntime {machine['onnxruntime']}"
    yield _times(document["cells"])
    yield "medians; ratios of runs in the same round, in brackets their quartiles"
    yield _files(document["sizes"])
    for arm, counts in document["kernels"].items():
        shown = [f"{count} {op}" for op, count in counts.items()]
        more = f", {len(shown) - 5} other types" if len(shown) > 5 else ""
        yield f"{_NAMES[arm]} ran {', '.join(shown[:5])}{more}"


def _times(cells: Sequence[Mapping[str, Any]]) -> RenderableType:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for title in ("threads", "batch"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("network", no_wrap=True)
    titles = ["ms", "images/s", "times FP32", "times INT8"]
    busy = any(cell["busy"] for cell in cells)
    for title in [*titles, "by CPU time"] if busy else titles:
        table.add_column(title, justify="right", no_wrap=True)
    for cell in cells:
        first = [str(cell["threads"]), str(cell["batch_size"])]
        for arm, name in _NAMES.items():
            numbers = cell["arms"][arm]
            table.add_row(
                *first,
                name,
                f"{numbers['latency_ms']:.2f}",
                f"{numbers['images_per_second']:.1f}",
                "" if arm == "fp32" else _ratio(numbers["speedup"]),
                _ratio(cell["mecq_over_static_int8"]) if arm == "mecq" else "",
                *([_by_cpu(cell, arm)] if busy else []),
            )
            first = ["", ""]
    return table


def _by_cpu(cell: Mapping[str, Any], arm: str) -> str:
    """Times FP32 in time of the processor, which other work does not lengthen. On one thread."""
    if arm == "fp32" or cell["threads"] > 1:
        return ""
    return f"{cell['arms'][arm]['cpu_speedup']['median']:.2f}"


def _ratio(ratio: Mapping[str, float]) -> str:
    return f"{ratio['median']:.2f} ({ratio['low']:.2f}-{ratio['high']:.2f})"


def _files(sizes: Mapping[str, int]) -> RenderableType:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("file", no_wrap=True)
    for title in ("MB", "smaller than FP32", "of the ideal"):
        table.add_column(title, justify="right", no_wrap=True)
    for arm, name in _NAMES.items():
        size = sizes[arm]
        smaller = "" if arm == "fp32" else f"{sizes['fp32'] / size:.1f}x"
        ideal = f"{size / sizes['ideal']:.3f}" if arm == "mecq" else ""
        table.add_row(name, f"{size / 1e6:.2f}", smaller, ideal)
    return table
