"""What every quantizer is: a module that rounds in training and names its grid afterwards.

Whatever a quantizer learns, its values in training are integers times a step, and it can name both:
so all of them are exported, and multiplied as integers, in the same way.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from mecq_cli.integer.ir import Grid
from mecq_cli.loops import Rounding
from mecq_cli.quantizers.rounding import PLAIN, Kernels

MIN_SCALE = 1e-8
"""No step may fall below it, much less cross zero."""


class Quantizer(nn.Module):
    """Common part of weight and activation quantizers.

    Attributes:
        bits: 1 to 8.
        active: False lets values through untouched (used while calibrating).
        kernels: what computes the rounding and its gradients.
        decays: whether what it learns gets the weight decay of the weights.

    What it learns are its parameters, float32 whatever the rest is; they have a learning rate of
    their own.
    """

    decays = False

    def __init__(self, bits: int) -> None:
        super().__init__()
        if not 1 <= bits <= 8:
            raise ValueError(f"a quantizer has 1 to 8 bits, not {bits}")
        self.bits = bits
        self.active = True
        self._quicker: Callable[[Kernels], Kernels] | None = None
        self.use_kernels(PLAIN)

    def use_kernels(self, kernels: Kernels) -> None:
        """Round by these from now on, or by what `quicken` makes of them."""
        self._kernels = kernels
        self.kernels = kernels if self._quicker is None else self._quicker(kernels)

    def quicken(self, quicker: Callable[[Kernels], Kernels]) -> None:
        """Round by ``quicker(kernels)`` from now on, whatever those are by then."""
        self._quicker = quicker
        self.use_kernels(self._kernels)

    def use_bits(self, bits: int) -> None:
        """Round to so many bits from now on; its step must be found anew afterwards.

        For training that lowers the bits step by step. `bits` stays what is exported.

        Raises:
            NotImplementedError: this one only knows its own number.
        """
        if bits != self.bits:
            raise NotImplementedError

    def positive(self) -> list[Tensor]:
        """Parameters that must not cross zero: after each update they are at least `MIN_SCALE`."""
        return []

    def project(self) -> None:
        """After an update and what `positive` asks for: bring back what else left its range."""


class WeightQuantizer(Quantizer):
    """Contract of weight quantizers: one step per output channel.

    Attributes:
        channels: how many those are.
        mid_rise: the grid has no zero (integer/ir.py), which at 1 bit is always so.
    """

    def __init__(self, bits: int, channels: int) -> None:
        super().__init__(bits)
        self.channels = channels
        self.mid_rise = bits == 1

    def initialize(self, weight: Tensor) -> None:
        """First steps from the FP weight [O, ...]."""
        raise NotImplementedError

    def integers(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """int8 weight [O, ...] and float32 step [O]; their product is what `forward` gives."""
        raise NotImplementedError

    def steps(self, weight: Tensor) -> Tensor:
        """The steps in use for a weight, float32 [O]."""
        raise NotImplementedError


class ActivationQuantizer(Quantizer):
    """Contract of activation quantizers: one step and one integer zero point a tensor.

    Args:
        bits: 1 to 8.
        power_of_two: the step in use is one, and the zero point even, so that sums of such
            activations are exact in every runtime (see integer/ir.py, `add`).
    """

    def __init__(self, bits: int, *, power_of_two: bool = False) -> None:
        super().__init__(bits)
        self.power_of_two = power_of_two

    def initialize(self, values: Tensor) -> None:
        """First step and zero point from a sample of the values."""
        raise NotImplementedError

    def effective_scale(self) -> Tensor:
        """The step in use, float32 of no dimensions."""
        raise NotImplementedError

    def rounding(self, x: Tensor) -> Rounding | None:
        """What it does to ``x`` where that is LSQ's rounding, else None."""
        return None

    @property
    def offset(self) -> int | None:
        """The zero point as a plain number, constant to the compiler; None where it is learned."""
        raise NotImplementedError

    @property
    def grid_is_unsigned(self) -> bool:
        """Whether the grid has no negative value, so that rounding to it clips at zero."""
        raise NotImplementedError

    def grid(self) -> Grid:
        """The integer grid, as it will be exported."""
        raise NotImplementedError

    def threshold_grid(self) -> Grid | None:
        """The grid that is rounded to first where thresholds make the codes; None: uniform ones."""
        return None

    def thresholds(self, source: Grid | None) -> tuple[int, ...]:
        """The least integers of each code, on the grid ``source`` or else on `threshold_grid`.

        On ``source`` they may lie below its integers, and are of no use then.
        """
        raise NotImplementedError
