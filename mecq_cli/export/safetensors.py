"""The integer artifact: an `IntegerModel` as one .safetensors file.

Weights are packed to their real number of bits; the graph is a JSON document in the metadata.
The layout is specified in docs/artifact-format.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mecq_cli.errors import ArtifactError
from mecq_cli.integer.geometry import Shape, shapes
from mecq_cli.integer.ir import MID_RISE_BITS, Grid, IntegerModel, Node, shared_weights
from mecq_cli.integer.operations import RULES
from mecq_cli.integer.packing import pack_weights, packed_bytes, unpack_weights
from mecq_cli.integer.validate import validate
from mecq_cli.storage import atomic_write, read_bytes_limited
from mecq_cli.tensorfile import FileKind, RawTensor, canonical_json, decode, encode, strict_json

VERSION_2 = (
    *("threshold", "lookup", "function", "mul", "adaptive_avg_pool2d", "reshape", "transpose"),
    *("upsample", "roll", "matmul", "constant"),
    *("layer_norm", "group_norm", "softmax", "log_softmax", "l2_normalize"),
    *("rms_norm", "resize"),
)
"""Operations that version 1 of the format does not have."""
KIND = FileKind("mecq-integer", 2, ArtifactError)
MAX_BYTES = 2**32
_NUMPY_TYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "I32": np.dtype("<i4"),
    "U8": np.dtype("u1"),
}


def to_bytes(model: IntegerModel) -> bytes:
    """The content of the file; the same model gives the same bytes.

    Raises:
        ArtifactError: the model breaks a rule of `integer.ir`, or its metadata is not plain JSON
            (tuples are none).
    """
    validate(model)
    shared = shared_weights(model)
    document = {
        "input_shape": list(model.input_shape),
        "metadata": dict(model.metadata),
        "nodes": [_node_to_json(node, shared.get(node.name)) for node in model.nodes],
    }
    known = shapes(model)
    newer = (_needs_version_2(node, [known[name] for name in node.inputs]) for node in model.nodes)
    version = 2 if shared or any(newer) else 1
    try:
        parts = encode(
            KIND, _to_tensors(model, shared), {"model": canonical_json(document)}, version
        )
    except ValueError as reason:
        raise ArtifactError(f"the model cannot be written: {reason}") from reason
    return b"".join(parts)


def save(model: IntegerModel, path: Path, *, force: bool = False) -> None:
    """Write the file, atomically.

    Raises:
        ArtifactError: as `to_bytes`.
        UsageError, EnvironmentFailure: as `storage.atomic_write`.
    """
    atomic_write(path, to_bytes(model), force=force)


def load(path: Path) -> IntegerModel:
    """Read a file that `save` wrote, every byte of it checked.

    Raises:
        ArtifactError: missing, damaged, of a newer version, or a model that cannot run.
    """
    data = read_bytes_limited(path, MAX_BYTES, error=ArtifactError)
    tensors, metadata = decode(KIND, data, str(path))
    try:
        model = _to_model(strict_json(metadata.get("model", "")), tensors)
        # What a reader may overlook (fields too many, another order) shows up here.
        if to_bytes(model) != data:
            raise ValueError("it holds more than the model in it")
    except (ValueError, ArtifactError) as reason:
        raise ArtifactError(
            f"{path}: not a usable integer model: {reason}; export it again"
        ) from reason
    return model


def _needs_version_2(node: Node, shapes: Sequence[Shape]) -> bool:
    """Whether programs that know version 1 only could not read it: else that is what is written."""
    if node.op == "add":
        return len({*shapes}) > 1
    tokens = node.op == "linear" and len(shapes[0]) > 1
    return node.mid_rise or tokens or node.op in VERSION_2


def _node_to_json(node: Node, shared: str | None) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "name": node.name,
        "op": node.op,
        "inputs": list(node.inputs),
        "grid": None if node.grid is None else _grid_to_json(node.grid),
        "attributes": {
            k: list(v) if isinstance(v, tuple) else v for k, v in node.attributes.items()
        },
    }
    if node.weight_bits is not None:
        entry["weight"] = {
            "bits": node.weight_bits,
            "shape": list(node.tensors["weight"].shape),
        }
        if node.mid_rise:  # only then: what files of version 1 can hold is written as one
            entry["weight"]["mid_rise"] = True
        if shared is not None:
            entry["weight"]["of"] = shared
    return entry


def _grid_to_json(grid: Grid) -> dict[str, Any]:
    entry = asdict(grid)
    if grid.spacing == 1:  # as files have it that know no other
        del entry["spacing"]
    return entry


def _to_tensors(model: IntegerModel, shared: Mapping[str, str]) -> dict[str, RawTensor]:
    tensors = {}
    for node in model.nodes:
        for name, array in node.tensors.items():
            if name == "weight" and node.name in shared:
                continue
            if name == "weight" and node.weight_bits not in (None, 32):
                array = pack_weights(array, node.weight_bits or 0, mid_rise=node.mid_rise)
            tensors[f"{node.name}.{name}"] = _to_raw(array)
    return tensors


def _to_raw(array: NDArray[Any]) -> RawTensor:
    for dtype, layout in _NUMPY_TYPES.items():
        if array.dtype == layout.newbyteorder("="):
            return RawTensor(dtype, array.shape, array.astype(layout, order="C").tobytes())
    raise ValueError(f"no tensor of type {array.dtype} belongs in an artifact")


def _to_model(document: Any, tensors: Mapping[str, RawTensor]) -> IntegerModel:
    _require_keys(document, {"input_shape", "metadata", "nodes"}, "the model")
    if not isinstance(document["nodes"], list) or not isinstance(document["metadata"], dict):
        raise ValueError("nodes or metadata are of a wrong type")
    shape = document["input_shape"]
    if not isinstance(shape, list) or len(shape) != 3:
        raise ValueError("input_shape is not (channels, height, width)")
    unpacked: Unpacked = {}
    nodes = tuple(_to_node(entry, tensors, unpacked) for entry in document["nodes"])
    return IntegerModel(nodes, (shape[0], shape[1], shape[2]), document["metadata"])


Unpacked = dict[tuple[Any, ...], NDArray[Any]]
"""Weights by whose they are, and how they are packed: what layers share is unpacked once."""


def _to_node(entry: Any, tensors: Mapping[str, RawTensor], unpacked: Unpacked) -> Node:
    """Only what must hold to build a `Node` is checked here; `validate` checks the rest."""
    fields = {"name", "op", "inputs", "grid", "attributes"}
    weighted = isinstance(entry, dict) and "weight" in entry
    _require_keys(entry, fields | {"weight"} if weighted else fields, "a node")
    name, op, inputs, grid, attributes = (
        entry[key] for key in ("name", "op", "inputs", "grid", "attributes")
    )
    if not isinstance(name, str) or not isinstance(op, str):
        raise ValueError("a node has no name or operation")
    if not _are_strings(inputs) or not isinstance(attributes, dict):
        raise ValueError(f"node {name!a:.80}: inputs or attributes are of a wrong type")
    others = RULES[op].tensors if op in RULES else ()
    if weighted and others:
        raise ValueError(f"node {name!a:.80}: this operation has no weights")
    if grid is not None:
        extra = {"spacing"} & grid.keys() if isinstance(grid, dict) else set()
        _require_keys(grid, {"scale", "zero_point", "bits", "qmin", "qmax"} | extra, "a grid")
        if extra and grid["spacing"] == 1:
            raise ValueError(f"node {name!a:.80}: a spacing of 1 is not said")
    node = Node(
        name,
        op,
        tuple(inputs),
        None if grid is None else Grid(**grid),
        {k: tuple(v) if isinstance(v, list) else v for k, v in attributes.items()},
        *(_to_weights(name, entry["weight"], tensors, unpacked) if weighted else ()),
    )
    if not others:
        return node
    return replace(node, tensors={key: _to_array(f"{name}.{key}", tensors) for key in others})


def _to_weights(
    name: str, weight: Any, tensors: Mapping[str, RawTensor], unpacked: Unpacked
) -> tuple[int, dict[str, NDArray[Any]], bool]:
    """weight_bits and the tensors of a node, unpacked, and mid_rise."""
    mid_rise = isinstance(weight, dict) and "mid_rise" in weight
    extra = {"mid_rise", "of"} & weight.keys() if isinstance(weight, dict) else set()
    _require_keys(weight, {"bits", "shape"} | extra, "a weight")
    owner = weight.get("of", name)
    if not isinstance(owner, str):
        raise ValueError(f"node {name!a:.80}: the weight is of no node")
    bits, shape = weight["bits"], weight["shape"]
    if type(bits) is not int or not (1 <= bits <= 8 or bits == 32):
        raise ValueError(f"node {name!a:.80}: weights have 1 to 8 or 32 bits")
    if mid_rise and (weight["mid_rise"] is not True or bits not in MID_RISE_BITS):
        raise ValueError(f"node {name!a:.80}: no weight of {bits} bits is mid-rise so")
    if not isinstance(shape, list) or not all(type(n) is int and 0 < n < 2**32 for n in shape):
        raise ValueError(f"node {name!a:.80}: the weight has no proper shape")
    arrays = {
        key: _to_array(f"{owner if key == 'weight' else name}.{key}", tensors)
        for key in ("weight", "weight_scale", "bias")
    }
    packed = arrays["weight"]
    if bits == 32:
        arrays["weight"] = unpacked.setdefault((owner, bits), packed)
        return bits, arrays, mid_rise
    # Before anything is allocated: a shape may claim more than there is.
    count = math.prod(shape)
    if packed.shape != (packed_bytes(count, bits),):
        raise ValueError(f"node {name!a:.80}: the weight does not have the size of its shape")
    key = (owner, bits, mid_rise, count)
    if key not in unpacked:
        unpacked[key] = unpack_weights(packed, bits, (count,), mid_rise=mid_rise)
    arrays["weight"] = unpacked[key].reshape(shape)
    return bits, arrays, mid_rise


def _to_array(name: str, tensors: Mapping[str, RawTensor]) -> NDArray[Any]:
    raw = tensors.get(name)
    if raw is None or raw.dtype not in _NUMPY_TYPES:
        raise ValueError(f"tensor {name!a:.80} is missing or of a type that cannot be")
    layout = _NUMPY_TYPES[raw.dtype]
    # A copy of its own: writable, and not tied to the bytes of the file.
    return np.frombuffer(raw.data, layout).reshape(raw.shape).astype(layout.newbyteorder("="))


def _are_strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(entry, str) for entry in value)


def _require_keys(value: Any, keys: set[str], what: str) -> None:
    if not isinstance(value, dict) or value.keys() != keys:
        raise ValueError(f"{what} must have the fields {', '.join(sorted(keys))}")
