"""The bits of all layers, from sensitivities and a target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mecq_cli.insertion import QuantizedModel
from mecq_cli.integer.packing import layer_bytes
from mecq_cli.precision.choices import Choice, choices_of
from mecq_cli.precision.program import solve
from mecq_cli.precision.sensitivities import Sensitivities
from mecq_cli.precision.target import Target, average_bits


@dataclass(frozen=True)
class Reached:
    """What the bits of a network come to.

    Attributes:
        average: bits of a weight, over the layers that ``--wbits`` would govern.
        bytes: of all weights, packed, with their scales and biases.
    """

    average: float | None
    bytes: int


@dataclass(frozen=True)
class Allotment:
    """Bits of layers.

    Attributes:
        bits: of each layer for which there was a choice.
        costs: its sensitivity at those bits.
        optimal: whether it is proven that no allotment within the target costs less.
        gap: how much less it may be, relative to the sum of the costs; None: not known.
    """

    bits: dict[str, int]
    costs: dict[str, float]
    optimal: bool
    gap: float | None


def allot(choices: Sequence[Choice], sensitivities: Sensitivities, target: Target) -> Allotment:
    """The bits of least sensitivity, summed over the layers, within the target.

    Raises:
        UsageError: the target cannot be met.
    """
    target.check(choices)
    values = [
        [sensitivities[choice.name][bits] for bits in choice.bits] if choice.open else [0.0]
        for choice in choices
    ]
    weights = [[target.cost(choice, bits) for bits in choice.bits] for choice in choices]
    solution = solve(values, weights, target.limit(choices))
    bits = {
        choice.name: choice.bits[pick]
        for choice, pick in zip(choices, solution.picks, strict=True)
        if choice.open
    }
    costs = {name: sensitivities[name][chosen] for name, chosen in bits.items()}
    return Allotment(bits, costs, solution.optimal, solution.gap)


def reached(model: QuantizedModel) -> Reached:
    """Of a network as it is."""
    settled = choices_of(model, rules=["*"])
    bits = [choice.bits[0] for choice in settled]
    size = sum(layer_bytes(c.weights, c.channels, b) for c, b in zip(settled, bits, strict=True))
    return Reached(average_bits(settled, bits), size)
