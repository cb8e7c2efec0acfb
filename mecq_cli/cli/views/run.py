"""The result of a run."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import RenderableType
from rich.table import Table

from mecq_cli.cli.live import duration
from mecq_cli.cli.render import Document
from mecq_cli.cli.views.cells import drop, megabytes, pairs, percent, plain, title
from mecq_cli.cli.views.exported import exported
from mecq_cli.tasks.figures import figures_of


def summary(document: Document) -> Iterable[RenderableType]:
    """The result of ``mecq quantize``."""
    yield title(f"{document['model']}, W{document['wbits']} A{document['abits']}")
    table = pairs()
    of = figures_of(document)
    reference = document.get(f"fp_{of.key}")
    if document.get("fp_trained", True):
        table.add_row(f"float {of.label}", percent(reference))
    else:
        table.add_row(f"float {of.label}", f"{percent(reference)}  (untrained: no measure)")
        reference = None
    for key, label in (
        (f"simulator_{of.key}", "quantized, simulator"),
        (of.key, "quantized, integer"),
    ):
        table.add_row(label, percent(document.get(key)) + drop(document.get(key), reference))
    add_allotment(table, document.get("allotment"))
    add_sizes(table, document.get("sizes"))
    if document.get("images"):
        table.add_row("measured on", f"{document['images']} images")
    if document.get("resumed_at") is not None:
        table.add_row("resumed at", f"step {document['resumed_at']}")
    if document.get("seconds") is not None:
        table.add_row("time", duration(document["seconds"]))
    table.add_row("run", plain(document["run"]))
    yield table


def demo(document: Document) -> Iterable[RenderableType]:
    """The result of ``mecq demo``: of the run, and of each file that was exported."""
    yield from summary(document)
    for export in document.get("exports", ()):
        yield from exported(export)


def add_sizes(table: Table, sizes: Document | None) -> None:
    """What is None is not known, as the float size of a lone artifact may be."""
    if not sizes:
        return
    size = megabytes(sizes["packed_bytes"])
    if sizes.get("fp32_bytes") and sizes.get("ratio"):
        size = f"{megabytes(sizes['fp32_bytes'])} -> {size}, {sizes['ratio']:.1f} times smaller"
    table.add_row("size", size)
    if sizes.get("ideal_bytes"):
        over = 100 * (sizes["packed_bytes"] / sizes["ideal_bytes"] - 1)
        table.add_row("ideal size", f"{megabytes(sizes['ideal_bytes'])} ({over:+.1f} %)")


def add_allotment(table: Table, allotment: Document | None) -> None:
    """What a target came to: average and bytes, and how it was met."""
    if not allotment:
        return
    bits = str(allotment["target_avg_bits"]).removesuffix(".0")
    asked = allotment["target_size"] or f"{bits} bits"
    reached = f"{allotment['average_bits']:.2f} bits a weight on average, "
    reached += f"{megabytes(allotment['weight_bytes'])} with scales and biases"
    table.add_row("weights", f"{reached} (target: {plain(asked)})")
    if allotment.get("seconds") is None:
        return
    if allotment["optimal"]:
        proven = "the optimum"
    elif allotment["gap"] is None:
        proven = "not proven to be the optimum"
    else:
        proven = f"within {100 * allotment['gap']:.2g} %"
    table.add_row(
        "allotted by",
        f"{allotment['sensitivity']}, {proven}; {allotment['images']} images, "
        f"{duration(allotment['seconds'])}",
    )
