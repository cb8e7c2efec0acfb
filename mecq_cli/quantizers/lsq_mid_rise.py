"""LSQ on weight grids without zero: the mid-rise quantizer of signal processing.

All 2^b levels are used symmetrically: -3, -1, 1, 3 at 2 bits, in units of half the distance between
two. LSQ's own grid has one negative level more than positive ones.

Departure: at 7 and 8 bits, where this is of no weight, the grid is that of LSQ: the integers of an
8-bit one would leave int8.
"""

from __future__ import annotations

from mecq_cli.quantizers.lsq import LsqWeight


class LsqMidRiseWeight(LsqWeight):
    """Grid -(2^b - 1), ..., -1, 1, ..., 2^b - 1. One learned step per output channel."""

    def __init__(self, bits: int, channels: int) -> None:
        super().__init__(bits, channels, mid_rise=True)
