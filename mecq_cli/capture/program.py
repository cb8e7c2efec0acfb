"""The graph of a model by torch.export."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.fx import GraphModule

from mecq_cli.capture.multihead import images_first
from mecq_cli.errors import UsageError, first_line

_TOO_SMALL = re.compile(r"too small|greater than actual input size|smaller than the kernel", re.I)
"""What PyTorch says of maps that have shrunk to less than a window."""


@contextmanager
def _quiet() -> Iterator[None]:
    """What PyTorch logs of an error comes as an error of its own, too.

    Not by the level of its logger, which PyTorch sets anew when it is loaded.
    """
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


def export(model: nn.Module, input_shape: tuple[int, int, int]) -> GraphModule:
    """The operations of a model in training mode, which is left as it was.

    Raises:
        UsageError: torch.export cannot read it.
    """
    was_training = model.training
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    example = torch.zeros(2, *input_shape, device=device)
    # By the tensor and not by a signature, which may be `*args`.
    batch = torch.export.ShapesCollection()
    batch[example] = {0: torch.export.Dim.DYNAMIC}
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    try:
        with warnings.catch_warnings(), _quiet(), images_first(model):
            warnings.simplefilter("ignore")
            for training in (True, False):  # a second head only exists in training
                model.train(training)
                program = torch.export.export(model, (example,), dynamic_shapes=batch, strict=False)
                if len(program.graph_signature.user_outputs) == 1:
                    break
            graph = program.module()
    except Exception as error:
        why = first_line(error)
        if why.startswith("Constraints violated"):
            why = (
                "it fixes the number of images, as len(x) and int(x.shape[0]) do (write x.shape[0] "
                "or -1), or needs a certain one"
            )
        if _TOO_SMALL.search(why):
            _, height, width = input_shape
            why += f" (images of {height} x {width} pixels are too small for it: larger --img-size)"
        raise UsageError(
            f"{type(model).__name__} cannot be read by torch.export at input {input_shape}: {why}"
        ) from error
    finally:
        model.train(was_training)
        with torch.no_grad():
            for name, b in model.named_buffers():
                b.copy_(buffers[name])
    assert isinstance(graph, GraphModule)
    return graph
