"""Bits lowered step by step: a training at 2 bits begins at 4, goes on at 3, and ends at 2.

Small networks lose much at the moment they are rounded to 2 bits. With one bit less at a time, each
stage starts near where the one before ended (progressive quantization; Zhuang et al., arXiv
1711.00205, section 3.3). The stages before the last take `SHARE` of the steps, in equal parts. At
the begin of each, the grids are found anew: at the first in the float network, later in what it
has become, with its weights rounded (`calibrate`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import nn

from mecq_cli.errors import UsageError
from mecq_cli.quantizers import Quantizer
from mecq_cli.training.recipe import Recipe

SHARE = 0.3
"""Of the steps, before the bits are those that were asked for."""


@dataclass(frozen=True)
class Stage:
    """From ``first_step`` on, no quantizer has fewer than ``bits``; 0: each has its own."""

    first_step: int
    bits: int


def stages(recipe: Recipe, fewest: int) -> list[Stage]:
    """The stages of a training, the first of which begins at step 0.

    Args:
        recipe: ``lower_from`` is the bits of the first stage.
        fewest: bits of any quantizer of the network.
    """
    bits = list(range(recipe.lower_from, fewest, -1))
    length = int(recipe.total_steps * SHARE) // max(len(bits), 1)
    if not bits or not length:
        return [Stage(0, 0)]
    return [*(Stage(i * length, b) for i, b in enumerate(bits)), Stage(len(bits) * length, 0)]


def require_lowering(model: nn.Module, recipe: Recipe) -> None:
    """Whether a training may lower the bits of this network as the recipe says.

    Raises:
        UsageError: one of its quantizers cannot, or there is nothing to lower or no time to.
    """
    fewest = fewest_bits(model)
    found = stages(recipe, fewest)
    if recipe.lower_from and len(found) == 1:
        count = recipe.lower_from - fewest
        raise UsageError(
            f"--lower-from {recipe.lower_from}: "
            + (
                f"the fewest bits of this network are {fewest}, which is no less"
                if count <= 0
                else f"{recipe.total_steps} steps are too few to lower the bits "
                f"{'once' if count == 1 else f'{count} times'}; it takes "
                f"{math.ceil(count / SHARE)} or more"
            )
        )
    for stage in found:
        raise_bits(model, stage.bits)


def fewest_bits(model: nn.Module) -> int:
    """Of its quantizers."""
    return min((q.bits for q in model.modules() if isinstance(q, Quantizer)), default=8)


def raise_bits(model: nn.Module, bits: int) -> None:
    """Let no quantizer have fewer than ``bits`` for now; 0: each has its own again.

    Raises:
        UsageError: one of them cannot.
    """
    for quantizer in model.modules():
        if isinstance(quantizer, Quantizer):
            try:
                quantizer.use_bits(max(bits, quantizer.bits))
            except NotImplementedError as error:
                raise UsageError(
                    f"--lower-from: the bits of {type(quantizer).__name__} cannot be lowered step "
                    "by step; use --quantizer auto, lsq, lsq+, lsq-mid-rise or ewgs, or "
                    "--lower-from 0"
                ) from error
