"""Which layers there are bits to choose for, and which numbers of bits."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mecq_cli.insertion import QuantizedModel
from mecq_cli.sites import ProductSite

CANDIDATES = (1, 2, 3, 4, 6, 8)
"""Bits that a layer may get. Of 5 and 7 the neighbours are near in size and in error."""


@dataclass(frozen=True)
class Choice:
    """A layer with weights, and the bits that these may have.

    Attributes:
        name: of the layer.
        weights, channels: how many.
        bits: what may be chosen; one number where it is settled already.
        governed: whether ``--wbits`` would say how many: those count for the average.
    """

    name: str
    weights: int
    channels: int
    bits: tuple[int, ...]
    governed: bool

    @property
    def open(self) -> bool:
        """Whether there is something to choose."""
        return len(self.bits) > 1


def choices_of(
    model: QuantizedModel, rules: Iterable[str] = (), candidates: Sequence[int] = CANDIDATES
) -> list[Choice]:
    """All layers with weights, in the order of execution.

    Args:
        model: as inserted; where there is nothing to choose, its bits hold.
        rules: patterns of layers whose bits somebody has said.
        candidates: for the others.
    """
    rules = list(rules)
    found = []
    for site in model.sites():
        if not isinstance(site, ProductSite):
            continue
        governed = site.name in model.governed
        told = any(fnmatch.fnmatchcase(site.name, rule) for rule in rules)
        assert site.wbits is not None
        bits = tuple(candidates) if governed and not told else (site.wbits,)
        weight = site.weight
        found.append(Choice(site.name, weight.numel(), len(weight), bits, governed))
    return found
