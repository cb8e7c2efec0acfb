"""An `IntegerModel` as an ONNX file: opset 25, packed INT2 and INT4 weights, a checksum.

The metadata property ``mecq.metadata`` holds the model's metadata (name, bits, classes,
preprocessing) as JSON. See `mecq_cli.export.onnx_graph` for the graph and
`mecq_cli.export.seal` for the checksum.
"""

from __future__ import annotations

import json
from pathlib import Path

import onnx
from onnx import helper

from mecq_cli.export import onnx_graph
from mecq_cli.export.seal import METADATA_KEY, PRODUCER, seal
from mecq_cli.integer.ir import IntegerModel
from mecq_cli.storage import atomic_write

OPSET = 25
"""The first with INT2 in DequantizeLinear and Cast."""
IR_VERSION = 13


def to_model(model: IntegerModel) -> onnx.ModelProto:
    """The ONNX model, which passes ``onnx.checker.check_model(full_check=True)``.

    Raises:
        ArtifactError: the model holds something that cannot be written.
    """
    proto = helper.make_model(
        onnx_graph.build(model),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name=PRODUCER,
    )
    metadata = json.dumps(dict(model.metadata), sort_keys=True, ensure_ascii=False)
    helper.set_model_props(proto, {METADATA_KEY: metadata})
    onnx.checker.check_model(proto, full_check=True)
    return proto


def to_bytes(model: IntegerModel) -> bytes:
    """The content of the file: the same bytes for the same model."""
    return seal(to_model(model))


def save(model: IntegerModel, path: Path, *, force: bool = False) -> None:
    """Write an ONNX file.

    Raises:
        ArtifactError: the model holds something that cannot be written.
        UsageError: the file exists and ``force`` is not set.
        EnvironmentFailure: the file cannot be written (disk full, no permission, ...).
    """
    atomic_write(path, to_bytes(model), force=force)
