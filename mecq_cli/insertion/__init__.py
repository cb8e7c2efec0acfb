"""Which tensors get which quantizer, and the quantized network that follows from it.

Every consumer of a value states what it needs: a convolution wants a grid of its activation
bits, a residual add an 8-bit grid with a power-of-two step, the output floats. The producer of
the value takes the most precise of these grids as its own; the others are reached from there by
a requantization, which is shared by all consumers with the same need. Pools, concatenations and
the like pass needs on to whoever feeds them.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from mecq_cli.capture import capture
from mecq_cli.insertion.inserter import Inserter
from mecq_cli.insertion.model import QuantizedModel
from mecq_cli.insertion.needs import Need
from mecq_cli.insertion.plan import BitPlan, Bits, assign_bits
from mecq_cli.insertion.taps import Tap, tapped_layers
from mecq_cli.insertion.values import nonnegative

__all__ = [
    "BitPlan",
    "Bits",
    "Need",
    "QuantizedModel",
    "Tap",
    "assign_bits",
    "insert",
    "nonnegative",
    "tapped_layers",
]


def insert(
    model: nn.Module,
    input_shape: tuple[int, int, int],
    plan: BitPlan,
    taps: Sequence[Tap] = (),
    grid: int = 1,
) -> QuantizedModel:
    """Capture ``model`` and put quantizers in. The parameters are the model's own.

    Args:
        model: FP classifier.
        input_shape: (C, H, W).
        plan: bits and quantizers.
        taps: kinds of values the graph returns beside the logits, see `tapped_layers`.
        grid: they are averaged over grid x grid cells of a map, see `as_rows`.

    Raises:
        UsageError: the model has an operation without an integer form, an override matches no
            layer, or there is no such quantizer.
    """
    layers = capture(model, input_shape)
    assigned = assign_bits(layers, plan)
    return Inserter(layers, assigned, plan, tapped_layers(layers, taps), grid).build()
