"""Mixed precision: the bits of each layer's weights, where a target says how many in all.

`sensitivities` measures what rounding a layer costs, at each number of bits; `target` counts what
it takes of the budget; `program` picks one number for each layer, at the least cost within it.
"""

from __future__ import annotations

from mecq_cli.precision.allotment import Allotment, Reached, allot, reached
from mecq_cli.precision.choices import CANDIDATES, Choice, choices_of
from mecq_cli.precision.program import Solution, solve
from mecq_cli.precision.sensitivities import SENSITIVITIES, Sensitivities, Sensitivity, measure
from mecq_cli.precision.target import Target, average_bits

__all__ = [
    "CANDIDATES",
    "SENSITIVITIES",
    "Allotment",
    "Choice",
    "Reached",
    "Sensitivities",
    "Sensitivity",
    "Solution",
    "Target",
    "allot",
    "average_bits",
    "choices_of",
    "measure",
    "reached",
    "solve",
]
