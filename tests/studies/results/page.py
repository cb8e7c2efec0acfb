"""Fills docs/results.md, and the table of README.md, from the records."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mecq_cli.storage import atomic_write
from tests.studies.results.curves import draw
from tests.studies.results.queue import FOLDER
from tests.studies.results.summary import summary
from tests.studies.results.tables import TABLES, Bits, Table

PAGE = FOLDER.parent / "results.md"
README = FOLDER.parents[1] / "README.md"

Record = Mapping[str, Any]


def fill() -> None:
    """Draw the curves, and put everything into the pages."""
    draw(FOLDER)
    for page, fresh in ((PAGE, filled), (README, summarised)):
        text = fresh(page.read_text(encoding="utf-8"), FOLDER)
        atomic_write(page, text.encode(), force=True)


def summarised(text: str, folder: Path) -> str:
    """The front page with its table."""
    return _put(text, README, {"measured": "\n".join(summary(_records(folder)))})


def filled(text: str, folder: Path) -> str:
    """The page with each table, and the curves, of ``folder`` between their marks."""
    records = _records(folder)
    parts = {"curves": "![How they learned](results/curves.svg)"}
    if not (folder / "curves.svg").exists():
        parts["curves"] = "No final model is finished yet."
    for name, table in TABLES.items():
        mine = [r for r in records if r["table"] == name]
        rows = _final(table, mine) if table.keep_artifact else _compare(table, mine)
        parts[name] = "\n".join(rows)
    return _put(text, PAGE, parts)


def _records(folder: Path) -> list[Record]:
    return [json.loads(p.read_text()) for p in sorted((folder / "runs").glob("*.json"))]


def _put(text: str, page: Path, parts: Mapping[str, str]) -> str:
    """Each part between its marks."""
    for name, part in parts.items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        text, found = re.subn(pattern, lambda m: f"{m[1]}{part}\n{m[2]}", text, flags=re.S)  # noqa: B023
        if found != 1:
            raise SystemExit(f"{page}: no place for {name}")
    return text


def _compare(table: Table, records: Sequence[Record]) -> Iterable[str]:
    more = " divergence | weights, kB |" if table.finely else ""
    yield f"| bits | arm | seeds | mean | spread | drop from FP | minutes |{more}"
    yield f"|---|---|---|---|---|---|---|{'---|---|' if more else ''}"
    for bits, arms in table.arms.items():
        for arm in arms:
            mine = _of(records, bits, arm.name)
            cells = f"| {_label(bits)} | {arm.name} | {_cells(mine, len(table.seeds))} |"
            yield f"{cells} {_divergence(mine)} | {_size(mine)} |" if more else cells


def _divergence(records: Sequence[Record]) -> str:
    """From the float model, the mean over the seeds with their spread, in nats."""
    if not records:
        return ""
    found = [float(r["divergence"]) for r in records]
    spread = f" +- {statistics.stdev(found):.4f}" if len(found) > 1 else ""
    return f"{statistics.fmean(found):.4f}{spread}"


def _size(records: Sequence[Record]) -> str:
    """Of the weights with scales and biases, the mean over the seeds: each may allot otherwise."""
    if not records:
        return ""
    return f"{statistics.fmean(int(r['weight_bytes']) for r in records) / 1000:.1f}"


def _of(records: Sequence[Record], bits: Bits, arm: str) -> list[Record]:
    mine = [r for r in records if (r["wbits"], r["abits"]) == bits and r["arm"] == arm]
    return sorted(mine, key=lambda r: int(r["seed"]))


def _label(bits: Bits) -> str:
    return f"W{bits[0]:g} A{bits[1]}"


def _cells(records: Sequence[Record], wanted: int) -> str:
    if not records:
        return "not run yet | | | | "
    top1 = [float(r["top1"]) for r in records]
    mean = statistics.fmean(top1)
    spread = f"{statistics.stdev(top1):.2f}" if len(top1) > 1 else ""
    drop = float(records[0]["fp_top1"]) - mean
    minutes = statistics.fmean(float(r["seconds"]) for r in records) / 60
    seeds = ", ".join(f"{v:.2f}" for v in top1)
    missing = "" if len(top1) == wanted else f" ({len(top1)} of {wanted})"
    return f"{seeds}{missing} | {mean:.2f} | {spread} | {drop:.2f} | {minutes:.1f}"


def _final(table: Table, records: Sequence[Record]) -> Iterable[str]:
    yield "| bits | epochs | top-1 | drop from FP | artifact | hours |"
    yield "|---|---|---|---|---|---|"
    for bits, arms in table.arms.items():
        for arm in arms:
            mine = _of(records, bits, arm.name)
            if not mine:
                yield f"| {_label(bits)} | | not run yet | | | |"
                continue
            top1 = statistics.fmean(float(r["top1"]) for r in mine)
            drop = float(mine[0]["fp_top1"]) - top1
            hours = statistics.fmean(float(r["seconds"]) for r in mine) / 3600
            name = f"{table.model}-w{bits[0]}a{bits[1]}.safetensors"
            path = FOLDER / name
            size = f"[{path.stat().st_size / 1000:.0f} kB](results/{name})" if path.exists() else ""
            epochs = mine[0]["epochs"]
            yield f"| {_label(bits)} | {epochs} | {top1:.2f} | {drop:.2f} | {size} | {hours:.1f} |"
