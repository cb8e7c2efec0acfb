"""Values that the network returns beside its logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from mecq_cli.insertion.needs import PRODUCTS
from mecq_cli.insertion.plan import first_above
from mecq_cli.integer.ir import INPUT
from mecq_cli.layers import Layer

Tap = Literal["penultimate", "stages", "layers"]


def tapped_layers(layers: list[Layer], taps: Sequence[Tap]) -> list[str]:
    """Layers whose values are tapped, in the order of execution.

    ``penultimate``: what the last convolution or linear layer reads. ``stages``: the last
    residual add (or concatenation, or convolution) of each spatial resolution. ``layers``: what
    every convolution or linear layer but the first reads.
    """
    by_name = {layer.name: layer for layer in layers}
    products = [layer for layer in layers if layer.kind in PRODUCTS]
    wanted: set[str] = set()
    if "penultimate" in taps:
        wanted.add(products[-1].inputs[0])
    if "layers" in taps:
        wanted |= {p.inputs[0] for p in products if p.inputs[0] != INPUT}
    if "stages" in taps:
        convolved = {p.shape[1:] for p in products if len(p.shape) == 3}
        # Behind the last residual add of a resolution only the next stage's narrow beginning
        # may follow, so an add is the end of a stage where there is one.
        last: dict[tuple[int, ...], str] = {}
        for kinds in (PRODUCTS, ("concat",), ("add",)):
            last |= {
                layer.shape[1:]: layer.name
                for layer in layers
                if layer.shape[1:] in convolved and layer.kind in kinds
            }
        # The logits of a convolutional classifier are no stage.
        wanted |= {name for name in last.values() if name != first_above(layers[-1].name, by_name)}
    return [layer.name for layer in layers if layer.name in wanted]
