"""The weights of an `IntegerModel` in the pack-quantized layout of compressed-tensors.

For a layer NAME with integer weights, batch norm folded in:

| tensor             | type and shape             | content                                      |
|--------------------|----------------------------|----------------------------------------------|
| NAME.weight_packed | I32 [O, ceil(K bits / 32)] | a row is one stream of bits, value i in the  |
|                    |                            | bits i*bits and up of it, as w + 2^(bits-1)  |
| NAME.weight_scale  | F32 [O, 1]                 | the weight is scale * w; may be negative     |
| NAME.weight_shape  | I64 [2]                    | O, K                                         |
| NAME.bias          | F32 [O]                    |                                              |

A layer with float weights has NAME.weight and NAME.bias, F32, of their own shape.

The format packs matrices: the weight of a convolution is one of O rows and I/groups * kh * kw
columns, and its own shape is in config.json. All weights here are symmetric, so there is no
weight_zero_point. A zero point is an integer, which leaves no way to write a grid without zero in
its own number of bits: weights of 1 bit, and others on a mid-rise grid, take one bit more.
compressed-tensors packs 3, 5, 6 and 7 bits without gaps since 0.18.

Activations, their grids and the graph are not part of it. What a layer computes in integers is
said by the integer artifact and by the ONNX file only.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mecq_cli.errors import ArtifactError
from mecq_cli.integer.ir import INPUT, Grid, IntegerModel, Node
from mecq_cli.integer.packing import pack, unpack
from mecq_cli.storage import read_bytes_limited
from mecq_cli.tensorfile import FileKind, RawTensor, decode, encode

FORMAT = "pack-quantized"
LIBRARY = "0.18.0"
"""The first release of compressed-tensors with this layout."""

# "pt" is what readers of model files expect there; the rest of the form is that of our artifacts.
_KIND = FileKind("pt", 1, ArtifactError)
_MAX_BYTES = 2**32


def to_bytes(model: IntegerModel) -> bytes:
    """The .safetensors file; the same model gives the same bytes."""
    tensors: dict[str, RawTensor] = {}
    for node, source in _layers(model):
        name, weight, scale = node.name, node.tensors["weight"], _scale(node, source)
        if node.weight_bits == 32:
            rows = scale.reshape(-1, *[1] * (weight.ndim - 1))
            tensors[f"{name}.weight"] = _floats(weight * rows)
        else:
            matrix = weight.reshape(len(weight), -1)
            packed = _pack(matrix, _bits(node))
            tensors[f"{name}.weight_packed"] = RawTensor("I32", packed.shape, packed.tobytes())
            tensors[f"{name}.weight_scale"] = _floats(scale[:, None])
            shape = np.array(matrix.shape, "<i8")
            tensors[f"{name}.weight_shape"] = RawTensor("I64", (2,), shape.tobytes())
        unit = _unit(node.tensors["weight_scale"], source)
        tensors[f"{name}.bias"] = _floats(node.tensors["bias"] * unit)
    try:
        return b"".join(encode(_KIND, tensors, {}))
    except ValueError as reason:
        raise ArtifactError(f"the model cannot be written: {reason}") from reason


def config(model: IntegerModel) -> bytes:
    """config.json beside it, by which the library knows what is packed, and how.

    ``quantization_config`` is the library's. ``mecq`` is ours: the metadata of the artifact, the
    shape of the input, and the shape of each packed weight before it became a matrix.
    """
    targets: dict[int, list[str]] = {}
    shapes: dict[str, list[int]] = {}
    ignore = []
    for node, _ in _layers(model):
        if node.weight_bits == 32:
            ignore.append(node.name)
        else:
            targets.setdefault(_bits(node), []).append(node.name)
            shapes[node.name] = list(node.tensors["weight"].shape)
    groups = {
        f"group_{index}": {
            "targets": targets[bits],
            "weights": {
                "num_bits": bits,
                "type": "int",
                "symmetric": True,
                "strategy": "channel",
                "dynamic": False,
            },
            "format": FORMAT,
        }
        for index, bits in enumerate(sorted(targets))
    }
    document = {
        "quantization_config": {
            "config_groups": groups,
            "format": FORMAT,
            "ignore": ignore,
            "quant_method": "compressed-tensors",
            "quantization_status": "compressed",
            "version": LIBRARY,
        },
        "mecq": {
            "metadata": dict(model.metadata),
            "input_shape": list(model.input_shape),
            "weight_shapes": shapes,
        },
    }
    return (json.dumps(document, indent=2, sort_keys=True) + "\n").encode()


def with_weights_of(path: Path, model: IntegerModel) -> IntegerModel:
    """``model`` with the weights, scales and biases that a file written by `to_bytes` holds.

    Raises:
        ArtifactError: the file is damaged, or belongs to another network.
    """
    data = read_bytes_limited(path, _MAX_BYTES, error=ArtifactError)
    tensors, _ = decode(_KIND, data, str(path))
    try:
        read = {node.name: _read(node, source, tensors) for node, source in _layers(model)}
    except (KeyError, ValueError) as reason:
        raise ArtifactError(
            f"{path}: does not hold the weights of this model: {reason}"
        ) from reason
    nodes = (
        replace(node, tensors=read[node.name]) if node.name in read else node
        for node in model.nodes
    )
    return replace(model, nodes=tuple(nodes))


def _read(
    node: Node, source: Grid | None, tensors: dict[str, RawTensor]
) -> dict[str, NDArray[Any]]:
    def array(name: str, dtype: str) -> NDArray[Any]:
        raw = tensors[f"{node.name}.{name}"]
        return np.frombuffer(raw.data, dtype).reshape(raw.shape)

    shape = node.tensors["weight"].shape
    scale: NDArray[np.float32]
    if node.weight_bits == 32:
        weight = array("weight", "<f4").reshape(shape)
        scale = np.ones(len(weight), np.float32)
    else:
        stored = tuple(array("weight_shape", "<i8").tolist())
        if stored != (shape[0], math.prod(shape[1:])):
            raise ValueError(f"{node.name}: the weight has the shape {stored}")
        weight = _unpack(array("weight_packed", "<i4"), _bits(node), stored[1]).reshape(shape)
        stored_scale = array("weight_scale", "<f4").ravel()
        scale = np.asarray(stored_scale / _multiplier(node, source), np.float32)
    bias = array("bias", "<f4")
    if source is not None:
        bias = np.rint(bias / _unit(scale, source)).astype(np.int32)
    return {"weight": weight, "weight_scale": scale, "bias": bias}


def _layers(model: IntegerModel) -> Iterator[tuple[Node, Grid | None]]:
    """Nodes with weights, each with the grid of its input."""
    grids: dict[str, Grid | None] = {INPUT: None}
    for node in model.nodes:
        if node.weight_bits is not None:
            yield node, grids[node.inputs[0]]
        grids[node.name] = node.grid


def _bits(node: Node) -> int:
    """Of the packed weights; those on a mid-rise grid, as -1 and +1, need one more."""
    assert node.weight_bits is not None
    return node.weight_bits + (node.mid_rise or node.weight_bits == 1)


def _multiplier(node: Node, source: Grid | None) -> int:
    return 1 if source is None else node.multiplier


def _scale(node: Node, source: Grid | None) -> NDArray[np.float32]:
    """Of the stored integers w; the model's own belongs to w * multiplier, a power of two."""
    scale: NDArray[np.float32] = node.tensors["weight_scale"] * np.float32(
        _multiplier(node, source)
    )
    return scale


def _unit(scale: NDArray[np.float32], source: Grid | None) -> NDArray[np.float64]:
    """What a bias of 1 is worth, for each channel."""
    unit = np.ones_like(scale) if source is None else np.float32(source.scale) * scale
    return unit.astype(np.float64)


def _floats(array: NDArray[Any]) -> RawTensor:
    return RawTensor("F32", array.shape, array.astype("<f4").tobytes())


def _pack(matrix: NDArray[Any], bits: int) -> NDArray[np.int32]:
    """int32 [O, ceil(K bits / 32)] of int8 [O, K]."""
    rows, columns = matrix.shape
    # 32 values are `bits` words: whole groups of them begin on a word.
    padded = np.full((rows, -(-columns // 32) * 32), -(2 ** (bits - 1)), np.int8)
    padded[:, :columns] = matrix
    words = pack(padded, bits, 2 ** (bits - 1)).view("<i4").reshape(rows, -1)
    return np.ascontiguousarray(words[:, : -(-columns * bits // 32)])


def _unpack(words: NDArray[np.int32], bits: int, columns: int) -> NDArray[np.int8]:
    """The inverse: int8 [O, columns]."""
    groups = -(-columns // 32)
    padded = np.zeros((len(words), groups * bits), "<i4")
    padded[:, : words.shape[1]] = words
    values = unpack(padded.view(np.uint8).ravel(), bits, len(words) * groups * 32, 2 ** (bits - 1))
    return values.reshape(len(words), -1)[:, :columns].astype(np.int8)
