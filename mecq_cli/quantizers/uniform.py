"""What quantizers with evenly spaced levels share: their integers, first steps and grids."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from mecq_cli.integer.ir import MID_RISE_BITS, Grid
from mecq_cli.quantizers.base import ActivationQuantizer, WeightQuantizer
from mecq_cli.quantizers.rounding import straight_through, to_integers, units
from mecq_cli.quantizers.search import best_activation_grid, best_weight_scale


class UniformWeight(WeightQuantizer):
    """One learned step per output channel. ``forward`` is left to the algorithm.

    Attributes:
        qmin, qmax: ends of the grid: -2^(b-1) and 2^(b-1) - 1, or -(2^b - 1) and 2^b - 1 where it
            has no zero.
    """

    def __init__(self, bits: int, channels: int, *, mid_rise: bool = False) -> None:
        super().__init__(bits, channels)
        self._asked_mid_rise = mid_rise
        self.scale = nn.Parameter(torch.ones(channels))
        self.use_bits(bits)

    def use_bits(self, bits: int) -> None:
        """The ends of the grid are those of ``bits``."""
        self.mid_rise = bits == 1 or (self._asked_mid_rise and bits in MID_RISE_BITS)
        self.qmax = 2**bits - 1 if self.mid_rise else 2 ** (bits - 1) - 1
        self.qmin = -self.qmax if self.mid_rise else -(2 ** (bits - 1))

    def positive(self) -> list[Tensor]:
        """The steps."""
        return [self.scale]

    def initialize(self, weight: Tensor) -> None:
        """First steps from the FP weight [O, ...]."""
        rows = weight.detach().float().flatten(1)
        if (self.qmin, self.qmax) == (-1, 1) and self.mid_rise:
            scale = rows.abs().mean(1).clamp_min(1e-8)
        else:
            scale = best_weight_scale(rows, self.qmin, self.qmax, self.mid_rise)
        with torch.no_grad():
            self.scale.copy_(scale)

    def steps(self, weight: Tensor) -> Tensor:
        """The learned ones; what a subclass makes of them is trained and exported."""
        return self.scale

    def integers(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """int8 weight [O, ...] and float32 step [O]."""
        scale = self.steps(weight).detach().float()
        v = units(weight.detach(), per_channel(scale, weight))
        q = to_integers(v, torch.clamp(v, self.qmin, self.qmax), self.mid_rise)
        return q.to(torch.int8), scale.clone()


def per_channel(values: Tensor, weight: Tensor) -> Tensor:
    """[O] shaped so that it broadcasts against a weight [O, ...]."""
    return values.reshape(-1, *([1] * (weight.dim() - 1)))


class UniformActivation(ActivationQuantizer):
    """Grid [0, 2^b - 1] with an integer zero point, which is 0 for non-negative values.

    The zero point is found with the first step and stays. The step itself and ``forward`` are left
    to the algorithm.

    Attributes:
        mid_rise: the grid has no zero (mid_rise.py).
    """

    zero_point: Tensor
    mid_rise = False

    def __init__(self, bits: int, *, power_of_two: bool = False) -> None:
        super().__init__(bits, power_of_two=power_of_two)
        self.register_buffer("zero_point", torch.zeros((), dtype=torch.int32))
        self._offset = 0
        self.use_bits(bits)

    def use_bits(self, bits: int) -> None:
        """The grid ends at that of ``bits``; the zero point is found with the next first step."""
        self.qmax = 2**bits - 1

    def initialize(self, values: Tensor) -> None:
        """First step and zero point from a flat sample of the values."""
        scale, zero_point = best_activation_grid(
            values.detach().float(), self.qmax, self.power_of_two
        )
        with torch.no_grad():
            self.zero_point.fill_(zero_point)
            self._offset = zero_point
            self.begin(scale)

    def begin(self, scale: float) -> None:
        """Make this the step; the zero point is set."""
        raise NotImplementedError

    def _load_from_state_dict(self, *args: object, **kwargs: object) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._offset = int(self.zero_point)

    @property
    def offset(self) -> int | None:
        """The zero point."""
        return self._offset

    @property
    def ends(self) -> tuple[int, int]:
        """Smallest and largest value in units of the step."""
        return -self._offset, self.qmax - self._offset

    @property
    def grid_is_unsigned(self) -> bool:
        """Whether the zero point is 0."""
        return self._offset == 0

    def learned_scale(self) -> Tensor:
        """The step before it is rounded to a power of two."""
        raise NotImplementedError

    def effective_scale(self) -> Tensor:
        """The step in use; the gradient passes straight through the power of two."""
        learned = self.learned_scale()
        if not self.power_of_two:
            return learned
        return straight_through(torch.exp2(torch.round(torch.log2(learned.detach()))), learned)

    def grid(self) -> Grid:
        """The integer grid, as it will be exported."""
        scale = float(self.learned_scale().detach())
        if self.power_of_two:
            scale = 2.0 ** round(math.log2(scale))
        return Grid(scale, self._offset, self.bits, 0, self.qmax)
