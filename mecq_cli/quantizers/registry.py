"""Quantizers by name. What each does, and where it departs from its source: docs/method.md."""

from __future__ import annotations

from difflib import get_close_matches
from typing import NamedTuple

from mecq_cli.errors import UsageError
from mecq_cli.quantizers.base import ActivationQuantizer, WeightQuantizer
from mecq_cli.quantizers.dorefa import DorefaActivation, DorefaWeight
from mecq_cli.quantizers.ewgs import EwgsActivation, EwgsWeight
from mecq_cli.quantizers.lsq import LsqActivation, LsqWeight
from mecq_cli.quantizers.lsq_mid_rise import LsqMidRiseWeight
from mecq_cli.quantizers.lsq_plus import LsqPlusActivation
from mecq_cli.quantizers.pact import PactActivation


class Quantizers(NamedTuple):
    """What rounds weights, made of (bits, channels), and what rounds activations, of bits."""

    weight: type[WeightQuantizer]
    activation: type[ActivationQuantizer]


QUANTIZERS = {
    "lsq": Quantizers(LsqWeight, LsqActivation),
    "lsq+": Quantizers(LsqWeight, LsqPlusActivation),
    "lsq-mid-rise": Quantizers(LsqMidRiseWeight, LsqActivation),
    "pact": Quantizers(DorefaWeight, PactActivation),
    "dorefa": Quantizers(DorefaWeight, DorefaActivation),
    "ewgs": Quantizers(EwgsWeight, EwgsActivation),
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
