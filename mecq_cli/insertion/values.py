"""What is known of the values of a network, whatever the images."""

from __future__ import annotations

from collections.abc import Sequence

from mecq_cli.insertion.needs import PASSING
from mecq_cli.layers import Layer

AVERAGES = ("avg_pool2d", "adaptive_avg_pool2d", "global_avg_pool")


def nonnegative(layers: Sequence[Layer]) -> set[str]:
    """Layers whose values cannot be negative: a ReLU, and what moves, adds or averages such."""
    found: set[str] = set()
    for layer in layers:
        keeps = layer.kind in (*PASSING, "add", "mul", *AVERAGES)
        if layer.ceiling is not None or (keeps and found.issuperset(layer.inputs)):
            found.add(layer.name)
    return found
