"""The table of README.md: of every network what the default reaches, and what others do."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from tests.studies.results.records import Record, drop, label, mean, runs_of, spread
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
    Bits,
    Table,
)


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
            found, *others = (
                runs_of(records, part.table, bits, arm.name) for arm in (DEFAULT, WITHOUT, LSQ)
            )
            if not found:
                continue
            cells = (
                network,
                label(bits),
                f"{part.images}, {found[0]['epochs']}",
                f"{float(found[0]['fp_top1']):.2f}",
                _shown(found),
                f"{drop(found):.2f}",
                *map(_shown, others),
            )
            yield f"| {' | '.join(cells)} |"
            network = ""


def _shown(records: Sequence[Record]) -> str:
    """The mean and, in parentheses, the spread."""
    return f"{mean(records):.2f}{spread(records, ' ({})')}" if records else ""
