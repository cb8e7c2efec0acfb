"""The modules a quantized network is made of.

In training a site carries real values that lie on the grid of their quantizer (fake
quantization) and batch norm uses the batch. In evaluation it carries the integers themselves,
and every site runs the very operation that will be exported: `Site.node` describes it,
`mecq_cli.kernels` executes it. Nothing is rounded differently later.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mecq_cli.integer.ir import Grid, Node, weight_multiplier
from mecq_cli.integer_conv import Geometry
from mecq_cli.integer_conv import conv2d as integer_conv2d
from mecq_cli.kernels import run_node
from mecq_cli.normalization import batch_norm
from mecq_cli.quantizers import ActivationQuantizer, WeightQuantizer

BIAS_LIMIT = 2**30
"""Integer biases beyond this would leave int32; such a channel is a constant."""

TINY = 1e-30
"""Products of float32 scales below this lose digits."""


class Reference:
    """Keeps a module without owning it, so that its state is stored once."""

    def __init__(self, module: ActivationQuantizer | None) -> None:
        self.module = module


class Site(nn.Module):
    """One operation of the quantized network.

    Attributes:
        name: as in the captured graph.
        sources: quantizers of the inputs; None in a place whose input is float.
        output_quantizer: of the output; None where the output is float or keeps the input's grid.
        wbits, abits: what the site table shows; None where the site has no such thing.
    """

    op: str = ""
    wbits: int | None = None
    abits: int | None = None

    def __init__(
        self,
        name: str,
        sources: Sequence[ActivationQuantizer | None],
        output_quantizer: ActivationQuantizer | None = None,
        ceiling: float | None = None,
    ) -> None:
        super().__init__()
        self.name = name
        self._sources = tuple(Reference(s) for s in sources)
        self.output_quantizer = output_quantizer
        self.ceiling = ceiling

    def source_grids(self) -> list[Grid | None]:
        """Grids of the inputs."""
        return [None if r.module is None else r.module.grid() for r in self._sources]

    def output_grid(self) -> Grid | None:
        """What is rounded to: the grid of the output, or the one on which its thresholds lie.

        An activation that was folded in narrows what it is clipped to.
        """
        if self.output_quantizer is None:
            return None
        grid = self.output_quantizer.threshold_grid() or self.output_quantizer.grid()
        if self.ceiling is None:
            return grid
        qmax = grid.qmax
        if math.isfinite(self.ceiling):
            top = np.rint(np.float32(self.ceiling) / np.float32(grid.scale)) + grid.zero_point
            qmax = int(min(qmax, top))
        return replace(grid, qmin=max(grid.qmin, grid.zero_point), qmax=qmax)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Real values in training, integers (or floats, where there is no grid) in evaluation."""
        if self.training:
            return self._finish(self.compute(*inputs))
        values, grids = inputs, self.source_grids()
        # names do not matter for running a node, only for the list of nodes
        for node in self.nodes(("",) * len(inputs)):
            values, grids = (run_node(node, values, grids),), [node.grid]
        return values[0]

    def compute(self, *inputs: Tensor) -> Tensor:
        """The float operation on fake-quantized inputs."""
        raise NotImplementedError

    def _finish(self, y: Tensor) -> Tensor:
        q = self.output_quantizer
        if self.ceiling is not None:
            # A grid without negative values clips at zero by itself, at no cost.
            clips = q is not None and q.active and q.grid_is_unsigned
            if math.isfinite(self.ceiling):
                y = torch.clamp(y, 0.0, self.ceiling)
            elif not clips:
                y = F.relu(y)
        # Under autocast a batch norm may have given float32; what goes on has the type of all.
        stream = _stream_type(y)
        return y.to(stream) if q is None else q(y).to(stream)

    def node(self, inputs: tuple[str, ...]) -> Node:
        """The integer operation, with its tensors."""
        return Node(self.name, self.op, inputs, self.output_grid())

    def nodes(self, inputs: tuple[str, ...]) -> list[Node]:
        """That operation, and the one that compares with thresholds where these are learned."""
        node = self.node(inputs)
        q = self.output_quantizer
        if q is None or q.threshold_grid() is None:
            return [node]
        return [node, threshold(f"{node.name}.threshold", (node.name,), q, None)]


def threshold(
    name: str, inputs: tuple[str, ...], quantizer: ActivationQuantizer, source: Grid | None
) -> Node:
    """The codes of a quantizer that has thresholds; ``source`` as in `thresholds`."""
    attributes = {"thresholds": quantizer.thresholds(source)}
    return Node(name, "threshold", inputs, quantizer.grid(), attributes)


def _stream_type(y: Tensor) -> torch.dtype:
    """What the activations of a network are, which autocast decides where it is on."""
    kind = y.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else y.dtype


class QuantizeSite(Site):
    """A float value onto a grid, or from one grid to another."""

    def compute(self, *inputs: Tensor) -> Tensor:
        """The value itself; `forward` rounds it."""
        return inputs[0]

    def node(self, inputs: tuple[str, ...]) -> Node:
        """``quantize`` after a float, ``requantize`` after a grid."""
        op = "quantize" if self._sources[0].module is None else "requantize"
        return Node(self.name, op, inputs, self.output_grid())

    def nodes(self, inputs: tuple[str, ...]) -> list[Node]:
        """Integers are compared as they are."""
        (source,), q = self.source_grids(), self.output_quantizer
        if source is None or q is None or q.threshold_grid() is None:
            return super().nodes(inputs)
        return [threshold(self.name, inputs, q, source)]


class DequantizeSite(Site):
    """From a grid to float, for an operation that stays in float."""

    op = "dequantize"

    def compute(self, *inputs: Tensor) -> Tensor:
        """In training the value is a float already."""
        return inputs[0]


class ProductSite(Site):
    """Convolution or linear layer, with the batch norm and ReLU behind it.

    The weight is quantized as it is and the batch norm multiplies the integer result: folded
    into the per-channel scales afterwards this is the same function, and no weight is rounded
    twice.

    Args:
        module: nn.Conv2d or nn.Linear with the FP parameters.
        attributes: of a conv2d, as in integer/ir.py; empty for linear.
        norm: batch norm behind it.
        weight_quantizer: None leaves the weight in FP.

    Attributes:
        on_integers: where it is compiled, the convolution in training is one of integers.
    """

    on_integers = False

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
    ) -> None:
        super().__init__(name, sources, output_quantizer, ceiling)
        self.op = "conv2d" if isinstance(module, nn.Conv2d) else "linear"
        self.weight = module.weight
        self.bias = module.bias
        self.attributes = attributes
        self.norm = norm
        self.weight_quantizer = weight_quantizer
        self.wbits = 32 if weight_quantizer is None else weight_quantizer.bits
        self.abits = 32 if sources[0] is None else sources[0].bits

    def compute(self, *inputs: Tensor) -> Tensor:
        """Fake-quantized product, then batch norm."""
        x = inputs[0]
        weight = (
            self.weight if self.weight_quantizer is None else self.weight_quantizer(self.weight)
        )
        if self.op == "linear":
            y = F.linear(x, weight, self.bias)
        else:
            top, left, bottom, right = self.attributes["padding"]
            padding = (top, left)
            if (top, left) != (bottom, right):
                x, padding = F.pad(x, (left, right, top, bottom)), (0, 0)
            y = self._conv(x, weight, padding)
        if self.norm is None:
            return y
        if torch.compiler.is_compiling() and type(self.norm) in (nn.BatchNorm1d, nn.BatchNorm2d):
            return batch_norm(self.norm, y)
        normalised: Tensor = self.norm(y)
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
            return y if self.bias is None else y + self.bias.view(1, -1, 1, 1)
        return F.conv2d(x, weight, self.bias, a["stride"], padding, a["dilation"], a["groups"])

    @property
    def could_be_on_integers(self) -> bool:
        """Whether `mecq_cli.integer_conv` can do it, given inputs on the grid of their source.

        Where calibration finds that the zero point is one to be learned, it is not used after all.
        """
        return (
            self.op == "conv2d"
            and self.attributes["groups"] == 1
            and self._sources[0].module is not None
            and self.weight_quantizer is not None
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
            scale = scale / np.float32(weight_multiplier(self.wbits, mid_rise=mid_rise))
            tensors = _integer_bias(weight, scale, bias, source.grid().scale, zeroless=zeroless)
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


class AddSite(Site):
    """Residual add."""

    op = "add"

    def compute(self, *inputs: Tensor) -> Tensor:
        """The sum."""
        return inputs[0] + inputs[1]


class ClipSite(Site):
    """A ReLU or ReLU6 on floats; on a grid it is part of the operation before it."""

    op = "clip"

    def compute(self, *inputs: Tensor) -> Tensor:
        """`forward` clips by the ceiling."""
        return inputs[0]

    def node(self, inputs: tuple[str, ...]) -> Node:
        """With its bounds."""
        assert self.ceiling is not None
        top = self.ceiling if math.isfinite(self.ceiling) else None
        return Node(self.name, self.op, inputs, None, {"min": 0.0, "max": top})


class GlobalAveragePoolSite(Site):
    """Mean over the plane."""

    op = "global_avg_pool"

    def compute(self, *inputs: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, 1, 1]."""
        return inputs[0].mean((2, 3), keepdim=True)


class AveragePoolSite(Site):
    """Mean over windows."""

    op = "avg_pool2d"

    def __init__(self, *args: Any, attributes: dict[str, Any], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.attributes = attributes

    def compute(self, *inputs: Tensor) -> Tensor:
        """Windows as torch defines them."""
        a = self.attributes
        return F.avg_pool2d(
            inputs[0], a["kernel"], a["stride"], a["padding"], a["ceil_mode"],
            a["count_include_pad"],
        )  # fmt: skip

    def node(self, inputs: tuple[str, ...]) -> Node:
        """With the window."""
        return Node(self.name, self.op, inputs, self.output_grid(), dict(self.attributes))


class PassSite(Site):
    """An operation that moves values and keeps their grid: pool, concat, flatten, slice, pad."""

    def __init__(
        self,
        name: str,
        sources: Sequence[ActivationQuantizer | None],
        *,
        op: str,
        attributes: dict[str, Any],
    ) -> None:
        super().__init__(name, sources)
        self.op = op
        self.attributes = attributes
        # In training a zero is a zero: the grids play no part.
        self._moving = Node(name, op, (), None, attributes)

    def output_grid(self) -> Grid | None:
        """The grid of the input."""
        return self.source_grids()[0]

    def node(self, inputs: tuple[str, ...]) -> Node:
        """With its attributes."""
        return Node(self.name, self.op, inputs, self.output_grid(), dict(self.attributes))

    def forward(self, *inputs: Tensor) -> Tensor:
        """The same code moves real values and integers."""
        if not self.training:
            return super().forward(*inputs)
        return run_node(self._moving, inputs, [None] * len(inputs))


class DropoutSite(Site):
    """Dropout in training, nothing at all afterwards."""

    def __init__(self, name: str, sources: Sequence[ActivationQuantizer | None], p: float) -> None:
        super().__init__(name, sources)
        self.p = p

    def forward(self, *inputs: Tensor) -> Tensor:
        """Same shape."""
        return F.dropout(inputs[0], self.p, self.training)
