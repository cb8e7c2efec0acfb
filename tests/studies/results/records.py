"""What the pages are made of: a record of each run, and how they are summed up."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.studies.results.tables import Bits, Table

Record = Mapping[str, Any]


def records_in(folder: Path) -> list[Record]:
    """All of them."""
    return [json.loads(p.read_text()) for p in sorted((folder / "runs").glob("*.json"))]


def runs_of(records: Sequence[Record], table: Table, bits: Bits, arm: str) -> list[Record]:
    """Those of a row, in the order of their seeds."""
    wanted = (table.name, *bits, arm)
    mine = [r for r in records if (r["table"], r["wbits"], r["abits"], r["arm"]) == wanted]
    return sorted(mine, key=lambda r: int(r["seed"]))


def label(bits: Bits) -> str:
    """As the pages write them."""
    return f"W{bits[0]:g} A{bits[1]}"


def mean(records: Sequence[Record]) -> float:
    """Of top-1."""
    return statistics.fmean(float(r["top1"]) for r in records)


def spread(records: Sequence[Record], form: str) -> str:
    """Its standard deviation in a ``form`` such as " ({})"; empty for one run."""
    top1 = [float(r["top1"]) for r in records]
    return form.format(f"{statistics.stdev(top1):.2f}") if len(top1) > 1 else ""


def drop(records: Sequence[Record]) -> float:
    """From the FP network to the mean."""
    return float(records[0]["fp_top1"]) - mean(records)
