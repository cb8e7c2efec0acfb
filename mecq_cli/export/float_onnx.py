"""A float network as an ONNX file: what an integer export is compared with.

It goes the way of quantized networks, with 32 bits everywhere, so both files hold the same
operations. Batch norm is folded into the weights, padding into the convolutions; activations are
Relu and Clip nodes, which onnxruntime fuses with the operation before them. The file is what a
deployment without quantization would use, and nothing in it is slower than need be.
"""

from __future__ import annotations

import onnx
from onnx import helper
from torch import nn

from mecq_cli.errors import ArtifactError
from mecq_cli.export import onnx_graph
from mecq_cli.insertion import BitPlan, insert
from mecq_cli.integerize import integerize

OPSET = 21
IR_VERSION = 10
"""Older than those of the integers, since onnxruntime's own quantization reads the file too."""

_FLOAT = BitPlan(32, 32, first_last_bits=32, residual_bits=32)


def float_onnx(model: nn.Module, input_shape: tuple[int, int, int]) -> onnx.ModelProto:
    """The network in evaluation mode: input "input" float32 [batch, C, H, W], output "logits".

    Args:
        model: any network [N, C, H, W] -> logits that mecq reads; it stays as it is.
        input_shape: (C, H, W).

    Raises:
        UsageError: `mecq_cli.capture` cannot read the model.
        ArtifactError: a layer cannot be written.
    """
    network = integerize(insert(model, input_shape, _FLOAT), input_shape, {})
    try:
        graph = onnx_graph.build(network, tuned=True)
    except ArtifactError as error:
        raise ArtifactError(f"the float network cannot be written as ONNX: {error}") from error
    proto = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION
    )
    onnx.checker.check_model(proto, full_check=True)
    return proto
