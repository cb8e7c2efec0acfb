"""Tables: nothing cut, nothing taken for markup, 80 columns on a terminal."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console

from mecq_cli.cli.render import View
from mecq_cli.cli.views.predictions import predictions
from mecq_cli.cli.views.run import demo
from mecq_cli.cli.views.sites import sites

SITES = [
    {
        "layer": f"blocks.{index}.0.conv_dw",
        "type": "conv2d",
        "shape": [576, 1, 5, 5],
        "wbits": 2 if index else 8,
        "abits": None if index == 3 else 4,
        "weight_scale_min": 0.0012,
        "weight_scale_max": 0.045 if index else 0.0012,
        "activation_scale": 0.0123,
        "packed_bytes": 12_345_678,
        "note": None if index else "first layer",
    }
    for index in range(5)
]
TOTALS = {"fp32_bytes": 46_700_000, "packed_bytes": 3_400_000, "ideal_bytes": 3_360_000}


def drawn(view: View, document: dict[str, Any], width: int = 80) -> list[str]:
    console = Console(file=io.StringIO(), width=width, highlight=False)
    for part in view(document):
        console.print(part)
    assert isinstance(console.file, io.StringIO)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def test_the_site_table_fits_a_terminal_and_keeps_every_number() -> None:
    document = {"sites": SITES, "totals": {**TOTALS, "ratio": 13.7}}
    lines = drawn(sites, document)
    assert max(map(len, lines)) <= 80
    text = " ".join(lines)
    for part in ("8/4", "2/4", "2/-", "1.2e-03..4.5e-02", "1.2e-02", "12,345,678"):
        assert part in text
    assert "46.70 MB -> 3.40 MB, 13.7 times smaller" in text
    assert "first layer: blocks.0.0.conv_dw" in text
    wide = "\n".join(drawn(sites, document, width=200))
    assert "blocks.4.0.conv_dw conv2d 576x1x5x5" in wide


def test_a_dry_run_shows_only_the_columns_it_has() -> None:
    keys = ("layer", "type", "shape", "wbits", "abits", "note")
    rows = [{key: row[key] for key in keys} for row in SITES]
    lines = drawn(sites, {"sites": rows, "sizes": {**TOTALS, "ratio": 13.7}})
    assert lines[0].split() == ["layer", "type", "shape", "W/A"]
    assert "3.40 MB" in " ".join(lines)


def test_names_are_neither_markup_nor_terminal_commands() -> None:
    candidate = {"class": "[red]cat\x1b[2J", "index": 3, "probability": 0.9731}
    document = {"target": "t", "predictions": [{"image": "[b]a.jpg", "top5": [candidate]}]}
    assert drawn(predictions, document) == ["[b]a.jpg", r" 97.31 %  [red]cat\x1b[2J (3)"]


def test_the_demo_shows_the_run_and_every_exported_file() -> None:
    document = {
        "run": "runs/demo",
        "model": "digits",
        "wbits": 2,
        "abits": 2,
        "fp_top1": 98.0,
        "top1": 96.5,
        "simulator_top1": 96.5,
        "sizes": {**TOTALS, "ratio": 13.7},
        "exports": [
            {"path": f"m.{kind}", "format": kind, "bytes": 900, "verified": True, "images": 360}
            for kind in ("onnx", "safetensors")
        ],
    }
    text = "\n".join(drawn(demo, document))
    assert "96.50 %  (-1.50)" in text
    assert text.count("equal to the simulator on 360 images") == 2
    assert "m.safetensors" in text
