"""Rounding to a grid and its gradients: LSQ's, softer ones, and quick forms of both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mecq_cli import loops

FINE = 63
"""Integers in half a step of an activation without zero, on the grid of 8 bits of its thresholds:
of 2 bits the outer ones are 252 apart."""

SHIFT = 0.5 / FINE
"""So much lower than the middle of two levels a threshold is: between two of those integers."""


def round_forward(
    x: Tensor, scale: Tensor, qmin: float, qmax: float, mid_rise: bool, shift: float = 0.0
) -> Tensor:
    """``round(clip(x / s + shift, qmin, qmax)) * s``; shape and dtype of x."""
    v = units(x, scale) + shift
    return (to_integers(v, torch.clamp(v, qmin, qmax), mid_rise) * scale).to(x.dtype)


def round_backward(
    grad: Tensor, x: Tensor, scale: Tensor, qmin: float, qmax: float, mid_rise: bool
) -> tuple[Tensor, Tensor]:
    """Gradients to x and, not yet scaled, to the step, of the output's gradient."""
    return passing_backward(
        grad, x, scale, qmin, qmax, mid_rise,
        lambda grad, v, clipped, q: torch.where(clipped == v, grad, 0.0),
    )  # fmt: skip


def soft_backward(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    qmin: float,
    qmax: float,
    mid_rise: bool,
    shift: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """As `round_backward`, with ends that are soft (soft_ends.py)."""
    share = 0.5 if mid_rise else 1.0  # of the distance between two integers

    def passing(grad: Tensor, v: Tensor, clipped: Tensor, q: Tensor) -> Tensor:
        return grad * torch.clamp(torch.minimum(v - qmin, qmax - v) * share + 0.5, 0.0, 1.0)

    return passing_backward(grad, x, scale, qmin, qmax, mid_rise, passing, shift)


def passing_backward(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    qmin: float,
    qmax: float,
    mid_rise: bool,
    passing: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
    shift: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """As `round_backward`, with a choice of what of the gradient reaches x.

    Args:
        grad, x, scale, qmin, qmax, mid_rise: as there.
        passing: says it, of the gradient, of x in units of the step, of that clipped to the grid,
            and of the integer; float32 of one shape.
        shift: as in `round_forward`.
    """
    grad = grad.float()
    v = units(x, scale) + shift
    clipped = torch.clamp(v, qmin, qmax)
    q = to_integers(v, clipped, mid_rise)
    # What the step gets is made of a gradient that is needed anyway: grad * (round(v) - v) inside.
    grad_x = passing(grad, v, clipped, q)
    return grad_x.to(x.dtype), summed(grad * q - grad_x * v, scale)


def summed(products: Tensor, scale: Tensor) -> Tensor:
    """The gradient of a step, in its shape, from what each element of x contributes."""
    if scale.numel() == 1:
        # By image and channel first, in the order in which the batch norm in front sums too.
        if products.dim() == 4:
            products = products.sum((2, 3)).sum(0)
        grad_scale = products.sum()
    else:
        # Not flattened: in a channels_last weight that would be another order.
        grad_scale = products.sum(list(range(1, products.dim())))
    return grad_scale.reshape(scale.shape)


class Kernels(NamedTuple):
    """How the two are computed: `round_forward` and `round_backward`, or quicker ones.

    A quantizer that differs from LSQ by its gradients only has another ``backward``.

    Attributes:
        forward, backward: with the arguments of the two.
        dense: they see tensors as vectors, or weights as rows [O, K], in the order of the memory:
            one program is enough for all shapes.
    """

    forward: Callable[..., Tensor]
    backward: Callable[..., tuple[Tensor, ...]]
    dense: bool


def quick_forward(x: Tensor, scale: Tensor, qmin: float, qmax: float, mid_rise: bool) -> Tensor:
    """`round_forward`; in compiled programs a weight comes out as bfloat16.

    That is what autocast makes of it. Of a weight that is float32 here the gradient would be, too:
    of a large layer the backward pass then reads and writes twice the bytes.
    """
    rounded = round_forward(x, scale, qmin, qmax, mid_rise)
    quick = torch.compiler.is_compiling() and _is_weight(x, scale)
    return rounded.bfloat16() if quick else rounded


def quick_backward(
    grad: Tensor, x: Tensor, scale: Tensor, qmin: float, qmax: float, mid_rise: bool
) -> tuple[Tensor, Tensor]:
    """`round_backward`, in compiled programs by `mecq_cli.loops` where that can do it."""
    if torch.compiler.is_compiling() and _is_weight(x, scale):
        of_x, of_scale = loops.weight_backward(
            grad, x, scale.flatten(), float(qmin), float(qmax), mid_rise
        )
        return of_x, of_scale.reshape(scale.shape)
    if not mid_rise and _loops_can(grad, x, scale):
        return _by_loops(grad, x, scale, qmin, qmax, soft=False)
    return round_backward(grad, x, scale, qmin, qmax, mid_rise)


def mid_rise_forward(x: Tensor, scale: Tensor, qmin: float, qmax: float, mid_rise: bool) -> Tensor:
    """`round_forward` to the thresholds of mid_rise.py, which are between integers of its own."""
    return round_forward(x, scale, qmin, qmax, mid_rise, SHIFT)


def mid_rise_backward(
    grad: Tensor, x: Tensor, scale: Tensor, qmin: float, qmax: float, mid_rise: bool
) -> tuple[Tensor, Tensor]:
    """`soft_backward` there."""
    return soft_backward(grad, x, scale, qmin, qmax, mid_rise, SHIFT)


def quick_mid_rise_backward(
    grad: Tensor, x: Tensor, scale: Tensor, qmin: float, qmax: float, mid_rise: bool
) -> tuple[Tensor, Tensor]:
    """The same, by `mecq_cli.loops` where that can do it."""
    if _loops_can(grad, x, scale):
        return _by_loops(grad, x, scale, qmin, qmax, soft=True, mid_rise=mid_rise, shift=SHIFT)
    return mid_rise_backward(grad, x, scale, qmin, qmax, mid_rise)


def quick_soft_backward(
    grad: Tensor, x: Tensor, scale: Tensor, qmin: float, qmax: float, mid_rise: bool
) -> tuple[Tensor, Tensor]:
    """`soft_backward`, likewise."""
    if not mid_rise and _loops_can(grad, x, scale):
        return _by_loops(grad, x, scale, qmin, qmax, soft=True)
    return soft_backward(grad, x, scale, qmin, qmax, mid_rise)


def _by_loops(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    qmin: float,
    qmax: float,
    *,
    soft: bool,
    mid_rise: bool = False,
    shift: float = 0.0,
) -> tuple[Tensor, Tensor]:
    ends = float(qmin), float(qmax)
    of_x, of_scale = loops.round_backward(loops.dense(grad), x, scale, *ends, soft, mid_rise, shift)
    return of_x, of_scale


def _loops_can(grad: Tensor, x: Tensor, scale: Tensor) -> bool:
    """Whether it is for `loops.round_backward`."""
    of_one_step = x.dtype == grad.dtype == torch.bfloat16 and scale.dim() == 0
    return torch.compiler.is_compiling() and of_one_step


def _is_weight(x: Tensor, scale: Tensor) -> bool:
    """Float32, with a step for each row."""
    return x.dtype == torch.float32 and scale.dim() == x.dim() > 1 and scale.numel() == len(x)


PLAIN = Kernels(round_forward, round_backward, dense=False)
QUICK = Kernels(quick_forward, quick_backward, dense=False)
"""Where all that reads a quantized weight computes in bfloat16."""

SOFT = Kernels(round_forward, soft_backward, dense=False)
QUICK_SOFT = Kernels(quick_forward, quick_soft_backward, dense=False)
"""Of activations."""

MID_RISE = Kernels(mid_rise_forward, mid_rise_backward, dense=False)
QUICK_MID_RISE = Kernels(mid_rise_forward, quick_mid_rise_backward, dense=False)
"""Of activations on a grid without zero."""

_QUICK = {PLAIN: QUICK, SOFT: QUICK_SOFT, MID_RISE: QUICK_MID_RISE}


def quicker(kernels: Kernels) -> Kernels:
    """The same, where there are such, for compiled programs that compute in bfloat16 on a CPU."""
    return _QUICK.get(kernels, kernels)


ENDS_SOFTLY = {
    PLAIN: False, QUICK: False, SOFT: True, QUICK_SOFT: True, MID_RISE: True, QUICK_MID_RISE: True
}  # fmt: skip
"""Of the gradients that `mecq_cli.loops` can compute."""


class FakeQuantize(torch.autograd.Function):
    """Clip and round to a grid with a learned step; gradients of LSQ.

    With v = x / s the value is ``round(clip(v, qmin, qmax)) * s`` (arXiv 1902.08153, Eq. 1-2).
    The gradient to x passes where v lies inside the grid; the gradient to s is
    ``round(v) - v`` inside and qmin or qmax outside (Eq. 3), times ``grad_scale``
    (section 2.2). Only x and s are kept for the backward pass.

    ``mid_rise`` rounds to odd integers instead, without a zero between them (at 1 bit to -1 and
    +1); s is half the distance between two of them then.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        qmin: float,
        qmax: float,
        grad_scale: float,
        mid_rise: bool,
        kernels: Kernels,
    ) -> Tensor:
        """``x`` of any shape; ``scale`` broadcasts against it. Returns x's shape and dtype."""
        ctx.save_for_backward(x, scale)
        ctx.settings = (qmin, qmax, grad_scale, mid_rise, kernels)
        if not kernels.dense:
            return kernels.forward(x, scale, qmin, qmax, mid_rise)
        rows, steps = dense(x, scale)
        return shaped(kernels.forward(rows, steps, qmin, qmax, mid_rise), x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients to x and s; None for the settings."""
        x, scale = ctx.saved_tensors
        qmin, qmax, grad_scale, mid_rise, kernels = ctx.settings
        if not kernels.dense:
            grad_x, grad_s = kernels.backward(grads[0], x, scale, qmin, qmax, mid_rise)
        else:
            rows, steps = dense(x, scale)
            grad, _ = dense(grads[0], scale, like=x)
            flat, grad_s = kernels.backward(grad, rows, steps, qmin, qmax, mid_rise)
            grad_x = shaped(flat, x)
        return grad_x, (grad_s * grad_scale).reshape(scale.shape), None, None, None, None, None


def _channels_last(x: Tensor) -> bool:
    return x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)


def dense(x: Tensor, scale: Tensor, like: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """X as a vector, or as rows where there are several steps, in the order of the memory.

    Args:
        x: of any shape.
        scale: one step, or one for each row.
        like: the tensor whose memory gives the order, if not x.
    """
    last = _channels_last(x if like is None else like)
    if like is not None:
        x = x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    ordered = x.permute(0, 2, 3, 1) if last else x
    if scale.numel() == 1:
        return ordered.reshape(-1), scale
    return ordered.reshape(len(x), -1), scale.reshape(-1, 1)


def shaped(values: Tensor, like: Tensor) -> Tensor:
    """The inverse of `dense`."""
    if not _channels_last(like):
        return values.reshape(like.shape)
    n, c, h, w = like.shape
    return values.reshape(n, h, w, c).permute(0, 3, 1, 2)


def units(x: Tensor, scale: Tensor) -> Tensor:
    """Values in units of the step, float32."""
    if scale.numel() == 1:
        return x.float() * scale.reciprocal()  # a division takes a CPU several times as long
    return x.float() / scale


def to_integers(v: Tensor, clipped: Tensor, mid_rise: bool) -> Tensor:
    """The nearest integers, or odd integers, of values v in units of the step."""
    if mid_rise:
        # The nearest of 1, 3, 5, ... and the sign of v, which is + at zero.
        return torch.where(v >= 0, 1.0, -1.0) * (2.0 * torch.floor(clipped.abs() * 0.5) + 1.0)
    return torch.round(clipped)


def straight_through(value: Tensor, surrogate: Tensor) -> Tensor:
    """``value``, to the last bit, with the gradients of ``surrogate``."""
    return value.detach() + (surrogate - surrogate.detach())


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    qmin: float,
    qmax: float,
    grad_scale: float,
    mid_rise: bool = False,
    kernels: Kernels = PLAIN,
) -> Tensor:
    """Apply `FakeQuantize`."""
    out: Tensor = FakeQuantize.apply(x, scale, qmin, qmax, grad_scale, mid_rise, kernels)
    return out
