"""A model, as the list of layers it really runs, found by torch.export.

Modules alone do not show what happens between them: residual adds, concatenations, padding.
The exported graph does. It is read in training mode, so that batch norm is still its own
operation, and the float operations become `Layer` records with the original parameters.

`rewriting.py` writes out what is made of other operations; `reader.py` walks the graph; the
handlers of its operations are in a file a family; `table.py` says which operation has which
handler; `fusion.py` folds layers into their neighbours.
"""

from __future__ import annotations

from torch import nn

from mecq_cli.capture.affine import to_affine
from mecq_cli.capture.composed import COMPOSITIONS
from mecq_cli.capture.fusion import fuse
from mecq_cli.capture.gains import fold_gains
from mecq_cli.capture.parts import split_linears
from mecq_cli.capture.program import export
from mecq_cli.capture.reader import Reader
from mecq_cli.capture.rewriting import Rewriter
from mecq_cli.capture.table import HANDLERS
from mecq_cli.layers import Layer

__all__ = ["capture"]


def capture(model: nn.Module, input_shape: tuple[int, int, int]) -> list[Layer]:
    """Layers of ``model`` in the order of execution; the last one gives the logits.

    Args:
        model: any classifier [N, C, H, W] -> [N, classes]; its parameters are shared, not copied.
        input_shape: (C, H, W).

    Raises:
        UsageError: the model cannot be exported, or has an operation without an integer form.
    """
    graph = export(model, input_shape)
    Rewriter(graph, HANDLERS, COMPOSITIONS).run()
    layers = Reader(graph, HANDLERS).read()
    layers = fuse(fold_gains(to_affine(layers, input_shape)))
    return split_linears(fold_gains(layers))
