"""How much there is to give away: an average of bits, or a number of bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mecq_cli.errors import UsageError
from mecq_cli.precision.choices import Choice


@dataclass(frozen=True)
class Target:
    """One of the two.

    Attributes:
        average: bits of a weight, on average over the layers that ``--wbits`` would govern and
            that are not left in float.
        size: bytes of all weights, packed, with their scales and biases.
        label: how the user wrote it down, for messages.
    """

    average: float | None
    size: int | None
    label: str

    def cost(self, choice: Choice, bits: int) -> int:
        """What a layer takes of the budget: bits, or bytes."""
        if self.average is None:
            return choice.packed_bytes(bits)
        return choice.weights * bits if _counts(choice) else 0

    def limit(self, choices: Sequence[Choice]) -> int:
        """The budget of all layers together."""
        if self.average is None:
            assert self.size is not None
            return self.size
        # What a float makes of 2.4 times a number of weights may be a hair below the product.
        return math.floor(self.average * sum(c.weights for c in choices if _counts(c)) + 1e-6)

    def check(self, choices: Sequence[Choice]) -> None:
        """Whether it can be met, and is worth a program.

        Raises:
            UsageError: it is under the least or over the most, or nothing is left to choose.
        """
        if not any(choice.governed for choice in choices):
            raise UsageError(
                f"{self.label}: no layer is left to allot bits to: this network has only first and "
                "last layers, which keep --first-last-bits; give --wbits instead"
            )
        if not any(choice.open for choice in choices):
            raise UsageError(
                f"{self.label}: no layer is left to allot bits to: [[layers]] patterns say the "
                "wbits of all but the first and last ones; leave out the target, or some patterns"
            )
        least = sum(self.cost(c, min(c.bits)) for c in choices)
        most = sum(self.cost(c, max(c.bits)) for c in choices)
        limit = self.limit(choices)
        if least <= limit <= most:
            return
        settled = any(c.governed and not c.open for c in choices)
        rules = " with the [[layers]] given" if settled else ""
        low, high = (min(min(c.bits) for c in choices if c.open), _most(choices))
        if limit < least:
            raise UsageError(
                f"{self.label}: too low; this network takes {self._said(least, choices, up=True)}"
                f"{rules} even at {low} bit{'' if low == 1 else 's'}"
            )
        raise UsageError(
            f"{self.label}: too high; this network takes {self._said(most, choices, up=False)}"
            f"{rules} at {high} bits, the most there are; for that give --wbits {high} instead"
        )

    def _said(self, amount: int, choices: Sequence[Choice], *, up: bool) -> str:
        if self.average is None:
            return f"{amount:,} bytes"
        exact = amount / sum(c.weights for c in choices if _counts(c))
        # Rounded so that the number said is one that would do.
        shown = (math.ceil if up else math.floor)(exact * 100 - (1e-6 if up else -1e-6)) / 100
        return f"{shown:g} bits a weight"


def average_bits(choices: Sequence[Choice], bits: Sequence[int]) -> float | None:
    """Bits of a weight, over what `Target.average` is about; None where all that is in float."""
    counted = [(c.weights, b) for c, b in zip(choices, bits, strict=True) if c.governed and b != 32]
    total = sum(weights for weights, _ in counted)
    return sum(weights * b for weights, b in counted) / total if total else None


def _counts(choice: Choice) -> bool:
    return choice.governed and choice.bits != (32,)


def _most(choices: Sequence[Choice]) -> int:
    return max(max(c.bits) for c in choices if c.open)
