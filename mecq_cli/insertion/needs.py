"""What the consumer of a value wants of it."""

from __future__ import annotations

from dataclasses import dataclass

PRODUCTS = ("conv2d", "linear")
PASSING = (
    *("max_pool2d", "concat", "flatten", "slice", "pad", "dropout"),
    *("reshape", "transpose", "roll", "upsample"),
)
POOLS = ("global_avg_pool", "avg_pool2d", "adaptive_avg_pool2d")
FLOATING = (
    *("layer_norm", "group_norm", "softmax", "log_softmax", "l2_normalize", "rms_norm"),
    *("rescale", "constant"),
    "resize",
)
"""Kinds of layers that compute in float, whatever the bits."""
EDGE_BITS = 8
"""Bits of the edges that are neither read by a convolution nor residual: pools."""


@dataclass(frozen=True)
class Need:
    """What a consumer wants of a value: a grid (bits) or a float (bits None).

    ``group`` names the concatenation whose inputs must share one grid.
    """

    bits: int | None
    power_of_two: bool = False
    group: str = ""

    @property
    def rank(self) -> tuple[bool, int, str]:
        """The producer's own grid is the need of the highest rank."""
        return self.power_of_two, self.bits or 0, self.group


FLOAT = Need(None)
