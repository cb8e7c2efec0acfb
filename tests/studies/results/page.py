"""Fills the tables of docs/results.md from the records."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mecq_cli.storage import atomic_write
from tests.studies.results.queue import FOLDER
from tests.studies.results.tables import TABLES, Bits, Table

PAGE = FOLDER.parent / "results.md"

Record = Mapping[str, Any]


def fill() -> None:
    """Put each table between its marks."""
    text = PAGE.read_text(encoding="utf-8")
    records = [json.loads(p.read_text()) for p in sorted((FOLDER / "runs").glob("*.json"))]
    for name, table in TABLES.items():
        mine = [r for r in records if r["table"] == name]
        rows = "\n".join(_final(table, mine) if table.keep_artifact else _compare(table, mine))
        pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        text, found = re.subn(pattern, lambda m: f"{m[1]}{rows}\n{m[2]}", text, flags=re.S)  # noqa: B023
        if found != 1:
            raise SystemExit(f"{PAGE}: no place for the table {name}")
    atomic_write(PAGE, text.encode(), force=True)


def _compare(table: Table, records: Sequence[Record]) -> Iterable[str]:
    yield "| bits | arm | seeds | mean | spread | drop from FP | minutes |"
    yield "|---|---|---|---|---|---|---|"
    for bits, arms in table.arms.items():
        for arm in arms:
            mine = _of(records, bits, arm.name)
            yield f"| {_label(bits)} | {arm.name} | {_cells(mine, len(table.seeds))} |"


def _of(records: Sequence[Record], bits: Bits, arm: str) -> list[Record]:
    mine = [r for r in records if (r["wbits"], r["abits"]) == bits and r["arm"] == arm]
    return sorted(mine, key=lambda r: int(r["seed"]))


def _label(bits: Bits) -> str:
    return f"W{bits[0]} A{bits[1]}"


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
