"""Fills docs/results.md, and the table of README.md, from the records."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from mecq_cli.storage import atomic_write
from tests.studies.results.curves import draw
from tests.studies.results.queue import FOLDER
from tests.studies.results.records import Record, drop, label, mean, records_in, runs_of, spread
from tests.studies.results.summary import summary
from tests.studies.results.tables import TABLES, Table

PAGE = FOLDER.parent / "results.md"
README = FOLDER.parents[1] / "README.md"


def fill() -> None:
    """Draw the curves, and put everything into the pages."""
    draw(FOLDER)
    for page, fresh in ((PAGE, filled), (README, summarised)):
        text = fresh(page.read_text(encoding="utf-8"), FOLDER)
        atomic_write(page, text.encode(), force=True)


def summarised(text: str, folder: Path) -> str:
    """The front page with its table."""
    return _put(text, README, {"measured": "\n".join(summary(records_in(folder)))})


def filled(text: str, folder: Path) -> str:
    """The page with each table, and the curves, of ``folder`` between their marks."""
    records = records_in(folder)
    parts = {"curves": "![How they learned](results/curves.svg)"}
    if not (folder / "curves.svg").exists():
        parts["curves"] = "No final model is finished yet."
    for name, table in TABLES.items():
        rows = (_final if table.keep_artifact else _compare)(table, records)
        parts[name] = "\n".join(rows)
    return _put(text, PAGE, parts)


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
            mine = runs_of(records, table, bits, arm.name)
            cells = f"| {label(bits)} | {arm.name} | {_cells(mine, len(table.seeds))} |"
            yield f"{cells} {_divergence(mine)} | {_size(mine)} |" if more else cells


def _divergence(records: Sequence[Record]) -> str:
    """From the float model, the mean over the seeds with their spread, in nats."""
    if not records:
        return ""
    found = [float(r["divergence"]) for r in records]
    width = f" +- {statistics.stdev(found):.4f}" if len(found) > 1 else ""
    return f"{statistics.fmean(found):.4f}{width}"


def _size(records: Sequence[Record]) -> str:
    """Of the weights with scales and biases, the mean over the seeds: each may allot otherwise."""
    if not records:
        return ""
    return f"{statistics.fmean(int(r['weight_bytes']) for r in records) / 1000:.1f}"


def _cells(records: Sequence[Record], wanted: int) -> str:
    if not records:
        return "not run yet | | | | "
    minutes = statistics.fmean(float(r["seconds"]) for r in records) / 60
    seeds = ", ".join(f"{float(r['top1']):.2f}" for r in records)
    missing = "" if len(records) == wanted else f" ({len(records)} of {wanted})"
    figures = f"{mean(records):.2f} | {spread(records, '{}')} | {drop(records):.2f}"
    return f"{seeds}{missing} | {figures} | {minutes:.1f}"


def _final(table: Table, records: Sequence[Record]) -> Iterable[str]:
    yield "| bits | epochs | top-1 | drop from FP | artifact | hours |"
    yield "|---|---|---|---|---|---|"
    for bits, arms in table.arms.items():
        for arm in arms:
            mine = runs_of(records, table, bits, arm.name)
            if not mine:
                yield f"| {label(bits)} | | not run yet | | | |"
                continue
            hours = statistics.fmean(float(r["seconds"]) for r in mine) / 3600
            name = f"{table.model}-w{bits[0]}a{bits[1]}.safetensors"
            path = FOLDER / name
            size = f"[{path.stat().st_size / 1000:.0f} kB](results/{name})" if path.exists() else ""
            epochs = mine[0]["epochs"]
            top1 = f"{mean(mine):.2f} | {drop(mine):.2f}"
            yield f"| {label(bits)} | {epochs} | {top1} | {size} | {hours:.1f} |"
