"""Backward passes of a CPU written by hand: of rounding, of a batch norm with rounding behind, and
of depthwise convolutions.

Of the first two the compiler makes several loops each, with maps of float32 between them, and jumps
over the channels; these take a quarter of the time. Of a depthwise convolution in bfloat16 with a
stride or a kernel of 5 oneDNN has no fast backward pass (PyTorch 2.14).

They are C++ (loops.cpp), which the compiler that `torch.compile` needs anyway compiles in some
seconds, once a machine. Where that fails, nothing is lost but time. Maps are bfloat16, weights
float32, and their gradients come as either.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from ctypes import c_float, c_int, c_int64, c_void_p
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


@functools.cache
def _library() -> ctypes.CDLL | None:
    from torch._inductor.codecache import CppCodeCache

    source = Path(__file__).with_suffix(".cpp").read_text(encoding="utf-8")
    try:
        library = CppCodeCache.load(source)
        pointers, floats, sizes = [c_void_p], [c_float], [c_int64]
        library.norm_round_backward.argtypes = [
            *pointers * 10,
            *floats * 6,
            *[c_int] * 2,
            *sizes * 2,
            c_int,
        ]
        grid = [*floats * 4, *[c_int] * 2]
        library.round_backward.argtypes = [*pointers * 4, *grid, *sizes, c_int]
        ends = [*floats * 2, c_int, c_int, *sizes * 2, c_int]
        library.weight_backward.argtypes = [*pointers * 5, *ends]
        library.depthwise_backward.argtypes = [*pointers * 6, *sizes, c_int]
        library.depthwise_backward.restype = c_int
        for name in ("norm_round", "round", "weight"):
            getattr(library, f"{name}_backward").restype = None
    except (RuntimeError, OSError, ImportError, AttributeError, TypeError):
        return None
    loaded: ctypes.CDLL = library
    return loaded


class Rounding(NamedTuple):
    """The rounding of an activation whose gradient the passes here compute.

    Attributes:
        scale: the step, of no dimensions.
        low, high: ends of the grid in units of it.
        soft: whether gradients end there at once, as LSQ's, or softly
            (`mecq_cli.quantizers.soft_backward`).
        grad_scale: factor of the gradient of the step.
        mid_rise: the grid has no zero: to odd integers.
        shift: what is added before, in units of the step.
    """

    scale: Tensor
    low: float
    high: float
    soft: bool
    grad_scale: float
    mid_rise: bool = False
    shift: float = 0.0


def is_available() -> bool:
    """Whether they could be compiled here; the first call does that."""
    return _library() is not None


def dense(x: Tensor) -> Tensor:
    """``x`` in the order of its channels, or as it is: what the passes here read.

    Who asks for it in a compiled program has it written so at once, where else it would be copied.
    """
    return x.contiguous(memory_format=_order(x))


def _order(x: Tensor) -> torch.memory_format:
    return torch.channels_last if x.dim() == 4 else torch.contiguous_format


@torch.library.custom_op("mecq::norm_round_backward", mutates_args=())
def norm_round_backward(
    grad: Tensor, y: Tensor, scale: Tensor, offset: Tensor, mean: Tensor, factor: Tensor,
    step: Tensor, floor: float, ceiling: float, low: float, high: float, soft: bool,
    mid_rise: bool, shift: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of ``round(clip(clip(out, floor, ceiling) / step + shift, low, high)) * step``.

    With ``out = y * scale + offset``, which is a batch norm: ``scale`` is ``weight * factor`` and
    ``offset`` is ``bias - mean * scale``. The gradient of the rounding is that of
    `mecq_cli.quantizers.round_backward`, or, where the ends are ``soft``, `soft_backward`.

    Args:
        grad: of the result, bfloat16 [N, C, H, W] or [N, C].
        y: the same shape and type.
        scale, offset, mean, factor: float32 [C]; the factor is 1 / sqrt(variance + eps).
        step: float32, of no dimensions.
        floor, ceiling: of an activation before the rounding; infinite without one.
        low, high, soft, mid_rise, shift: as of `Rounding`.

    Returns:
        Of y, of the weight and the bias [C], and of the step, not yet scaled.
    """
    library = _library()
    assert library is not None
    y, grad = dense(y), dense(grad)
    of_y, of_step = torch.empty_like(y), torch.empty_like(step)
    of_weight, of_bias = torch.empty_like(scale), torch.empty_like(scale)
    vectors = [v.contiguous() for v in (scale, offset, mean, factor)]
    tensors = (grad, y, of_y, *vectors, of_weight, of_bias, of_step)
    library.norm_round_backward(
        *(t.data_ptr() for t in tensors), 1.0 / float(step), floor, ceiling, low, high, shift,
        soft, mid_rise, y.numel() // y.shape[1], y.shape[1], torch.get_num_threads(),
    )  # fmt: skip
    return of_y, of_weight, of_bias, of_step


@norm_round_backward.register_fake
def _shapes(
    grad: Tensor, y: Tensor, scale: Tensor, offset: Tensor, mean: Tensor, factor: Tensor,
    step: Tensor, floor: float, ceiling: float, low: float, high: float, soft: bool,
    mid_rise: bool, shift: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    vector = torch.empty_like(scale)
    of_y = torch.empty_like(y, memory_format=_order(y))
    return of_y, vector, torch.empty_like(vector), torch.empty_like(step)


@torch.library.custom_op("mecq::round_backward", mutates_args=())
def round_backward(
    grad: Tensor, x: Tensor, step: Tensor, low: float, high: float, soft: bool,
    mid_rise: bool = False, shift: float = 0.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`mecq_cli.quantizers.round_backward`, or `soft_backward`, of one step, for bfloat16."""
    library = _library()
    assert library is not None
    x, grad = dense(x), dense(grad)
    of_x, of_step = torch.empty_like(x), torch.empty_like(step)
    library.round_backward(
        *(t.data_ptr() for t in (grad, x, of_x, of_step)), 1.0 / float(step), low, high, shift,
        soft, mid_rise, x.numel(), torch.get_num_threads(),
    )  # fmt: skip
    return of_x, of_step


@round_backward.register_fake
def _shape(
    grad: Tensor, x: Tensor, step: Tensor, low: float, high: float, soft: bool,
    mid_rise: bool = False, shift: float = 0.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return torch.empty_like(x, memory_format=_order(x)), torch.empty_like(step)


@torch.library.custom_op("mecq::weight_backward", mutates_args=())
def weight_backward(
    grad: Tensor, weight: Tensor, steps: Tensor, low: float, high: float, mid_rise: bool
) -> tuple[Tensor, Tensor]:
    """`mecq_cli.quantizers.round_backward` of a weight.

    Args:
        grad: bfloat16 or float32 [O, ...].
        weight: float32 of that shape.
        steps: float32 [O].
        low, high, mid_rise: as there.
    """
    library = _library()
    assert library is not None
    weight, grad = dense(weight), dense(grad)
    steps = steps.contiguous()
    of_weight, of_steps = torch.empty_like(weight), torch.empty_like(steps)
    library.weight_backward(
        *(t.data_ptr() for t in (grad, weight, steps, of_weight, of_steps)), low, high, mid_rise,
        grad.dtype == torch.bfloat16, len(weight), weight.numel() // len(weight),
        torch.get_num_threads(),
    )  # fmt: skip
    return of_weight, of_steps


@weight_backward.register_fake
def _weight_shape(
    grad: Tensor, weight: Tensor, steps: Tensor, low: float, high: float, mid_rise: bool
) -> tuple[Tensor, Tensor]:
    of_steps = torch.empty_like(steps, memory_format=torch.contiguous_format)
    return torch.empty_like(weight, memory_format=_order(weight)), of_steps


def depthwise_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int],
    padding: Sequence[int], dilation: Sequence[int],
) -> Tensor:  # fmt: skip
    """``F.conv2d`` of each channel for itself; only the backward pass is another one.

    Args:
        x: bfloat16 [N, C, H, W].
        weight: [C, 1, kH, kW]; its gradient is summed in float32 and float64.
        bias: [C].
        stride, padding, dilation: of rows and columns.
    """
    out: Tensor = _Depthwise.apply(x, weight, bias, [*stride], [*padding], [*dilation])
    return out


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: list[int],
        padding: list[int], dilation: list[int],
    ) -> Tensor:  # fmt: skip
        weight = weight.to(x.dtype)
        ctx.save_for_backward(x, weight)
        ctx.geometry = (stride, padding, dilation)
        own = None if bias is None else bias.to(x.dtype)
        return F.conv2d(x, weight, own, stride, padding, dilation, len(weight))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_bias = grads[0].float().sum((0, 2, 3)) if ctx.needs_input_grad[2] else None
        of_both = depthwise_backward(grads[0], x, weight, *ctx.geometry)
        return (*of_both, of_bias, None, None, None)


@torch.library.custom_op("mecq::depthwise_backward", mutates_args=())
def depthwise_backward(
    grad: Tensor, x: Tensor, weight: Tensor, stride: list[int], padding: list[int],
    dilation: list[int],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of a convolution of each channel for itself: of the map and of the weight.

    Args:
        grad: of the result, bfloat16 [N, C, H', W'].
        x: bfloat16 [N, C, H, W].
        weight: bfloat16 [C, 1, kH, kW].
        stride, padding, dilation: of rows and columns.

    Returns:
        Bfloat16 like x, and float32 like the weight; of sums in float32 and float64.
    """
    library = _library()
    assert library is not None
    x, grad = dense(x), dense(grad)
    of_x = torch.empty_like(x)
    of_weight = torch.empty(weight.shape)
    taps = weight.float().flatten(1).T.contiguous()
    sizes = [*x.shape[1:], *grad.shape[2:], *weight.shape[2:], *stride, *padding, *dilation]
    done = library.depthwise_backward(
        *(t.data_ptr() for t in (grad, x, taps, of_x, of_weight)), (c_int64 * len(sizes))(*sizes),
        len(x), torch.get_num_threads(),
    )  # fmt: skip
    if not done:
        raise MemoryError("the backward pass of a depthwise convolution")
    return of_x, of_weight


@depthwise_backward.register_fake
def _depthwise_shapes(
    grad: Tensor, x: Tensor, weight: Tensor, stride: list[int], padding: list[int],
    dilation: list[int],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    of_weight = torch.empty(weight.shape, device=weight.device)
    return torch.empty_like(x, memory_format=_order(x)), of_weight
