"""What kind of network a model is, as far as its training depends on it."""

from __future__ import annotations

from enum import Enum

from torch import nn


class Family(Enum):
    """The value is how it is told to people."""

    CONVOLUTIONS = "convolutions"
    DEPTHWISE = "depthwise convolutions"
    TOKENS = "attention or layer norms"


def family_of(model: nn.Module) -> Family:
    """Of a float model, by its modules.

    Tokens are what people train with AdamW. Depthwise means that more than a quarter of the
    convolutions have one input a channel, as in MobileNets and EfficientNets: a third of theirs.
    """
    modules = list(model.modules())
    if any(_is_of_tokens(module) for module in modules):
        return Family.TOKENS
    convolutions = [module for module in modules if isinstance(module, nn.Conv2d)]
    depthwise = [conv for conv in convolutions if conv.groups == conv.in_channels > 1]
    return Family.DEPTHWISE if 4 * len(depthwise) > len(convolutions) else Family.CONVOLUTIONS


def _is_of_tokens(module: nn.Module) -> bool:
    norms = (nn.LayerNorm, nn.GroupNorm, nn.MultiheadAttention)
    return isinstance(module, norms) or "Attention" in type(module).__name__
