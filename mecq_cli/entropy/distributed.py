"""The batch of all processes, so that the coding length is that of the global batch."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def global_rows(z: Tensor) -> Tensor:
    """Rows [m, d] of every process, in the order of their ranks; ``z`` itself in a single one.

    Every process then computes the same loss of the same rows. The gradient that a process sees
    for its own rows is multiplied by the number of processes, since data parallel training
    averages the gradients of parameters over them: the average is the gradient of one process
    with the whole batch. That is right for a loss which all processes have in common, and needs
    no communication in the backward pass.

    Every process must bring equally many rows.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return z
    gathered: Tensor = _Gather.apply(z)
    return gathered


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.rows = len(z)
        parts = [torch.empty_like(z) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, z.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (gradient,) = gradients
        first = dist.get_rank() * ctx.rows
        return gradient[first : first + ctx.rows] * dist.get_world_size()
