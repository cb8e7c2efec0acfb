"""One .safetensors file of which every byte is checked: artifacts and checkpoints are both this.

safetensors checks structure, not content. Here a file has exactly one valid form for what it
says: keys sorted, tensors without gaps in a fixed order, canonical JSON, and in the metadata
the SHA-256 of each tensor and of the whole. Reading writes the header again and compares, so
that padding, duplicate keys and trailing bytes cannot carry a change either.

The layout is specified in docs/artifact-format.md. The file is not authenticated: who can
compute SHA-256 can write another valid file.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mecq_cli.errors import InputError
from mecq_cli.storage import sha256_hex

ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64"), 8),
}
"""Bytes an element takes, by the name of its type in safetensors."""

MAX_HEADER = 2**24
_METADATA = "__metadata__"
_MAX_DIMS = 16
_MAX_DIM = 2**48


@dataclass(frozen=True)
class FileKind:
    """What a file calls itself.

    Attributes:
        format: the value of the metadata key "format".
        version: the newest version that can be read; all before it can be read too.
        error: raised where a file cannot be read.
    """

    format: str
    version: int
    error: type[InputError]


@dataclass(frozen=True)
class RawTensor:
    """Elements in C order, little-endian; ``dtype`` is a key of `ITEM_BYTES`."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes | memoryview


def canonical_json(value: Any) -> str:
    """The one JSON text of a value: ASCII, keys sorted, no spaces, floats that round-trip.

    Raises:
        ValueError: the text would not be read back as an equal value: tuples, keys that are no
            strings, NaN, objects.
    """
    try:
        text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
        if json.loads(text) == value:
            return text
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"not plain JSON: {error}") from error
    raise ValueError("not plain JSON: tuples or keys that are no strings")


def strict_json(text: str | bytes) -> Any:
    """Read JSON without the NaN and Infinity that Python would accept.

    Raises:
        ValueError: no JSON, or nested too deeply.
    """
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def encode(
    kind: FileKind,
    tensors: Mapping[str, RawTensor],
    metadata: Mapping[str, str],
    version: int = 1,
) -> list[bytes | memoryview]:
    """The parts of a file, to be written one after the other.

    Args:
        kind: fills the metadata key "format".
        tensors: by name.
        metadata: further keys; "format", "version" and "sha256" are reserved.
        version: the oldest that has what the file holds, so that as many as can will read it.

    Raises:
        ValueError: the header would be larger than can be read.
    """
    named = {**metadata, "format": kind.format, "version": str(version)}
    header = _header(tensors, named, _hash_tensors(tensors))
    return [header, *(tensors[name].data for name in _order(tensors))]


class _Newer(ValueError):
    """The file is whole, and this program too old for it."""


class _Foreign(ValueError):
    """A file of safetensors that something else wrote."""


def decode(kind: FileKind, data: bytes, where: str) -> tuple[dict[str, RawTensor], dict[str, str]]:
    """Tensors (views of ``data``) and the metadata given to `encode`.

    Args:
        kind: what the file must be.
        data: the whole file.
        where: named in errors.

    Raises:
        InputError: ``kind.error``, if a single byte is not what `encode` would have written.
    """
    try:
        return _decode(kind, data)
    except ValueError as reason:
        advice = "; take an intact copy or write it again"
        if isinstance(reason, _Newer):
            advice = ""
        elif isinstance(reason, _Foreign):
            advice = "; float weights are for mecq quantize or eval: MODEL --checkpoint FILE"
        raise kind.error(f"{where}: not a usable {kind.format} file: {reason}{advice}") from reason


def _decode(kind: FileKind, data: bytes) -> tuple[dict[str, RawTensor], dict[str, str]]:
    header, body = _split(data)
    document = strict_json(header)
    if not isinstance(document, dict):
        raise ValueError("the header is not a JSON object")
    metadata = _read_metadata(kind, document.pop(_METADATA, None))
    tensors = _read_tensors(document, body)
    stored = metadata.pop("sha256")
    hashes = _hash_tensors(tensors)
    if header != _header(tensors, metadata, hashes)[8:]:
        raise ValueError(_first_difference(stored, hashes))
    return tensors, {k: v for k, v in metadata.items() if k not in ("format", "version")}


def _split(data: bytes) -> tuple[bytes, memoryview]:
    if len(data) < 8:
        raise ValueError(f"it has {len(data)} bytes only")
    (length,) = struct.unpack_from("<Q", data)
    if length > min(len(data) - 8, MAX_HEADER):
        raise ValueError(f"a header of {length} bytes cannot be in a file of {len(data)}")
    return data[8 : 8 + length], memoryview(data)[8 + length :]


def _read_metadata(kind: FileKind, metadata: Any) -> dict[str, str]:
    """Check what the file says it is, before anything else that a newer version may change."""
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _Foreign("the header has no metadata of strings")
    if metadata.get("format") != kind.format:
        raise _Foreign(f"its format is {_short(metadata.get('format'))}")
    version = metadata.get("version", "")
    if version not in map(str, range(1, kind.version + 1)):
        if version.isdecimal() and len(version) < 10 and int(version) > kind.version:
            raise _Newer(
                f"its format version {int(version)} is newer than {kind.version}, "
                "the newest this program reads; update mecq"
            )
        known = " or ".join(map(str, range(1, kind.version + 1)))
        raise ValueError(f"its format version is {_short(version)}, not {known}")
    if "sha256" not in metadata:
        raise ValueError("it carries no SHA-256")
    return metadata


def _read_tensors(document: dict[str, Any], body: memoryview) -> dict[str, RawTensor]:
    """Cut the body. Nothing is read twice, so that hashing takes the time of one pass."""
    tensors = {}
    for name, entry in document.items():
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise ValueError(f"tensor {_short(name)} has other fields than it must")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
            raise ValueError(f"tensor {_short(name)} is of unknown type {_short(dtype)}")
        if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
            raise ValueError(f"tensor {_short(name)} has no proper shape or offsets")
        begin, end = offsets
        if not 0 <= begin <= end <= len(body) or end - begin != _size(dtype, shape):
            raise ValueError(f"tensor {_short(name)} of shape {shape} does not fit {begin}:{end}")
        tensors[name] = RawTensor(dtype, tuple(shape), body[begin:end])
    position = 0
    for name in _order(tensors):
        begin, end = document[name]["data_offsets"]
        if begin != position:
            raise ValueError(f"tensor {_short(name)} begins at {begin}, not at {position}")
        position = end
    if position != len(body):
        raise ValueError(f"the tensors take {position} bytes, {len(body)} follow the header")
    return tensors


def _are_sizes(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) <= _MAX_DIMS
        and all(type(size) is int and 0 <= size <= _MAX_DIM for size in value)
    )


def _size(dtype: str, shape: tuple[int, ...] | list[int]) -> int:
    return math.prod(shape) * ITEM_BYTES[dtype]


def _order(tensors: Mapping[str, RawTensor]) -> list[str]:
    """Wide elements first: each tensor is then aligned to its own, without any padding."""
    return sorted(tensors, key=lambda name: (-ITEM_BYTES[tensors[name].dtype], name))


def _hash_tensors(tensors: Mapping[str, RawTensor]) -> dict[str, str]:
    return {name: sha256_hex(tensor.data) for name, tensor in tensors.items()}


def _header(
    tensors: Mapping[str, RawTensor], metadata: Mapping[str, str], hashes: Mapping[str, str]
) -> bytes:
    """Length and header, padded with spaces to a multiple of 8 as in the safetensors library."""
    entries: dict[str, dict[str, Any]] = {}
    position = 0
    for name in _order(tensors):
        tensor = tensors[name]
        end = position + _size(tensor.dtype, tensor.shape)
        if name == _METADATA or len(tensor.data) != end - position:
            raise ValueError(f"tensor {_short(name)} of shape {tensor.shape} has a wrong size")
        entries[name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        position = end
    # The hash of the whole: the same header with hashes where the offsets are.
    summary: dict[str, Any] = {_METADATA: dict(metadata)}
    for name, entry in entries.items():
        summary[name] = {
            "dtype": entry["dtype"],
            "shape": entry["shape"],
            "sha256": hashes[name],
        }
    whole = sha256_hex(canonical_json(summary).encode())
    stamp = canonical_json({"tensors": dict(hashes), "whole": whole})
    text = canonical_json({_METADATA: {**metadata, "sha256": stamp}, **entries}).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER:
        raise ValueError(f"a header of {len(text):,} bytes is over the limit of {MAX_HEADER:,}")
    return struct.pack("<Q", len(text)) + text


def _first_difference(stored: str, hashes: Mapping[str, str]) -> str:
    """Say which tensor was changed, where the hashes can still tell."""
    try:
        claimed = strict_json(stored)["tensors"]
        changed = [name for name in hashes if claimed[name] != hashes[name]]
    except (ValueError, LookupError, TypeError):
        changed = []
    if changed:
        return f"the SHA-256 of tensor {_short(changed[0])} does not match its content"
    return "the SHA-256 of the whole or the form of the header does not match the content"


def _short(value: Any) -> str:
    """A value from the file, safe to show in one line."""
    text = ascii(value)
    return text if len(text) <= 80 else text[:77] + "..."
