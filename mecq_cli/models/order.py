"""How the tensors of a network lie in memory."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

Network = TypeVar("Network", bound=nn.Module)


def channels_last(network: Network) -> Network:
    """Bring every tensor of four axes into the order [N, H, W, C], in place; returns the network.

    `nn.Module.to` refuses networks that have one of five, such as the masks of shifted windows.
    One that `keep_order` was told of stays as it is.
    """
    if _in_order in network._forward_pre_hooks.values():
        return network
    with torch.no_grad():
        for tensor in (*network.parameters(), *network.buffers()):
            if tensor.dim() == 4:
                tensor.data = tensor.data.to(memory_format=torch.channels_last)
    return network


def keep_order(network: nn.Module, example: Tensor) -> None:
    """See whether a network that runs in PyTorch's usual order runs in the other, too.

    One that flattens its maps by `view` does not. Such a network gets its images in the usual
    order from then on, and `channels_last` leaves its weights alone: what it makes of them is in
    the usual order then.

    Args:
        network: runs ``example``.
        example: images [N, C, H, W].
    """
    turned = channels_last(copy.deepcopy(network))
    try:
        with torch.no_grad():
            turned(torch.empty_like(example, memory_format=torch.channels_last).copy_(example))
    except RuntimeError:
        network.register_forward_pre_hook(_in_order)


def _in_order(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    # `contiguous` would leave images of one channel as they are: both orders are the same for them.
    # Their strides are not, and by these a convolution decides.
    return tuple(
        value.clone(memory_format=torch.contiguous_format) if value.stride(1) == 1 else value
        for value in inputs
    )
