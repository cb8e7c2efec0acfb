"""The bits of all layers, from sensitivities and a target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mecq_cli.insertion import QuantizedModel
from mecq_cli.precision.choices import Choice, choices_of
from mecq_cli.precision.program import Solution, solve
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
        bits: of each layer for which there was a choice; the same for those that share a weight.
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
    limit = target.limit(choices)
    solution = solve(values, weights, limit)
    picks = _with_the_rest(solution, values, weights, limit)
    bits, costs = dict[str, int](), dict[str, float]()
    for choice, pick, row in zip(choices, picks, values, strict=True):
        for place in choice.places if choice.open else ():
            bits[place], costs[place] = choice.bits[pick], row[pick]
    return Allotment(bits, costs, solution.optimal, solution.gap)


def _with_the_rest(
    solution: Solution,
    values: Sequence[Sequence[float]],
    weights: Sequence[Sequence[int]],
    limit: int,
) -> list[int]:
    """The picks, with more bits where the budget has room for them and they cost nothing.

    To the program an option that is no better is as good; it may leave budget that nobody asked to
    save, where sensitivities are equal or nearly 0.
    """
    picks, rest = list(solution.picks), limit - solution.weight
    for item, (costs, loads) in enumerate(zip(values, weights, strict=True)):
        now = picks[item]
        fits = [
            k
            for k, load in enumerate(loads)
            if loads[now] <= load <= loads[now] + rest and costs[k] <= costs[now]
        ]
        picks[item] = max(fits, key=loads.__getitem__)
        rest -= loads[picks[item]] - loads[now]
    return picks


def reached(model: QuantizedModel) -> Reached:
    """Of a network as it is."""
    settled = choices_of(model, rules=["*"])
    bits = [choice.bits[0] for choice in settled]
    size = sum(c.packed_bytes(b) for c, b in zip(settled, bits, strict=True))
    return Reached(average_bits(settled, bits), size)
