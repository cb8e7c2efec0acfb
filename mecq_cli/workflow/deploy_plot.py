"""The result of `mecq bench deploy` as a picture: throughput and file size."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mecq_cli.report.figures import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = {"fp32": "#9aa5b1", "static_int8": "#5b8db8", "mecq": "#d9622b", "ideal": "#f2c9b5"}


def draw(document: Mapping[str, Any]) -> bytes:
    """An SVG file; the same document gives the same bytes.

    Raises:
        EnvironmentFailure: matplotlib is missing.
    """
    require("--plot")
    import matplotlib
    from matplotlib.figure import Figure

    names = labels(document)
    cells = document["cells"]
    with matplotlib.rc_context({"svg.hashsalt": "mecq", "svg.fonttype": "path", "font.size": 10}):
        figure = Figure(figsize=(4.5 + 1.7 * len(cells), 4.2), layout="constrained")
        speed, size = figure.subplots(1, 2, width_ratios=[max(len(cells), 1), 1.3])
        _speed(speed, cells, names)
        _size(size, document["sizes"], names)
        shape = "x".join(str(n) for n in document["input_shape"][1:])
        figure.suptitle(f"{document['model']}, {shape}: {document['machine']['cpu']}", fontsize=11)
        handles, texts = speed.get_legend_handles_labels()
        figure.legend(handles, texts, loc="outside lower center", ncols=len(texts), frameon=False)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def labels(document: Mapping[str, Any]) -> dict[str, str]:
    """What the arms are called."""
    bits = f"W{document['wbits']} A{document['abits']}"
    return {"fp32": "FP32", "static_int8": "INT8, onnxruntime", "mecq": f"mecq {bits}"}


def _speed(axes: Axes, cells: list[dict[str, Any]], names: Mapping[str, str]) -> None:
    """Images a second in groups of bars, each with its ratio to FP32."""
    width = 0.8 / len(names)
    for number, (arm, name) in enumerate(names.items()):
        places = [index + (number - 1) * width for index in range(len(cells))]
        rates = [cell["arms"][arm]["images_per_second"] for cell in cells]
        bars = axes.bar(places, rates, 0.92 * width, label=name, color=_COLOURS[arm])
        ratios = [f"{cell['arms'][arm]['speedup']['median']:.2f}x" for cell in cells]
        axes.bar_label(bars, ratios, padding=2, fontsize=8)
    axes.set_xticks(
        range(len(cells)),
        [
            f"{cell['threads']} thread{'s' * (cell['threads'] > 1)}\nbatch {cell['batch_size']}"
            for cell in cells
        ],
    )
    axes.set_ylabel("images a second")
    axes.set_title("throughput, and times FP32", fontsize=10)
    _plain(axes)


def _size(axes: Axes, sizes: Mapping[str, int], names: Mapping[str, str]) -> None:
    shown = {**names, "ideal": "ideal"}
    values = [sizes[key] / 1e6 for key in shown]
    bars = axes.bar(range(len(shown)), values, 0.7, color=[_COLOURS[key] for key in shown])
    axes.bar_label(bars, [f"{value:.2f}" for value in values], padding=2, fontsize=8)
    short = {"fp32": "FP32", "static_int8": "INT8", "mecq": "mecq", "ideal": "ideal"}
    axes.set_xticks(range(len(shown)), [short[key] for key in shown])
    axes.set_ylabel("MB")
    axes.set_title("file", fontsize=10)
    _plain(axes)


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(y=0.12)
