"""The integer model: a short list of operations on integers, and nothing about training.

Every exporter reads this and every runner executes it. Activations between two integer
operations are ``uint8`` arrays; what their values mean is said by a `Grid`. All scales are
float32 numbers, all rounding is half to even, and all the float arithmetic is float32: this
is what ``QLinearConv`` and its kin do in onnxruntime, so that one definition serves all.

Legend:  q  an integer on a grid        fl(.)  rounded to float32
         x, y  input and output         rne(.) rounded half to even
         s, z  scale and zero point     w, b   integer weight and bias

| op              | inputs | meaning (then clipped to [qmin, qmax] where the node has a grid)      |
|-----------------|--------|-----------------------------------------------------------------------|
| quantize        | float  | rne(fl(x / s_y)) + z_y                                                |
| dequantize      | grid   | fl((q - z_x) * s_x)                                  (float output)   |
| requantize      | grid   | rne(fl(fl((q - z_x) * s_x) / s_y)) + z_y                              |
| threshold       | grid   | how many of the ascending ints t of ``thresholds`` have q >= t, times |
|                 |        | the spacing of the grid                                               |
| lookup          | grid   | table[q], which holds rne(fl(f(x) / s_y)) + z_y for each integer q    |
| conv2d, linear  | grid   | acc = sum (q - z_x) W + b, exact in int32; W = w * weight_multiplier  |
|                 |        | with a grid:    rne(fl(fl(acc) * fl(fl(s_x * s_w) / s_y))) + z_y      |
|                 |        | without:        fl(fl(acc) * fl(s_x * s_w))          (float output)   |
| conv2d, linear  | float  | float convolution with fl(w * s_w) and a float bias  (float output)   |
| add             | 2 grid | rne(((q_a - z_a) s_a + (q_b - z_b) s_b) / s_y + z_y); the scales are  |
|                 |        | powers of two and z_y is even, so that every way of computing this    |
|                 |        | gives one answer (halves are common, and QLinearAdd rounds last);     |
|                 |        | they lie apart by a factor of 2^40 at most, beyond 2^14 in float64    |
|                 | 2 float| fl(a + b)                                            (float output)   |
| mul             | 2 grid | rne((q_a - z_a) s_a (q_b - z_b) s_b / s_y + z_y), scales and z_y as   |
|                 |        | in add                                                                |
|                 | 2 float| fl(a * b)                                            (float output)   |
| function        | float  | f(x), in float32                                     (float output)   |
| clip            | float  | clip(x, min, max); max may be None                   (float output)   |
| max_pool2d      | any    | of the integers; output on the grid of the input                      |
| avg_pool2d      | grid   | acc = sum (q - z_x) over the n values of a window;                    |
|                 |        | rne(fl(fl(acc) * fl(s_x / fl(s_y * n)))) + z_y                        |
| global_avg_pool | grid   | the same over the whole plane, [N, C, H, W] -> [N, C, 1, 1]           |
|                 |        | without a grid: fl(fl(acc) * fl(s_x / n))            (float output)   |
| adaptive_       | grid   | as avg_pool2d, over windows from floor(i n / m) to, and without,      |
| avg_pool2d      |        | ceil((i + 1) n / m), where m of them cover n values                   |
| all avg pools   | float  | the mean                                             (float output)   |
| concat          | any    | along axis 1; every input has the scale and zero point of the output  |
| flatten         | any    | [N, ...] -> [N, prod(...)]; output on the grid of the input           |
| slice           | any    | x[..., start:end:step, ...] on the named axes; grid of the input      |
| reshape         | any    | the same values in another shape, batch aside; grid of the input      |
| transpose       | any    | axes in another order, the batch stays first; grid of the input       |
| upsample        | any    | row i and column j of the result are floor(i h / H) and floor(j w / W)|
|                 |        | of the input; grid of the input                                       |
| resize          | float  | bilinear: between the two nearest rows and columns   (float output)   |
| pad             | any    | zeros around (the zero point on a grid); grid of the input            |
| roll            | any    | moved along ``axes`` by ``shifts``, cyclically; grid of the input     |
| matmul          | 2 grid | acc = sum (q_a - z_a) (q_b - z_b) over the last axis of a and the     |
|                 |        | one before the last of b, exact in int32; m = fl(fl(s_a f) s_b)       |
|                 |        | with a grid:    rne(fl(fl(acc) * fl(m / s_y))) + z_y                  |
|                 |        | without:        fl(fl(acc) * m)                      (float output)   |
|                 | 2 float| the product times f, the ``factor``                  (float output)   |
| constant        | image  | the tensor ``value``, once for each image            (float output)   |
| layer_norm      | float  | (x - mean) / sqrt(var + eps) * weight + bias over the last axis       |
| group_norm      | float  | the same over each of ``groups`` equal parts of axis 1 and all axes   |
|                 |        | behind it; weight and bias are for axis 1            (float output)   |
| softmax         | float  | exp(x - max) / sum over the last axis                (float output)   |
| log_softmax     | float  | x - max - log sum exp(x - max) over the last axis    (float output)   |
| l2_normalize    | float  | x / max(sqrt(sum x^2), eps) over the last axis       (float output)   |
| rms_norm        | float  | x / sqrt(mean x^2 + eps) over the last axis          (float output)   |

A linear layer takes [N, ..., I] to [N, ..., O]. What `layer_norm`, `group_norm`, `softmax`,
`log_softmax`, `l2_normalize`, `rms_norm`, `resize` and float products compute is said up to the
order of their sums, so their last bits are a runtime's own; the integer operations behind them are
exact given what they read.
Where all steps are powers of two, resizing by a power of two is exact, too.

Inputs of add and mul are of one rank, and an axis of length 1 is repeated.

The integer bias counts in units of s_x * s_w. With few bits such a unit would be as large as a
whole step of the output, so weights of less than 7 bits are multiplied by a power of two before
they are used (`weight_multiplier`; s_w belongs to the products W), which makes the unit so much
finer. They are stored as they are, and the sums stay far within int32.

Weights of b bits lie on one of two grids, in the terms of signal processing:

| grid      | bits      | integers w                                     | as a code c of b bits   |
|-----------|-----------|------------------------------------------------|-------------------------|
| mid-tread | 2 to 8    | -2^(b-1) ... 2^(b-1) - 1                       | w = c - 2^(b-1)         |
| mid-rise  | 1, 2 to 6 | -(2^b - 1), ..., -3, -1, 1, 3, ..., 2^b - 1    | w = 2 c - (2^b - 1)     |

A mid-rise grid has no zero. Weights of 1 bit are always on one; those of 2 to 6 bits where their
node says so (`Node.mid_rise`). With more bits its ends would leave what `saturation` allows.

`threshold` is how activations get steps of unequal width, and grids without zero: it turns the
integers of one grid into codes 0, 1, 2, ..., or 0, 2, 4, ... where its own grid has that spacing,
which are integers as any other. A value that comes from sums of products or
from floats is first rounded to a fine grid of 8 bits, in units of which the thresholds are learned;
one that is on a grid already is compared as it is. So there is no other arithmetic than that of the
uniform grids, every runtime has fast kernels for it, and a comparison of bytes is exact in all.

`lookup` is any other function of a single value: a byte has 256 values, so a table says it all. It
is computed once, when the integer model is made, and is the same bytes in every runtime; entries
for integers outside of the input's range are never read. A product of two values (a gate, most of
the time) has at most 16 bits, so that between powers of two every way of computing it is exact.

`relu` and `relu6` on a grid have no operation of their own: they are the clipping of the node
before.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

INPUT = "input"
"""Name of the float image batch [N, C, H, W] that the first node reads."""


@dataclass(frozen=True)
class Grid:
    """Where the integers of an activation lie: real value = scale * (q - zero_point).

    ``qmin`` and ``qmax`` are what the values are clipped to; they may be tighter than
    [0, 2**bits - 1] where a ReLU or ReLU6 was folded in. On a grid without zero ``spacing`` is 2:
    its integers are 0, 2, 4, ..., 2 (2**bits - 1) and the zero point is odd.
    """

    scale: float
    zero_point: int
    bits: int
    qmin: int
    qmax: int
    spacing: int = 1

    @property
    def reach(self) -> int:
        """The largest |q - zero_point|."""
        return max(abs(self.qmin - self.zero_point), abs(self.qmax - self.zero_point))

    def same_values(self, other: Grid) -> bool:
        """Whether an integer means the same number on both grids."""
        return self.scale == other.scale and self.zero_point == other.zero_point


@dataclass(frozen=True)
class Node:
    """One operation. Its output carries its name.

    Attributes:
        name: unique; the path of the module in the original network where there is one.
        op: see the table above.
        inputs: names of earlier nodes, or `INPUT`.
        grid: of the output; None for a float output.
        attributes: conv2d: stride, dilation (two ints each), padding (top, left, bottom,
            right), groups;
            max_pool2d: kernel, stride, padding, dilation (two ints each), ceil_mode (bool);
            avg_pool2d: kernel, stride, padding (two ints each), ceil_mode, count_include_pad;
            slice: axes, starts, ends, steps (lists of ints of one length; axis 0 never);
            clip: min (0.0), max (a float or None);
            function: name (see integer/functions.py), parameters (numbers);
            pad: before, after (an int for each of the axes 1, 2, 3);
            reshape: shape (of the output, without the batch);
            transpose: axes (a permutation of 1 to the number of axes);
            upsample, adaptive_avg_pool2d, resize: size (two ints: H, W of the output);
            resize: align_corners (bool; see integer/resizing.py);
            roll: axes, shifts (lists of ints of one length); matmul: factor (a float32);
            layer_norm, l2_normalize, rms_norm: eps; group_norm: groups, eps;
            threshold: thresholds (2^bits - 1 ints from 1 to 256, of which 256 is never reached;
            the grid of the node has all of its codes, and the zero point 0 or no zero).
        weight_bits: bits a weight takes (conv2d, linear); 32 for float weights.
        tensors: conv2d, linear: ``weight`` int8 [O, I/groups, kh, kw] or [O, I] (float32 where
            weight_bits is 32), ``weight_scale`` float32 [O] (signed: the batch norm is folded
            in), ``bias`` int32 [O] (float32 where the input or the weights are float);
            lookup: ``table`` uint8 [256]; layer_norm, group_norm: ``weight`` and ``bias``,
            constant: ``value``, all float32.
        mid_rise: weights of 2 to 6 bits are on the grid without zero, as those of 1 bit always
            are.
    """

    name: str
    op: str
    inputs: tuple[str, ...]
    grid: Grid | None
    attributes: Mapping[str, Any] = field(default_factory=dict)
    weight_bits: int | None = None
    tensors: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    mid_rise: bool = False

    @property
    def multiplier(self) -> int:
        """`weight_multiplier` of a conv2d or linear node with integer weights."""
        assert self.weight_bits is not None
        return weight_multiplier(self.weight_bits, mid_rise=self.mid_rise)


MOVES = frozenset(
    ("max_pool2d", "concat", "flatten", "slice", "reshape", "transpose", "upsample", "pad", "roll")
)
"""Operations that move integers and compute none."""

EXACT = 2**24
"""Below it float32 holds every integer, and so every partial sum of integers."""

SPREAD = 2.0**14
"""How far the scales of an add may lie apart so that float32, of 24 bits, holds its sums exactly:
three terms of 8 bits take 10. Beyond it is computed in float64."""

LARGEST_SPREAD = 2.0**40
"""How far they may lie apart at all."""


def spread(*grids: Grid) -> float:
    """The ratio of the largest of their scales to the least."""
    scales = [grid.scale for grid in grids]
    return max(scales) / min(scales)


MID_RISE_BITS = range(2, 7)
"""Bits of weights that can be on either grid."""

MOST_THRESHOLD_BITS = 4
"""Of the output of a threshold: it takes a comparison for each code but one."""


def weight_multiplier(bits: int, *, mid_rise: bool = False) -> int:
    """What weights of so many bits are multiplied by where they meet integers.

    The products are then of magnitude 64 at most (8 bits: 128).
    """
    return int(2 ** max(7 - bits - mid_rise, 0))


def multiplied_weight(node: Node) -> NDArray[np.int8]:
    """W of a conv2d or linear node whose input is on a grid: int8, of magnitude at most 128."""
    multiplier = np.int8(node.multiplier)
    product: NDArray[np.int8] = np.asarray(node.tensors["weight"], np.int8) * multiplier
    return product


@dataclass(frozen=True)
class IntegerModel:
    """A whole network. ``nodes`` are in the order of execution; the last one is the output.

    Attributes:
        nodes: the operations.
        input_shape: (channels, height, width) of an image.
        metadata: JSON-able: model (name), wbits, abits, classes (list of names),
            preprocessing (see models.preprocessing).
    """

    nodes: tuple[Node, ...]
    input_shape: tuple[int, int, int]
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def output(self) -> Node:
        """The node whose values are the logits [N, classes]."""
        return self.nodes[-1]


LEAST_SHARED = 1024
"""Bytes of a packed weight from which on it is stored once, where several layers have it."""


def is_shared(weights: int, bits: int) -> bool:
    """Whether so many weights are stored once where several layers have the same."""
    return weights * bits >= 8 * LEAST_SHARED


def shared_weights(model: IntegerModel) -> dict[str, str]:
    """Layers whose weight, to the last bit, an earlier layer has too, and which one that is.

    So it is where a network runs a layer at several places, as heads of a pyramid of features.
    """
    first: dict[tuple[Any, ...], str] = {}
    found: dict[str, str] = {}
    for node in model.nodes:
        bits = node.weight_bits
        if bits is None or not is_shared(node.tensors["weight"].size, bits):
            continue
        weight = node.tensors["weight"]
        digest = hashlib.sha256(weight.tobytes()).digest()
        key = (bits, node.mid_rise, weight.dtype.str, weight.shape, digest)
        if key in first:
            found[node.name] = first[key]
        else:
            first[key] = node.name
    return found
