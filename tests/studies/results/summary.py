"""The table of README.md: of every network what the default reaches, and what others do."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from tests.studies.results.tables import (
    COMPARE,
    DEEPER,
    DEFAULT,
    FINAL,
    FINAL56,
    LITE0,
    LSQ,
    VIT,
    WITHOUT,
    Arm,
    Bits,
    Table,
)

Record = Mapping[str, Any]


class Part(NamedTuple):
    """Rows from one table of docs/results.md.

    Attributes:
        network: as the first of them names it; empty: that of the rows above.
        table: where they are from.
        images: that it was trained on.
        bits: of the rows; empty: all that the table has.
    """

    network: str
    table: Table
    images: str
    bits: Sequence[Bits] = ()


PARTS = (
    Part("ResNet-20, CIFAR-10", FINAL, "50,000"),
    Part("", COMPARE, "10,000", ((4, 4), (2, 2), (1, 2), (1, 1))),
    Part("ResNet-56, CIFAR-10", FINAL56, "50,000"),
    Part("", DEEPER, "10,000"),
    Part("EfficientNet-Lite0, 10 classes of ImageNet, 96 px", LITE0, "2,000"),
    Part("a ViT of 0.46 M weights, CIFAR-10", VIT, "50,000"),
)


def summary(records: Sequence[Record]) -> Iterable[str]:
    """The lines of the table; one that has no record yet is left out."""
    yield "| network and data | bits | images, epochs | FP | mecq | drop | without its term | LSQ |"
    yield "|---|---|---|---|---|---|---|---|"
    for part in PARTS:
        network = part.network
        for bits in part.bits or sorted(part.table.arms, key=sum, reverse=True):
            found = _of(records, part.table, bits, DEFAULT)
            if not found:
                continue
            fp = float(found[0]["fp_top1"])
            drop = fp - statistics.fmean(float(r["top1"]) for r in found)
            others = (_shown(_of(records, part.table, bits, arm)) for arm in (WITHOUT, LSQ))
            cells = (
                network,
                f"W{bits[0]:g} A{bits[1]}",
                f"{part.images}, {found[0]['epochs']}",
                f"{fp:.2f}",
                _shown(found),
                f"{drop:.2f}",
                *others,
            )
            yield f"| {' | '.join(cells)} |"
            network = ""


def _of(records: Sequence[Record], table: Table, bits: Bits, arm: Arm) -> list[Record]:
    wanted = (table.name, *bits, arm.name)
    return [r for r in records if (r["table"], r["wbits"], r["abits"], r["arm"]) == wanted]


def _shown(records: Sequence[Record]) -> str:
    """The mean and, in parentheses, the spread."""
    top1 = [float(r["top1"]) for r in records]
    if not top1:
        return ""
    spread = f" ({statistics.stdev(top1):.2f})" if len(top1) > 1 else ""
    return f"{statistics.fmean(top1):.2f}{spread}"
