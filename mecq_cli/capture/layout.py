"""Where the images are in a value of an exported graph, and its shape without them.

The layers keep the images on the first axis. Exported graphs do not: attention moves them behind
another axis ([3, N, heads, T, d]), windows share an axis with them ([N * windows, T, C]). So a
value of a graph is kept as [N, k, ...]: k are the values of an image that its axis of images is
shared with (left out where it is one), then come all other axes in their order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node as FxNode

from mecq_cli.errors import UsageError

IMAGES = 2
"""In the example that the graph was exported with."""


@dataclass(frozen=True)
class Layout:
    """How a value of the graph lies.

    Attributes:
        sizes: of its axes; that of the images is counted for one image.
        batch: which axis has the images.
    """

    sizes: tuple[int, ...]
    batch: int

    @property
    def shared(self) -> bool:
        """Whether the images share their axis."""
        return self.sizes[self.batch] != 1

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the layer's value, without the batch."""
        rest = tuple(s for i, s in enumerate(self.sizes) if i != self.batch)
        return (self.sizes[self.batch], *rest) if self.shared else rest

    @property
    def order(self) -> tuple[int, ...]:
        """The axes of the graph's value in the order in which the layer's has them."""
        rest = tuple(i for i in range(len(self.sizes)) if i != self.batch)
        return (self.batch, *rest) if self.shared else rest

    @property
    def plain(self) -> bool:
        """Whether it is as layers have it."""
        return self.batch == 0 and not self.shared

    def axis(self, axis: int) -> int:
        """The layer's axis, counted from 1, that an axis of the graph's value is."""
        return self.order.index(axis % len(self.sizes)) + 1


def layout(node: FxNode, index: int | None = None) -> Layout:
    """Of a value, or one of several, of an exported graph.

    Raises:
        UsageError: it has not one axis with images.
    """
    value = node.meta["val"] if index is None else node.meta["val"][index]
    if not isinstance(value, torch.Tensor):
        raise UsageError(
            f"{node.name}: a number that depends on how many images there are; this model cannot "
            "be quantized"
        )
    shape: list[Any] = list(value.shape)
    dynamic = [i for i, size in enumerate(shape) if isinstance(size, torch.SymInt)]
    if len(dynamic) != 1:
        raise UsageError(
            f"{node.name}: a value of shape {[str(s) for s in value.shape]} does not have one axis "
            "of images; this model cannot be quantized"
        )
    sizes = [
        size_of(size) // IMAGES if isinstance(size, torch.SymInt) else int(size) for size in shape
    ]
    return Layout(tuple(sizes), dynamic[0])


def size_of(size: Any) -> int:
    """What a size was in the example."""
    hint: Any = size.node.hint if isinstance(size, torch.SymInt) else size
    return int(hint)
