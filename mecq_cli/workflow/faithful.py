"""Whether what was read of a model computes what the model computes, before it is trained on.

An exported graph may hold what no handler sees, such as values that are changed in place through a
view of them. Such a network would train and export without a complaint, and be another one.
"""

from __future__ import annotations

import torch
from torch import nn

from mecq_cli.calibration import float_mode
from mecq_cli.errors import ArtifactError, UsageError
from mecq_cli.insertion import QuantizedModel
from mecq_cli.integer.validate import validate
from mecq_cli.integerize import integerize
from mecq_cli.memory import is_out_of_memory

LARGEST_ERROR = 1e-2
"""Of the outputs, relative to their size. What is read rightly differs by some 1e-6."""

_IMAGES = 2


@torch.no_grad()
def require_faithful(
    model: QuantizedModel, plain: nn.Module, input_size: tuple[int, int, int]
) -> None:
    """Compare the network in float with the model, on noise.

    Args:
        model: as it was inserted, not calibrated yet; left as it was.
        plain: the float model, on the same device.
        input_size: (C, H, W).

    Raises:
        UsageError: it computes something else, or cannot be run.
    """
    device = next((p.device for p in plain.parameters()), torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(_IMAGES, *input_size, generator=generator).to(device)
    was_training = plain.training
    expected = plain.eval()(images).double()
    plain.train(was_training)
    try:
        with float_mode(model):
            found = model(images).double()
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        if is_out_of_memory(error):
            raise
        raise UsageError(
            f"what was read of this model cannot be run ({type(error).__name__}: {error}); it has "
            "an operation of a kind that is not known here, so it cannot be quantized"
        ) from error
    off = 1.0
    if found.shape == expected.shape:
        off = float((found - expected).norm() / expected.norm().clamp_min(1e-12))
    if not off <= LARGEST_ERROR:
        raise UsageError(
            f"what was read of this model does not compute the same (its outputs are {off:.0%} "
            "off); it changes values in place through a part of them, or does something else that "
            "is not seen here, so it cannot be quantized"
        )


def require_exportable(model: QuantizedModel, input_size: tuple[int, int, int]) -> None:
    """See before the training that there is an integer model to write at its end.

    Raises:
        UsageError: there is none.
    """
    try:
        validate(integerize(model, input_size, {}))
    except (ArtifactError, ValueError) as error:
        raise UsageError(
            f"this network has no integer form: {error}; it cannot be quantized"
        ) from error
