"""Convolutions whose forward pass in training is one of integers.

In training, too, activations and weights lie on integer grids, and a CPU with VNNI multiplies bytes
about twice as fast as bfloat16. The sums are exact then, as they will be after the export: those of
the values given, whose integers are found again from bfloat16, which holds a grid of up to 7 bits
(or one whose step is a power of two) exactly, and is off by one now and then on one of 8. The
backward pass is the usual one in bfloat16 or float32; it needs the activations and weights,
of which one byte a value is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Geometry:
    """As of `torch.nn.functional.conv2d`, with symmetric padding; groups are 1."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]


def is_available() -> bool:
    """Whether this CPU multiplies bytes exactly, and PyTorch has the operation for it.

    Without VNNI sums of two products saturate in 16 bits.
    """
    operations = torch.ops.onednn
    supported = getattr(torch.cpu, "_is_vnni_supported", lambda: False)
    return (
        bool(supported())
        and hasattr(operations, "qconv_prepack")
        and hasattr(operations, "qconv_pointwise")
    )


def windows_see_pixels(
    kernel: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> bool:
    """Whether no window lies in the padding alone, by row and by column.

    Of one that does, with one input channel and a zero point, oneDNN gives back what was in memory
    (PyTorch 2.14, kernel 2, padding 2).
    """
    return all(p <= d * (k - 1) for k, p, d in zip(kernel, padding, dilation, strict=True))


def conv2d(
    x: Tensor, scale: Tensor, zero_point: int, weight: Tensor, steps: Tensor, geometry: Geometry
) -> Tensor:
    """``F.conv2d(x, weight)`` in the type of ``x``, with sums of integers; gradients to both.

    Args:
        x: [N, C, H, W], on the grid ``(code - zero_point) * scale`` of codes 0 to 255.
        scale: of x, a scalar; no gradient.
        zero_point: of x.
        weight: [O, C, kH, kW], on the grid ``code * steps`` of codes -128 to 127.
        steps: [O], positive; no gradient.
        geometry: of the convolution; `windows_see_pixels` must hold.
    """
    out: Tensor = _Conv.apply(x, weight, scale.detach(), zero_point, steps.detach(), geometry)
    return out


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, scale: Tensor, zero_point: int, steps: Tensor,
        geometry: Geometry,
    ) -> Tensor:  # fmt: skip
        codes = torch.round(x.float() * scale.reciprocal() + zero_point).to(torch.uint8)
        integers = torch.round(weight.float() / steps.view(-1, 1, 1, 1)).to(torch.int8)
        ctx.save_for_backward(codes, scale, integers, steps)
        ctx.settings = (zero_point, geometry, x.dtype, weight.dtype)
        g = geometry
        out: Tensor = _product(
            codes, scale, zero_point, integers, steps,
            [*g.stride], [*g.padding], [*g.dilation], x.dtype == torch.bfloat16,
        )  # fmt: skip
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        codes, scale, integers, steps = ctx.saved_tensors
        zero_point, g, dtype, weight_dtype = ctx.settings
        x = ((codes.float() - zero_point) * scale).to(dtype)
        weight = (integers.float() * steps.view(-1, 1, 1, 1)).to(dtype)
        of_x, of_weight, _ = torch.ops.aten.convolution_backward(
            grads[0].to(dtype), x, weight, None, [*g.stride], [*g.padding],
            [*g.dilation], False, [0, 0], 1, [True, True, False],
        )  # fmt: skip
        return of_x, of_weight.to(weight_dtype), None, None, None, None


@torch.library.custom_op("mecq::integer_conv2d", mutates_args=())
def _product(
    codes: Tensor, scale: Tensor, zero_point: int, integers: Tensor, steps: Tensor,
    stride: list[int], padding: list[int], dilation: list[int], bf16: bool,
) -> Tensor:  # fmt: skip
    """Opaque to the compiler, which would want the weights as constants."""
    onednn, s = torch.ops.onednn, float(scale)
    # Packing does not ask for the steps; of all of them it would make numbers one by one.
    packed = onednn.qconv_prepack(
        integers, torch.ones(1), s, zero_point, stride, padding, dilation, 1, [*codes.shape]
    )
    zeros = torch.zeros(len(steps), dtype=torch.int32)
    out: Tensor = onednn.qconv_pointwise(
        codes, s, zero_point, packed, steps, zeros, None, stride, padding, dilation, 1, 1.0, 0,
        torch.bfloat16 if bf16 else torch.float32, "none", [], "",
    )  # fmt: skip
    return out


@_product.register_fake
def _shape(
    codes: Tensor, scale: Tensor, zero_point: int, integers: Tensor, steps: Tensor,
    stride: list[int], padding: list[int], dilation: list[int], bf16: bool,
) -> Tensor:  # fmt: skip
    sizes = [
        (size + 2 * pad - step * (kernel - 1) - 1) // skip + 1
        for size, pad, step, kernel, skip in zip(
            codes.shape[2:], padding, dilation, integers.shape[2:], stride, strict=True
        )
    ]
    out = codes.new_empty(
        (len(codes), len(integers), *sizes), dtype=torch.bfloat16 if bf16 else torch.float32
    )
    return out.to(memory_format=torch.channels_last)
