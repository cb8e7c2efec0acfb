"""Speed and size of the export, beside others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from rich.console import RenderableType

from mecq_cli.cli.render import Document
from mecq_cli.cli.views.cells import headed

_NAMES = {"fp32": "FP32", "static_int8": "static INT8", "mecq": "mecq"}


def tables(document: Document) -> Iterable[RenderableType]:
    """The result of ``mecq bench deploy``."""
    machine = document["machine"]
    instructions = ", ".join(machine["integer_instructions"]) or "no 8-bit products"
    shape = "x".join(str(size) for size in document["input_shape"])
    weights = f"{document['weights']} weights"
    if document["target"] != document["model"]:
        weights = f"weights of {document['target']} ({weights} in the float networks)"
    yield (
        f"{document['model']}, W{document['wbits']} A{document['abits']}, input {shape}, {weights}"
    )
    yield f"{machine['cpu']} ({instructions}), onnxruntime {machine['onnxruntime']}"
    yield _times(document["cells"])
    yield "medians; ratios of runs in the same round, in brackets their quartiles"
    yield _files(document["sizes"])
    for arm, counts in document["kernels"].items():
        shown = [f"{count} {op}" for op, count in counts.items()]
        more = f", {len(shown) - 5} other types" if len(shown) > 5 else ""
        yield f"{_NAMES[arm]} ran {', '.join(shown[:5])}{more}"


def _times(cells: Sequence[Document]) -> RenderableType:
    busy = any(cell["busy"] for cell in cells)
    titles = ["ms", "images/s", "times FP32", "times INT8", *(["by CPU time"] if busy else [])]
    table = headed("threads", "batch", "network", numbers=titles, gap=2)
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


def _by_cpu(cell: Document, arm: str) -> str:
    """Times FP32 in time of the processor, which other work does not lengthen. On one thread."""
    if arm == "fp32" or cell["threads"] > 1:
        return ""
    return f"{cell['arms'][arm]['cpu_speedup']['median']:.2f}"


def _ratio(ratio: Mapping[str, float]) -> str:
    return f"{ratio['median']:.2f} ({ratio['low']:.2f}-{ratio['high']:.2f})"


def _files(sizes: Mapping[str, int]) -> RenderableType:
    table = headed("file", numbers=("MB", "smaller than FP32", "of the ideal"), gap=2)
    for arm, name in _NAMES.items():
        size = sizes[arm]
        smaller = "" if arm == "fp32" else f"{sizes['fp32'] / size:.1f}x"
        ideal = f"{size / sizes['ideal']:.3f}" if arm == "mecq" else ""
        table.add_row(name, f"{size / 1e6:.2f}", smaller, ideal)
    return table
