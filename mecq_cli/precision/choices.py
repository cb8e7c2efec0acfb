"""Which layers there are bits to choose for, and which numbers of bits."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mecq_cli.insertion import QuantizedModel
from mecq_cli.integer.ir import is_shared
from mecq_cli.integer.packing import layer_bytes
from mecq_cli.sites import ProductSite

CANDIDATES = (1, 2, 3, 4, 6, 8)
"""Bits that a layer may get. Of 5 and 7 the neighbours are near in size and in error."""


@dataclass(frozen=True)
class Choice:
    """A weight, and the bits that it may have.

    Attributes:
        places: names of the layers that have it: one, or several that share it.
        weights, channels: how many values it has, and how many outputs a layer.
        bits: what may be chosen; one number where it is settled already.
        governed: whether ``--wbits`` would say how many: those count for the average.
    """

    places: tuple[str, ...]
    weights: int
    channels: int
    bits: tuple[int, ...]
    governed: bool

    @property
    def name(self) -> str:
        """Of the first layer."""
        return self.places[0]

    def packed_bytes(self, bits: int) -> int:
        """What it takes at so many bits, with the scales and biases of all its layers.

        Small weights are stored with each of the layers that share them, see `shared_weights`.
        """
        again = 0 if is_shared(self.weights, bits) else self.weights
        others = (len(self.places) - 1) * layer_bytes(again, self.channels, bits)
        return layer_bytes(self.weights, self.channels, bits) + others

    @property
    def open(self) -> bool:
        """Whether there is something to choose."""
        return len(self.bits) > 1


def choices_of(
    model: QuantizedModel, rules: Iterable[str] = (), candidates: Sequence[int] = CANDIDATES
) -> list[Choice]:
    """All weights of layers, in the order of execution.

    Args:
        model: as inserted; where there is nothing to choose, its bits hold.
        rules: patterns of layers whose bits somebody has said.
        candidates: for the others.
    """
    rules = list(rules)
    found: dict[tuple[int, tuple[int, ...], bool], Choice] = {}
    for site in model.sites():
        if not isinstance(site, ProductSite):
            continue
        governed = site.name in model.governed
        told = any(fnmatch.fnmatchcase(site.name, rule) for rule in rules)
        assert site.wbits is not None
        bits = tuple(candidates) if governed and not told else (site.wbits,)
        weight = site.weight
        known = found.get(key := (id(weight), bits, governed))
        places = (*known.places, site.name) if known else (site.name,)
        found[key] = Choice(places, weight.numel(), len(weight), bits, governed)
    return list(found.values())
