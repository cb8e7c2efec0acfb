"""Reads an ONNX file: nothing is run before its checksum was compared."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from numpy.typing import NDArray

from mecq_cli.errors import ArtifactError, UsageError
from mecq_cli.export.seal import METADATA_KEY, is_sealed
from mecq_cli.storage import read_bytes_limited
from mecq_cli.tensorfile import strict_json

MAX_BYTES = 2**31
"""What a protobuf message may have at most."""


@dataclass(frozen=True)
class OnnxFile:
    """What was read.

    Attributes:
        data: the bytes.
        model: the same, parsed.
        verified: whether the file is ours, its checksum found right.
        metadata: what the exporter stored: model, wbits, abits, classes, preprocessing, profile;
            empty for other files.
    """

    data: bytes
    model: onnx.ModelProto
    verified: bool
    metadata: dict[str, Any]


def read(path: Path, *, allow_foreign: bool = False) -> OnnxFile:
    """Read and check a file.

    Args:
        path: the file.
        allow_foreign: accept files that this program did not write, which carry no checksum.

    Raises:
        ArtifactError: the file cannot be read, was damaged, has no checksum, or keeps data in
            other files.
    """
    data = read_bytes_limited(path, MAX_BYTES, error=ArtifactError)
    verified = is_sealed(data, str(path))
    model = _parse(data, path)
    if not verified and not allow_foreign:
        raise ArtifactError(
            f"{path}: was not written by mecq (it has no checksum); give a file that "
            "`mecq export` wrote"
        )
    return OnnxFile(data, model, verified, _metadata(model, path))


def operations(model: onnx.ModelProto) -> dict[str, str]:
    """The tensor that each operation of the integer model puts out, by the operation's name."""
    nodes = [node for node in model.graph.node if node.name and "::" not in node.name]
    return {node.name: node.output[0] for node in nodes}


def check_shape(images: NDArray[Any], input_shape: tuple[int | None, ...], path: Path) -> None:
    """Raise UsageError unless images are [N, *input_shape] with N of at least 1."""
    fits = images.ndim == 4 and all(
        wanted in (None, got) for wanted, got in zip(input_shape, images.shape[1:], strict=True)
    )
    if not fits or not len(images):
        wanted = ", ".join("any" if n is None else str(n) for n in input_shape)
        raise UsageError(f"images have the shape {list(images.shape)}, {path} wants [N, {wanted}]")


def _parse(data: bytes, path: Path) -> onnx.ModelProto:
    try:
        model = onnx.load_model_from_string(data)
    except Exception as error:  # protobuf's, which comes without annotations
        raise ArtifactError(f"{path}: is no ONNX file, or was cut off") from error
    if not model.graph.node:
        raise ArtifactError(f"{path}: is no ONNX file, or has no graph")
    # Where onnxruntime would look for external data is not ours to control.
    stored = [*_of_graph(model.graph), *(t for f in model.functions for t in _of_nodes(f.node))]
    if any(tensor.external_data for tensor in stored):
        raise ArtifactError(f"{path}: keeps tensors in other files; store them in the file itself")
    return model


def _of_graph(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """The stored tensors of a graph and of the graphs inside its nodes."""
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    yield from _of_nodes(graph.node)


def _of_nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.TensorProto]:
    for attribute in (attribute for node in nodes for attribute in node.attribute):
        yield from [attribute.t, *attribute.tensors]
        for sparse in [attribute.sparse_tensor, *attribute.sparse_tensors]:
            yield from (sparse.values, sparse.indices)
        for inner in [attribute.g, *attribute.graphs]:
            yield from _of_graph(inner)


def _metadata(model: onnx.ModelProto, path: Path) -> dict[str, Any]:
    for entry in model.metadata_props:
        if entry.key == METADATA_KEY:
            try:
                document = strict_json(entry.value)
            except ValueError as error:
                raise ArtifactError(f"{path}: its metadata is no JSON; export it again") from error
            return document if isinstance(document, dict) else {}
    return {}
