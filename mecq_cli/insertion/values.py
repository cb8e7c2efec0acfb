"""What is known of the values of a network, whatever the images."""

from __future__ import annotations

from collections.abc import Sequence

from mecq_cli.insertion.needs import PASSING
from mecq_cli.layers import Layer

AVERAGES = ("avg_pool2d", "adaptive_avg_pool2d", "global_avg_pool")


def nonnegative(layers: Sequence[Layer]) -> set[str]:
    """Layers whose values cannot be negative: ReLU, softmax, what moves or adds such."""
    found: set[str] = set()
    for layer in layers:
        keeps = layer.kind in (*PASSING, "add", "mul", "resize", *AVERAGES)
        known = layer.kind == "softmax" or layer.ceiling is not None
        if known or (keeps and found.issuperset(layer.inputs)):
            found.add(layer.name)
    return found
