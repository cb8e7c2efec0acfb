"""What all sites have in common."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mecq_cli.integer.ir import Grid, Node
from mecq_cli.kernels import run_node
from mecq_cli.quantizers import ActivationQuantizer


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

    @property
    def clips(self) -> bool:
        """Whether an activation was folded in."""
        return self.ceiling is not None

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

    def _bounds(self) -> tuple[float, float]:
        """What the activation that was folded in clips to; infinite where nothing is left to clip.

        A grid without negative values clips at zero by itself, at no cost, and its quantizer may
        let gradients through below (soft_ends.py).
        """
        if self.ceiling is None:
            return -math.inf, math.inf
        q = self.output_quantizer
        by_grid = q is not None and q.active and q.grid_is_unsigned
        return -math.inf if by_grid else 0.0, self.ceiling

    def _finish(self, y: Tensor) -> Tensor:
        q, (low, high) = self.output_quantizer, self._bounds()
        if math.isfinite(high):
            y = torch.clamp(y, low, high)
        elif math.isfinite(low):
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
