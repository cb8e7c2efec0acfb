"""Training checkpoints without pickle: tensors and a JSON document in one checked file.

`flatten_state` and `unflatten_state` turn the nested states of optimizers, schedulers and
random generators into tensors and such a document, and back without any change.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mecq_cli.errors import CheckpointError
from mecq_cli.storage import atomic_write, read_bytes_limited
from mecq_cli.tensorfile import FileKind, RawTensor, canonical_json, decode, encode, strict_json

KIND = FileKind("mecq-checkpoint", 1, CheckpointError)
MAX_BYTES = 2**36
_DTYPES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
}
_TORCH_DTYPES = {name: dtype for dtype, name in _DTYPES.items()}


def write(
    path: Path, tensors: Mapping[str, Tensor], document: Mapping[str, Any], *, force: bool = True
) -> None:
    """Write a checkpoint atomically; the same content gives the same bytes.

    Args:
        path: the file.
        tensors: of any device and shape (also without dimensions); the types of `_DTYPES`.
        document: plain JSON (string keys, lists, no tuples, no NaN): see `flatten_state`.
        force: replace a file that exists.

    Raises:
        CheckpointError: a tensor or a document that the file cannot hold exactly.
        UsageError, EnvironmentFailure: as `storage.atomic_write`.
    """
    try:
        raw = {name: _to_raw(tensor) for name, tensor in tensors.items()}
        parts = encode(KIND, raw, {"document": canonical_json(dict(document))})
    except ValueError as reason:
        raise CheckpointError(f"{path}: the state cannot be written: {reason}") from reason

    def write_parts(file: BinaryIO) -> None:
        for part in parts:
            file.write(part)

    atomic_write(path, write_parts, force=force)


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors (on the CPU) and the document of a checkpoint, every byte of it checked.

    Raises:
        CheckpointError: missing, damaged, or of a newer version.
    """
    data = read_bytes_limited(path, MAX_BYTES, error=CheckpointError)
    raw, metadata = decode(KIND, data, str(path))
    try:
        document = strict_json(metadata.get("document", ""))
        tensors = {name: _to_tensor(tensor) for name, tensor in raw.items()}
    except (ValueError, RuntimeError) as reason:  # RuntimeError: torch, of an absurd shape
        raise CheckpointError(f"{path}: not a usable checkpoint: {reason}") from reason
    if not isinstance(document, dict):
        raise CheckpointError(f"{path}: not a usable checkpoint: its document is no JSON object")
    return tensors, document


def _to_raw(tensor: Tensor) -> RawTensor:
    if tensor.dtype not in _DTYPES or tensor.layout != torch.strided:
        raise ValueError(f"a {tensor.layout} tensor of {tensor.dtype} has no place in a checkpoint")
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    content: NDArray[np.uint8] = flat.view(torch.uint8).numpy()
    return RawTensor(_DTYPES[tensor.dtype], tuple(tensor.shape), content.data)


def _to_tensor(raw: RawTensor) -> Tensor:
    content = np.frombuffer(raw.data, np.uint8)
    if raw.dtype == "BOOL" and content.size and content.max() > 1:
        raise ValueError("a tensor of truth values holds others than 0 and 1")
    tensor = torch.empty(raw.shape, dtype=_TORCH_DTYPES[raw.dtype])
    tensor.reshape(-1).view(torch.uint8).numpy()[:] = content
    return tensor


def flatten_state(prefix: str, state: Any) -> tuple[dict[str, Tensor], Any]:
    """Take the tensors out of a nested state.

    In the document a tensor is ``{"tensor": name}``, or ``{"channels_last": name}`` where it lies
    so in memory; a NumPy array ``{"array": name}``, a tuple ``{"tuple": [...]}``, a dict
    ``{"dict": [[key, value], ...]}`` (keys keep type and order), NaN and the infinities
    ``{"float": text}``. Lists, finite numbers, strings, truth values and None are themselves.

    Args:
        prefix: begins the name of each tensor; the path inside ``state`` follows.
        state: dicts, lists, tuples, tensors, NumPy arrays, numbers, strings and None.

    Returns:
        The tensors by name, and the document for `unflatten_state`.

    Raises:
        CheckpointError: anything else in ``state``.
    """
    tensors: dict[str, Tensor] = {}
    return tensors, _flatten(prefix, state, tensors)


def _flatten(path: str, value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        # The order in memory decides which kernel runs next, and so the last bit of its result.
        nhwc = (
            value.dim() == 4
            and not value.is_contiguous()
            and value.is_contiguous(memory_format=torch.channels_last)
        )
        return {"channels_last" if nhwc else "tensor": _put(path, value, tensors)}
    if isinstance(value, np.ndarray):
        return {"array": _put(path, torch.from_numpy(value.copy()), tensors)}
    if isinstance(value, dict):
        pairs = [[_flatten(path, k, tensors), v] for k, v in value.items()]
        return {"dict": [[k, _flatten(f"{path}.{k}", v, tensors)] for k, v in pairs]}
    if isinstance(value, list | tuple):
        entries = [_flatten(f"{path}.{i}", v, tensors) for i, v in enumerate(value)]
        return entries if isinstance(value, list) else {"tuple": entries}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise CheckpointError(f"{path}: a {type(value).__name__} has no place in a checkpoint")


def _put(path: str, tensor: Tensor, tensors: dict[str, Tensor]) -> str:
    # {"a.b": x, "a": {"b": y}} gives one path twice; the document knows the name that was taken.
    while path in tensors:
        path += "_"
    tensors[path] = tensor
    return path


def unflatten_state(tensors: Mapping[str, Tensor], document: Any) -> Any:
    """The inverse of `flatten_state`; ``tensors`` may hold others too.

    Raises:
        CheckpointError: a document that `flatten_state` does not make, or a tensor is missing.
    """
    try:
        return _unflatten(tensors, document)
    except (LookupError, TypeError, ValueError, RecursionError) as reason:
        raise CheckpointError(f"the state in the checkpoint cannot be used: {reason!r}") from reason


def _unflatten(tensors: Mapping[str, Tensor], value: Any) -> Any:
    if isinstance(value, list):
        return [_unflatten(tensors, entry) for entry in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "channels_last":
        return tensors[content].contiguous(memory_format=torch.channels_last)
    if kind == "tensor":
        return tensors[content]
    if kind == "array":
        return tensors[content].numpy()
    if kind == "dict":
        return {_unflatten(tensors, k): _unflatten(tensors, v) for k, v in content}
    if kind == "tuple":
        return tuple(_unflatten(tensors, entry) for entry in content)
    if kind == "float":
        return float(content)
    raise ValueError(f"unknown entry {kind!r}")
