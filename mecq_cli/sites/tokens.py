"""What transformers have beside linear layers: attention's products, and what stays in float."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mecq_cli.integer.ir import Grid, Node
from mecq_cli.kernels import resize
from mecq_cli.quantizers import ActivationQuantizer
from mecq_cli.sites.base import Site


class MatmulSite(Site):
    """The product of two values.

    Args:
        factor: multiplies it; part of the scales in the integer operation.
    """

    op = "matmul"

    def __init__(
        self,
        name: str,
        sources: Sequence[ActivationQuantizer | None],
        output_quantizer: ActivationQuantizer | None,
        *,
        factor: float,
    ) -> None:
        super().__init__(name, sources, output_quantizer)
        self.factor = float(np.float32(factor))
        self.abits = 32 if sources[0] is None else sources[0].bits

    def compute(self, *inputs: Tensor) -> Tensor:
        """[N, ..., M, K] times [N, ..., K, P]."""
        product = torch.matmul(*inputs)
        return product if self.factor == 1.0 else product * self.factor

    def node(self, inputs: tuple[str, ...]) -> Node:
        """With the factor."""
        return Node(self.name, self.op, inputs, self.output_grid(), {"factor": self.factor})


class FloatSite(Site):
    """An operation on floats that gives floats."""

    def __init__(self, name: str) -> None:
        super().__init__(name, [None])

    def output_grid(self) -> Grid | None:
        """None."""
        return None


class NormSite(FloatSite):
    """Layer norm or group norm.

    Args:
        module: with its weight and bias, which may be buffers.
    """

    def __init__(self, name: str, *, module: nn.LayerNorm | nn.GroupNorm) -> None:
        super().__init__(name)
        self.op = "layer_norm" if isinstance(module, nn.LayerNorm) else "group_norm"
        self.norm = module

    def compute(self, *inputs: Tensor) -> Tensor:
        """Same shape."""
        normalised: Tensor = self.norm(inputs[0])
        return normalised

    def node(self, inputs: tuple[str, ...]) -> Node:
        """With weight and bias."""
        attributes: dict[str, Any] = {"eps": float(self.norm.eps)}
        if isinstance(self.norm, nn.GroupNorm):
            attributes["groups"] = self.norm.num_groups
        tensors = {"weight": _array(self.norm.weight), "bias": _array(self.norm.bias)}
        return Node(self.name, self.op, inputs, None, attributes, tensors=tensors)


class SoftmaxSite(FloatSite):
    """Softmax over the last axis."""

    op = "softmax"

    def compute(self, *inputs: Tensor) -> Tensor:
        """Same shape."""
        return torch.softmax(inputs[0], -1)


class LogSoftmaxSite(FloatSite):
    """The logarithm of a softmax over the last axis."""

    op = "log_softmax"

    def compute(self, *inputs: Tensor) -> Tensor:
        """Same shape."""
        return torch.log_softmax(inputs[0], -1)


class NormalizeSite(FloatSite):
    """Rows of length one.

    Args:
        eps: the least length that is divided by.
    """

    op = "l2_normalize"

    def __init__(self, name: str, *, eps: float) -> None:
        super().__init__(name)
        self.eps = eps

    def compute(self, *inputs: Tensor) -> Tensor:
        """Same shape."""
        return F.normalize(inputs[0], dim=-1, eps=self.eps)

    def node(self, inputs: tuple[str, ...]) -> Node:
        """With the bound."""
        return Node(self.name, self.op, inputs, None, {"eps": self.eps})


class RmsNormSite(NormalizeSite):
    """Rows whose values have a mean square of one.

    Args:
        eps: what is added to the mean square.
    """

    op = "rms_norm"

    def compute(self, *inputs: Tensor) -> Tensor:
        """Same shape."""
        return F.rms_norm(inputs[0], inputs[0].shape[-1:], eps=self.eps)


class ResizeSite(FloatSite):
    """Bilinear resizing.

    Args:
        size: (H, W) of the output.
        align_corners: as in torch's interpolate.
    """

    op = "resize"

    def __init__(self, name: str, *, size: Sequence[int], align_corners: bool) -> None:
        super().__init__(name)
        self.size, self.align_corners = tuple(size), align_corners

    def compute(self, *inputs: Tensor) -> Tensor:
        """[N, C, H, W]."""
        return resize(inputs[0], self.size, align_corners=self.align_corners)

    def node(self, inputs: tuple[str, ...]) -> Node:
        """With the size."""
        a = {"size": list(self.size), "align_corners": self.align_corners}
        return Node(self.name, self.op, inputs, None, a)


class ConstantSite(FloatSite):
    """What depends on no image: position embeddings and the like, which are trained.

    Args:
        module: computes it, without the batch axis.
    """

    op = "constant"

    def __init__(self, name: str, *, module: nn.Module) -> None:
        super().__init__(name)
        self.module = module

    def compute(self, *inputs: Tensor) -> Tensor:
        """The same for each image of a batch."""
        value: Tensor = self.module()
        return value.expand(inputs[0].shape[0], *value.shape)

    def node(self, inputs: tuple[str, ...]) -> Node:
        """With the value."""
        with torch.no_grad():
            value = _array(self.module())
        return Node(self.name, self.op, inputs, None, tensors={"value": value})


def _array(tensor: Tensor) -> np.ndarray[Any, np.dtype[np.float32]]:
    array: np.ndarray[Any, np.dtype[np.float32]] = tensor.detach().float().cpu().numpy().copy()
    return array
