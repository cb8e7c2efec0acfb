"""Convolutions and linear layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mecq_cli.integer.ir import Node, weight_multiplier
from mecq_cli.integer_conv import Geometry, windows_see_pixels
from mecq_cli.integer_conv import conv2d as integer_conv2d
from mecq_cli.loops import depthwise_conv2d
from mecq_cli.normalization import batch_norm, rounded_batch_norm
from mecq_cli.quantizers import ActivationQuantizer, WeightQuantizer
from mecq_cli.sites.base import Site
from mecq_cli.sites.ties import away_from_halves

BIAS_LIMIT = 2**30
"""Integer biases beyond this would leave int32; such a channel is a constant."""

TINY = 1e-30
"""Products of float32 scales below this lose digits."""


class ProductSite(Site):
    """Convolution or linear layer, with the batch norm and ReLU behind it.

    The weight is quantized as it is and the batch norm multiplies the integer result: folded
    into the per-channel scales afterwards this is the same function, and no weight is rounded
    twice.

    Args:
        module: nn.Conv2d or nn.Linear with the FP parameters.
        attributes: of a conv2d, as in integer/ir.py; empty for linear.
        norm: batch norm behind it.
        gain: yields a factor for each channel, or one for all, behind that.
        weight_quantizer: None leaves the weight in FP.

    Attributes:
        on_integers: where it is compiled, the convolution in training is one of integers.
        in_loops: where it is compiled, the batch norm and the rounding behind it are one, and some
            depthwise convolutions have a backward pass of ours.
    """

    on_integers = False
    in_loops = False

    def __init__(
        self,
        name: str,
        sources: Sequence[ActivationQuantizer | None],
        output_quantizer: ActivationQuantizer | None,
        ceiling: float | None,
        *,
        module: nn.Conv2d | nn.Linear,
        attributes: dict[str, Any],
        norm: nn.BatchNorm2d | nn.BatchNorm1d | None,
        weight_quantizer: WeightQuantizer | None,
        gain: nn.Module | None = None,
    ) -> None:
        super().__init__(name, sources, output_quantizer, ceiling)
        self.op = "conv2d" if isinstance(module, nn.Conv2d) else "linear"
        self.weight = module.weight
        self.bias = module.bias
        self.attributes = attributes
        self.norm = norm
        self.gain = gain
        self.weight_quantizer = weight_quantizer
        self.wbits = 32 if weight_quantizer is None else weight_quantizer.bits
        self.abits = 32 if sources[0] is None else sources[0].bits

    def forward(self, *inputs: Tensor) -> Tensor:
        """As all sites; in compiled training perhaps with norm and rounding at once."""
        norm, q = self.norm, self.output_quantizer
        plain = type(norm) in (nn.BatchNorm1d, nn.BatchNorm2d) and self.gain is None
        if not self._may_use_loops() or not plain or q is None:
            return super().forward(*inputs)
        assert norm is not None
        y = self._product(inputs[0])
        rounding = q.rounding(y)
        flat = y.dim() == (4 if self.op == "conv2d" else 2)
        if rounding is None or not flat or y.dtype != torch.bfloat16:
            return self._finish(self._scaled(y))
        return rounded_batch_norm(norm, y, rounding, self._bounds())

    def compute(self, *inputs: Tensor) -> Tensor:
        """Fake-quantized product, then batch norm."""
        return self._scaled(self._product(inputs[0]))

    def _product(self, x: Tensor) -> Tensor:
        weight = (
            self.weight if self.weight_quantizer is None else self.weight_quantizer(self.weight)
        )
        if self.op == "linear":
            return F.linear(x, weight, self.bias)
        top, left, bottom, right = self.attributes["padding"]
        padding = (top, left)
        if (top, left) != (bottom, right):
            x, padding = F.pad(x, (left, right, top, bottom)), (0, 0)
        return self._conv(x, weight, padding)

    def _scaled(self, y: Tensor) -> Tensor:
        """By the norm and the gain."""
        if self.norm is not None:
            y = self._normalised(self.norm, y)
        if self.gain is None:
            return y
        factors: Tensor = self.gain()
        return y * factors.reshape(-1, *[1] * (2 if self.op == "conv2d" else 0))

    def _normalised(self, norm: nn.BatchNorm2d | nn.BatchNorm1d, y: Tensor) -> Tensor:
        """By the statistics of channels, whatever the number of tokens."""
        if self.op == "linear" and y.dim() > 2:
            return self._normalised(norm, y.flatten(0, -2)).reshape(y.shape)
        if torch.compiler.is_compiling() and type(norm) in (nn.BatchNorm1d, nn.BatchNorm2d):
            return batch_norm(norm, y)
        normalised: Tensor = norm(y)
        return normalised

    def _conv(self, x: Tensor, weight: Tensor, padding: tuple[int, int]) -> Tensor:
        a = self.attributes
        source, quantizer = self._sources[0].module, self.weight_quantizer
        if (
            self.on_integers
            and source is not None
            and source.offset is not None  # a constant of the program
            and quantizer is not None
            and torch.compiler.is_compiling()
        ):
            geometry = Geometry(tuple(a["stride"]), padding, tuple(a["dilation"]))
            scale, steps = source.effective_scale(), quantizer.steps(self.weight)
            y = integer_conv2d(x, scale, source.offset, weight, steps, geometry)
            return y if self.bias is None else y + self.bias.to(y.dtype).view(1, -1, 1, 1)
        if self._may_use_loops() and self._slow_backward and x.dtype == torch.bfloat16:
            return depthwise_conv2d(x, weight, self.bias, a["stride"], padding, a["dilation"])
        return F.conv2d(x, weight, self.bias, a["stride"], padding, a["dilation"], a["groups"])

    def _may_use_loops(self) -> bool:
        return self.in_loops and self.training and torch.compiler.is_compiling()

    @property
    def _slow_backward(self) -> bool:
        """Whether it is a depthwise convolution whose backward pass `mecq_cli.loops` does faster.

        With 3 x 3 and a stride of 1 PyTorch's is about as fast.
        """
        outputs, inputs, *kernel = self.weight.shape
        depthwise = inputs == 1 and self.attributes["groups"] == outputs
        return depthwise and (max(kernel) > 3 or max(self.attributes["stride"]) > 1)

    @property
    def could_be_on_integers(self) -> bool:
        """Whether `mecq_cli.integer_conv` can do it, given inputs on the grid of their source.

        Where calibration finds that the zero point is one to be learned, it is not used after all.
        """
        a = self.attributes
        return (
            self.op == "conv2d"
            and a["groups"] == 1
            and self._sources[0].module is not None
            and self.weight_quantizer is not None
            and windows_see_pixels(self.weight.shape[2:], a["padding"][:2], a["dilation"])
        )

    def node(self, inputs: tuple[str, ...]) -> Node:
        """The integer weight with the batch norm folded into its scales and bias."""
        source = self._sources[0].module
        weight, scale, bias = self._fold()
        assert self.wbits is not None
        zeroless = self.weight_quantizer is not None and self.weight_quantizer.mid_rise
        mid_rise = zeroless and self.wbits > 1  # at 1 bit there is no other grid
        if source is None:
            tensors = _float_bias(weight, scale, bias, zeroless=zeroless)
        else:
            # exact: a power of two
            multiplier = weight_multiplier(self.wbits, mid_rise=mid_rise)
            scale = scale / np.float32(multiplier)
            grid, target = source.grid(), self.output_grid()
            tensors = _integer_bias(weight, scale, bias, grid.scale, zeroless=zeroless)
            if target is not None and self.op == "conv2d" and weight[0].size == 1:
                tensors = away_from_halves(tensors, multiplier, grid, target)
        return Node(
            self.name,
            self.op,
            inputs,
            self.output_grid(),
            dict(self.attributes),
            self.wbits,
            tensors,
            mid_rise,
        )

    def _fold(self) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Weight, float32 scale [O] and float64 bias [O] after folding the batch norm."""
        if self.weight_quantizer is None:
            weight = self.weight.detach().float()
            scale = torch.ones(weight.shape[0])
        else:
            weight, scale = self.weight_quantizer.integers(self.weight)
        factor = torch.ones(weight.shape[0], dtype=torch.float64)
        bias = torch.zeros(weight.shape[0], dtype=torch.float64)
        if self.bias is not None:
            bias = self.bias.detach().double().cpu()
        norm = self.norm
        if norm is not None:
            assert norm.running_mean is not None
            assert norm.running_var is not None
            var, mean = norm.running_var.double().cpu(), norm.running_mean.double().cpu()
            factor = norm.weight.detach().double().cpu() / torch.sqrt(var + norm.eps)
            bias = norm.bias.detach().double().cpu() + (bias - mean) * factor
        if self.gain is not None:
            with torch.no_grad():
                gain = self.gain().double().cpu().reshape(-1)
            factor, bias = factor * gain, bias * gain
        folded = (scale.double().cpu() * factor).float()
        return weight.cpu().numpy(), folded.numpy(), bias.numpy()


def _integer_bias(
    weight: np.ndarray[Any, Any],
    scale: np.ndarray[Any, Any],
    bias: np.ndarray[Any, Any],
    input_scale: float,
    *,
    zeroless: bool,
) -> dict[str, np.ndarray[Any, Any]]:
    """Bias as int32 in units of fl(input_scale * scale).

    A channel whose scale is (nearly) zero, as after a batch norm with gamma 0, cannot express
    its bias in such units. It is a constant: its weight becomes 0 and its scale one that fits
    (on a grid without zero the weight stays and counts for less than 1e-6 of the bias).
    """
    # Smallest scale for which the bias still fits and the product of the scales is exact enough.
    smallest = np.maximum(np.abs(bias) / (input_scale * BIAS_LIMIT), TINY / min(input_scale, 1.0))
    dead = np.abs(scale) < smallest
    if dead.any():
        weight, scale = weight.copy(), scale.copy()
        if not zeroless:
            weight[dead] = 0
        scale[dead] = np.maximum(smallest[dead] * 2, 1e-12).astype(np.float32)
    unit = np.float32(input_scale) * scale
    integers = np.rint(bias / unit.astype(np.float64))
    return {"weight": weight, "weight_scale": scale, "bias": integers.astype(np.int32)}


def _float_bias(
    weight: np.ndarray[Any, Any],
    scale: np.ndarray[Any, Any],
    bias: np.ndarray[Any, Any],
    *,
    zeroless: bool,
) -> dict[str, np.ndarray[Any, Any]]:
    """Bias as float32, for a float input; scales of zero are replaced as in `_integer_bias`."""
    dead = np.abs(scale) < TINY
    if dead.any():
        weight, scale = weight.copy(), scale.copy()
        if not zeroless:
            weight[dead] = 0
        scale[dead] = TINY
    return {"weight": weight, "weight_scale": scale, "bias": bias.astype(np.float32)}
