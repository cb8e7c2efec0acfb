"""A batch in micro-batches, for memory that does not hold the whole of it.

The loss is that of the whole batch: the entropy couples all images, so its gradient is not the
sum of those of parts. So the network runs over the parts without keeping anything for the
backward pass, the loss is computed from all their outputs, and in the backward pass each part
runs once more and keeps what it needs, one after the other. That costs one more forward pass and
needs the memory of one part.

Only batch norm tells the parts from the whole: its statistics are those of a part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Network = Callable[[Tensor], tuple[Tensor, ...]]


class MicroBatches(nn.Module):
    """A network that takes a batch in parts; outputs are those of all parts, as rows.

    Args:
        network: whose parameters are trained.
        run: what computes it, for instance compiled.
        parts: how many.
    """

    def __init__(self, network: nn.Module, run: Network, parts: int) -> None:
        super().__init__()
        self.network, self.parts = network, parts
        self._run = run

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Images [N, C, H, W]."""
        if self.parts == 1:
            return self._run(images)
        outputs = [self._part(part) for part in images.chunk(self.parts)]
        return tuple(torch.cat(rows) for rows in zip(*outputs, strict=True))

    def _part(self, images: Tensor) -> tuple[Tensor, ...]:
        if not torch.is_grad_enabled():
            return self._run(images)
        outputs: tuple[Tensor, ...] = checkpoint(
            self._run, images, use_reentrant=False, context_fn=self._contexts
        )
        return outputs

    def _contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Around the first run of a part, and around the second."""
        return nullcontext(), _statistics_kept(self.network)


@contextmanager
def _statistics_kept(network: nn.Module) -> Iterator[None]:
    """The second run of a part must not count as another batch."""
    norms = [m for m in network.modules() if isinstance(m, (nn.BatchNorm2d, nn.BatchNorm1d))]
    kept = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        # They must be passed all the same: both runs have to save the same tensors.
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, counted) in zip(norms, kept, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, counted
