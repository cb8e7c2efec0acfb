"""An `IntegerModel` as an ONNX file, in one of several profiles, with a checksum.

The metadata property ``mecq.metadata`` holds, as JSON, the model's metadata (name, bits, classes,
preprocessing), the name of the profile, and how the input is laid out. The graphs are written by
`mecq_cli.export.onnx_graph` and `mecq_cli.export.qonnx_graph`; for the checksum see
`mecq_cli.export.seal`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import onnx
from onnx import helper

from mecq_cli.export import onnx_graph, qonnx_graph
from mecq_cli.export.onnx_detection import add_detections
from mecq_cli.export.qonnx_builder import DOMAIN
from mecq_cli.export.seal import METADATA_KEY, PRODUCER, seal
from mecq_cli.integer.ir import INPUT, LEAST_SHARED, IntegerModel
from mecq_cli.models.detector import detector_in
from mecq_cli.storage import atomic_write


@dataclass(frozen=True)
class Profile:
    """One way to write a model.

    Attributes:
        opset: version of the standard operators.
        ir_version: of the file format; the one that came with the opset.
        build: makes the graph.
        domains: versions of other operators.
    """

    opset: int
    ir_version: int
    build: Callable[[IntegerModel], onnx.GraphProto]
    domains: Mapping[str, int]


PROFILES = {
    # Opset 25 is the first with INT2 in DequantizeLinear and Cast.
    "ort": Profile(25, 13, partial(onnx_graph.build, tuned=True), {}),
    # Opset 13 is the first with a scale for each channel in DequantizeLinear.
    "portable": Profile(13, 7, partial(onnx_graph.build, tuned=False), {}),
    "qonnx": Profile(13, 7, qonnx_graph.build, {DOMAIN: 1}),
}

COLORS = {1: "grey", 3: "RGB"}
"""What the channels of an image are, by their number."""


def to_model(model: IntegerModel, profile: str = "ort") -> onnx.ModelProto:
    """The ONNX model, which passes ``onnx.checker.check_model(full_check=True)``.

    Raises:
        ArtifactError: the model holds something that cannot be written, or says something
            impossible of its detector.
    """
    form = PROFILES[profile]
    versions = {"": form.opset, **form.domains}
    graph, detector = form.build(model), detector_in(model.metadata)
    if detector is not None and profile != "qonnx":
        add_detections(graph, detector)
    _share(graph)
    proto = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid(name, version) for name, version in versions.items()],
        ir_version=form.ir_version,
        producer_name=PRODUCER,
    )
    document = {**model.metadata, "profile": profile, "input": _input_layout(model)}
    # ASCII: a folder may be called what is no Unicode, and such names cannot be UTF-8.
    metadata = json.dumps(document, sort_keys=True)
    helper.set_model_props(proto, {METADATA_KEY: metadata})
    onnx.checker.check_model(proto, full_check=True)
    return proto


def _input_layout(model: IntegerModel) -> dict[str, Any]:
    """What ``preprocessing`` leaves open."""
    layout: dict[str, Any] = {"name": INPUT, "layout": "NCHW", "pixels_divided_by": 255}
    colors = COLORS.get(model.input_shape[0])
    return layout if colors is None else {**layout, "colors": colors}


def _share(graph: onnx.GraphProto) -> None:
    """Store equal tensors once, in place, from a size on at which that pays."""
    first: dict[bytes, str] = {}
    names: dict[str, str] = {}
    kept = []
    for tensor in graph.initializer:
        if len(tensor.raw_data) >= LEAST_SHARED:
            content = onnx.TensorProto()
            content.CopyFrom(tensor)
            content.ClearField("name")
            name = first.setdefault(content.SerializeToString(deterministic=True), tensor.name)
            if name != tensor.name:
                names[tensor.name] = name
                continue
        kept.append(tensor)
    if not names:
        return
    copies = [onnx.TensorProto.FromString(tensor.SerializeToString()) for tensor in kept]
    del graph.initializer[:]
    graph.initializer.extend(copies)
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]


def to_bytes(model: IntegerModel, profile: str = "ort") -> bytes:
    """The content of the file: the same bytes for the same model."""
    return seal(to_model(model, profile))


def save(model: IntegerModel, path: Path, *, profile: str = "ort", force: bool = False) -> None:
    """Write an ONNX file.

    Raises:
        ArtifactError: the model holds something that cannot be written.
        UsageError: the file exists and ``force`` is not set.
        EnvironmentFailure: the file cannot be written (disk full, no permission, ...).
    """
    atomic_write(path, to_bytes(model, profile), force=force)
