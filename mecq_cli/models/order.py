"""How the tensors of a network lie in memory."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

Network = TypeVar("Network", bound=nn.Module)


def channels_last(network: Network) -> Network:
    """Bring every tensor of four axes into the order [N, H, W, C], in place; returns the network.

    `nn.Module.to` refuses networks that have one of five, such as the masks of shifted windows.
    """
    with torch.no_grad():
        for tensor in (*network.parameters(), *network.buffers()):
            if tensor.dim() == 4:
                tensor.data = tensor.data.to(memory_format=torch.channels_last)
    return network
