"""Quantizers by name. What each does, and where it departs from its source: docs/method.md."""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches
from typing import NamedTuple

from mecq_cli.errors import UsageError
from mecq_cli.integer.ir import MOST_THRESHOLD_BITS
from mecq_cli.quantizers.base import ActivationQuantizer, WeightQuantizer
from mecq_cli.quantizers.binary import BinaryWeight
from mecq_cli.quantizers.dorefa import DorefaActivation, DorefaWeight
from mecq_cli.quantizers.entropy_preserving import EntropyPreservingWeight, has_grid_without_zero
from mecq_cli.quantizers.ewgs import EwgsActivation, EwgsWeight
from mecq_cli.quantizers.lsq import LsqActivation, LsqWeight
from mecq_cli.quantizers.lsq_mid_rise import LsqMidRiseWeight
from mecq_cli.quantizers.lsq_plus import LsqPlusActivation
from mecq_cli.quantizers.mid_rise import MidRiseActivation
from mecq_cli.quantizers.n2uq import N2uqActivation
from mecq_cli.quantizers.pact import PactActivation


class Quantizers(NamedTuple):
    """What rounds weights, made of (bits, channels), and what rounds activations, of bits.

    Attributes:
        weight: for all weights.
        activation: for all activations; or only for those that ``thresholds`` is not for.
        thresholds: one that learns thresholds, which values of few bits get where none of them can
            be negative.
    """

    weight: Callable[[int, int], WeightQuantizer]
    activation: type[ActivationQuantizer]
    thresholds: type[ActivationQuantizer] | None = None

    def for_values(
        self, bits: int, *, power_of_two: bool, nonnegative: bool
    ) -> ActivationQuantizer:
        """One for values of a kind.

        Args:
            bits: 1 to 8.
            power_of_two: the step must be one: residual sums, which have no use for thresholds.
            nonnegative: none can be negative, whatever the images.
        """
        few = bits <= MOST_THRESHOLD_BITS and not power_of_two
        if self.thresholds is not None and nonnegative and few:
            return self.thresholds(bits)
        return self.activation(bits, power_of_two=power_of_two)


def entropy_preserving(bits: int, channels: int) -> WeightQuantizer:
    """Where there is a grid without zero; else LSQ."""
    fits = has_grid_without_zero(bits)
    return (EntropyPreservingWeight if fits else LsqWeight)(bits, channels)


def by_bits(bits: int, channels: int) -> WeightQuantizer:
    """What did best in short runs at 1 and 2 bits (docs/method.md)."""
    if bits == 1:
        return BinaryWeight(bits, channels)
    return (LsqMidRiseWeight if bits == 2 else LsqWeight)(bits, channels)


QUANTIZERS = {
    "auto": Quantizers(by_bits, MidRiseActivation),
    "lsq": Quantizers(LsqWeight, LsqActivation),
    "lsq+": Quantizers(LsqWeight, LsqPlusActivation),
    "lsq-mid-rise": Quantizers(LsqMidRiseWeight, LsqActivation),
    "pact": Quantizers(DorefaWeight, PactActivation),
    "dorefa": Quantizers(DorefaWeight, DorefaActivation),
    "ewgs": Quantizers(EwgsWeight, EwgsActivation),
    "lsq-thresholds": Quantizers(LsqWeight, LsqActivation, N2uqActivation),
    "n2uq": Quantizers(entropy_preserving, LsqActivation, N2uqActivation),
}


def quantizers_named(name: str) -> Quantizers:
    """Those of a name.

    Raises:
        UsageError: there are none.
    """
    if name in QUANTIZERS:
        return QUANTIZERS[name]
    near = get_close_matches(name.lower(), QUANTIZERS, n=1, cutoff=0.5)
    hint = f"did you mean '{near[0]}'? " if near else ""
    raise UsageError(f"--quantizer: got {name!r}; {hint}allowed: {', '.join(QUANTIZERS)}")
