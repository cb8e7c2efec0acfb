"""Activations of 1 and 2 bits that may be negative, on a grid without zero where that fits better.

A grid of four levels that has a zero is lopsided: -1, 0, 1, 2. What is spread around zero, as the
input of a linear layer behind a norm or the linear bottleneck of a MobileNetV2, is better served by
-3, -1, 1, 3 in units of half the distance between two; at 1 bit by -1 and 1 instead of 0 and 1. Of
a Gaussian the squared error is a fifth less, at 1 bit two fifths. Such a grid may lie anywhere: -1,
1, 3, 5 suits what is positive more often. Which of all, with or without a zero, is found by the
squared error of the sample that also gives the first step.

Quantizers that round to nearest, as those of ONNX, have integer zero points, and no grid without
zero. So a value is rounded to integers of 8 bits first, or has been, and these are compared with
thresholds, as in n2uq.py; in training, too, thresholds are where half-integers of that grid lie: a
252nd of a step lower than the middle between two levels. The integers behind are odd multiples of
half a step, so that a padded zero is exact though no level.

Gradients are those of soft_ends.py: the distance between two thresholds is 2 here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mecq_cli.integer.ir import Grid
from mecq_cli.loops import Rounding
from mecq_cli.quantizers.rounding import FINE, MID_RISE, SHIFT, Kernels
from mecq_cli.quantizers.search import best_grid_without_zero, squared_error
from mecq_cli.quantizers.soft_ends import MOST_BITS, SoftEndsActivation


class MidRiseActivation(SoftEndsActivation):
    """The grid of LSQ, or one without zero where values of 1 or 2 bits are negative, too.

    Attributes:
        without_zero: `mid_rise` as a part of the state, found with the first step. Where it holds,
            ``scale`` is half of the distance between two levels, and the zero point odd.
    """

    without_zero: Tensor

    def __init__(self, bits: int, *, power_of_two: bool = False) -> None:
        super().__init__(bits, power_of_two=power_of_two)
        self.register_buffer("without_zero", torch.zeros((), dtype=torch.bool))

    def suited(self) -> Kernels:
        """To the grid as it is now."""
        return MID_RISE if self.mid_rise else super().suited()

    def initialize(self, values: Tensor) -> None:
        """First step and zero point of least squared error on a flat sample of the values."""
        super().initialize(values)
        self._use(mid_rise=False)
        sample = values.detach().float()
        if self.power_of_two or self.qmax >= 2**MOST_BITS or not bool((sample < 0).any()):
            return
        scale, zero_point = best_grid_without_zero(sample, self.qmax)
        error = squared_error(sample, scale, zero_point, 2 * self.qmax, mid_rise=True)
        if error < squared_error(sample, float(self.scale.detach()), self._offset, self.qmax):
            self._use(mid_rise=True)
            with torch.no_grad():
                self.zero_point.fill_(zero_point)
                self._offset = zero_point
                self.begin(scale)

    def _use(self, *, mid_rise: bool) -> None:
        self.without_zero.fill_(mid_rise)
        self.mid_rise = mid_rise
        self.use_kernels(self.suited())

    def _load_from_state_dict(self, *args: object, **kwargs: object) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._use(mid_rise=bool(self.without_zero))

    @property
    def ends(self) -> tuple[int, int]:
        """Smallest and largest value in units of ``scale``."""
        top = 2 * self.qmax if self.mid_rise else self.qmax
        return -self._offset, top - self._offset

    def rounding(self, x: Tensor) -> Rounding | None:
        """What `forward` does."""
        found = super().rounding(x)
        if found is None or not self.mid_rise:
            return found
        return found._replace(mid_rise=True, shift=SHIFT)

    def grid(self) -> Grid:
        """The integer grid, as it will be exported."""
        if not self.mid_rise:
            return super().grid()
        scale = float(self.scale.detach())
        return Grid(scale, self._offset, self.bits, 0, 2 * self.qmax, spacing=2)

    def threshold_grid(self) -> Grid | None:
        """8 bits, of which the first threshold is at the first integer."""
        if not self.mid_rise:
            return None
        unit = float((self.scale.detach().double() / FINE).float())
        return Grid(unit, 1 + (self._offset - 1) * FINE, 8, 0, 255)

    def thresholds(self, source: Grid | None) -> tuple[int, ...]:
        """The least integers of each code, on the grid ``source`` or else on `threshold_grid`."""
        codes = torch.arange(self.qmax, dtype=torch.float64)
        if source is None:
            integers = 1 + 2 * FINE * codes
        else:
            middles = 2 * codes + 1 - self._offset
            real = (middles - SHIFT) * self.scale.detach().double().cpu()
            integers = torch.ceil(real / source.scale) + source.zero_point
        return tuple(int(m) for m in integers.clamp(max=256))
