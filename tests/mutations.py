"""Ways in which a file goes bad. Used by the tests of every format that must notice."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import onnx

Way = Callable[[bytes, random.Random], bytes]


def mutations(
    data: bytes, count: int, seed: int, ways: Sequence[Way] = ()
) -> Iterator[tuple[str, bytes]]:
    """``count`` damaged copies of a file, each with a name that tells what was done; all differ
    from ``data``. ``ways`` are those of a safetensors file if not given."""
    rng = random.Random(seed)
    ways = ways or SAFETENSORS
    made = 0
    while made < count:
        way = rng.choice(ways)
        damaged = way(data, rng)
        if damaged != data:
            made += 1
            yield f"{way.__name__} {made} (seed {seed})", damaged


def overwrite(path: Path, data: bytes) -> None:
    """New content for a file that exists; much faster than to make it anew each time."""
    with path.open("r+b") as file:
        file.write(data)
        file.truncate()


def header_end(data: bytes) -> int:
    return 8 + int(struct.unpack_from("<Q", data)[0])


def bit_flip(data: bytes, rng: random.Random, end: int | None = None) -> bytes:
    at = rng.randrange(end or len(data))
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]


def header_bit_flip(data: bytes, rng: random.Random) -> bytes:
    return bit_flip(data, rng, header_end(data))


def bytes_replaced(data: bytes, rng: random.Random) -> bytes:
    """A digit, a bracket or a letter of the header becomes another one: often still JSON."""
    at = rng.randrange(8, header_end(data))
    return data[:at] + bytes([rng.choice(b'0123456789-.e"[]{},:tn aF')]) + data[at + 1 :]


def zeroed(data: bytes, rng: random.Random) -> bytes:
    at, length = rng.randrange(len(data)), rng.choice((1, 8, 64, 512))
    run = data[at : at + length]
    return data[:at] + bytes(len(run)) + data[at + length :]


def cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.choice((rng.randrange(len(data)), len(data) - rng.randrange(1, 16)))]


def appended(data: bytes, rng: random.Random) -> bytes:
    return data + rng.choice((b"\0", b" ", b"\n", rng.randbytes(rng.randrange(1, 100))))


def swapped(data: bytes, rng: random.Random) -> bytes:
    """Two stretches of the body change places, as two tensors would."""
    size = rng.randrange(1, 64)
    a = rng.randrange(header_end(data), len(data) - 2 * size)
    b = rng.randrange(a + size, len(data) - size + 1)
    return (
        data[:a] + data[b : b + size] + data[a + size : b] + data[a : a + size] + data[b + size :]
    )


def inserted(data: bytes, rng: random.Random) -> bytes:
    """Something goes into the header, and its length is put right again."""
    end = header_end(data)
    at = rng.choice((end, 9, rng.randrange(8, end + 1)))
    junk = rng.choice((b" ", b"        ", b'"x":1,', b"\n", b"0", b'"__metadata__":{},'))
    return struct.pack("<Q", end - 8 + len(junk)) + data[8:at] + junk + data[at:]


def header_edited(data: bytes, rng: random.Random) -> bytes:
    """Valid JSON of the same form says something else: in the header or in the graph."""
    end = header_end(data)
    header = json.loads(data[8:end])
    key = rng.choice(sorted(header["__metadata__"]))
    if rng.random() < 0.5 and key in ("model", "document"):
        document = json.loads(header["__metadata__"][key])
        _edit(document, rng)
        header["__metadata__"][key] = _canonical(document)
    else:
        _edit(header, rng)
    text = _canonical(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data[end:]


def tensors_swapped(data: bytes, rng: random.Random) -> bytes:
    """Two tensors of one size change places."""
    end = header_end(data)
    header = json.loads(data[8:end])
    places = [e["data_offsets"] for name, e in header.items() if name != "__metadata__"]
    first, second = _pair([(end + begin, end + stop) for begin, stop in places], rng)
    changed = bytearray(data)
    changed[slice(*first)], changed[slice(*second)] = data[slice(*second)], data[slice(*first)]
    return bytes(changed)


def _pair(places: list[tuple[int, int]], rng: random.Random) -> list[tuple[int, int]]:
    """Two of one length; the same one twice where there are no others."""
    first = rng.choice(places)
    alike = [p for p in places if p[1] - p[0] == first[1] - first[0]]
    return [first, rng.choice(alike)]


def _canonical(document: Any) -> str:
    return json.dumps(document, sort_keys=True, separators=(",", ":"))


def _edit(document: Any, rng: random.Random) -> None:
    """Change one value somewhere inside: a number by one, a word, a missing or a doubled entry."""
    while True:
        keys = [*document] if isinstance(document, dict) else [*range(len(document))]
        key = rng.choice(keys)
        value = document[key]
        if isinstance(value, (dict, list)) and value and rng.random() < 0.9:
            document = value
            continue
        if rng.random() < 0.2:
            del document[key]
        elif isinstance(value, bool) or value is None:
            document[key] = not value
        elif isinstance(value, (int, float)):
            document[key] = rng.choice((value + 1, value - 1, -value, value * 2, 0, 2**40))
        elif isinstance(value, str):
            document[key] = rng.choice((value[:-1], value + "x", value.swapcase(), ""))
        else:
            document[key] = rng.choice((0, "", None))
        return


# -- ONNX: the file of a model is one protobuf message -------------------------------------------


def stretch_swapped(data: bytes, rng: random.Random) -> bytes:
    """Two stretches anywhere change places."""
    size = rng.randrange(1, 64)
    a = rng.randrange(0, len(data) - 2 * size)
    b = rng.randrange(a + size, len(data) - size + 1)
    first, second = data[a : a + size], data[b : b + size]
    return data[:a] + second + data[a + size : b] + first + data[b + size :]


def message_appended(data: bytes, rng: random.Random) -> bytes:
    """More of the same message: protobuf takes the last of two values, and joins lists."""
    more = onnx.ModelProto()
    match rng.randrange(4):
        case 0:
            more.producer_name = rng.choice(("mecq", "other"))
        case 1:
            more.metadata_props.add(key="mecq.metadata", value="{}")
        case 2:
            more.opset_import.add(domain="", version=rng.choice((13, 21, 25)))
        case _:
            more.graph.node.add(op_type="Identity", input=["logits"], output=["more"])
    extra: bytes = more.SerializeToString()
    return rng.choice((data + extra, extra + data))


def initializers_swapped(data: bytes, rng: random.Random) -> bytes:
    """Two stored tensors of one size change their contents."""
    model = onnx.load_model_from_string(data)
    stored = [tensor for tensor in model.graph.initializer if tensor.raw_data]
    first = rng.choice(stored)
    alike = [t for t in stored if len(t.raw_data) == len(first.raw_data)]
    second = rng.choice(alike)
    first.raw_data, second.raw_data = second.raw_data, first.raw_data
    return bytes(model.SerializeToString(deterministic=True))


def graph_edited(data: bytes, rng: random.Random) -> bytes:
    """A valid file with another graph."""
    model = onnx.load_model_from_string(data)
    nodes = model.graph.node
    node = rng.choice(nodes)
    match rng.randrange(5):
        case 0:
            nodes.remove(node)
        case 1 if len(node.input) > 1:
            node.input[0], node.input[1] = node.input[1], node.input[0]
        case 2 if node.attribute:
            attribute = rng.choice(node.attribute)
            attribute.i += 1
            if attribute.ints:
                attribute.ints[0] += 1
        case 3:
            node.op_type = rng.choice(("Identity", "Relu", "Neg"))
        case _:
            rng.choice(model.graph.initializer).dims.append(1)
    return bytes(model.SerializeToString(deterministic=True))


def properties_edited(data: bytes, rng: random.Random) -> bytes:
    """Other classes, another preprocessing, no digest, or that of another file."""
    model = onnx.load_model_from_string(data)
    entry = rng.choice(model.metadata_props)
    if entry.key == "mecq.metadata" and rng.random() < 0.8:
        document = json.loads(entry.value)
        _edit(document, rng)
        entry.value = json.dumps(document, sort_keys=True)
    elif rng.random() < 0.5:
        model.metadata_props.remove(entry)
        if rng.random() < 0.5:
            model.producer_name = ""
    else:
        entry.value = entry.value[:-1] + rng.choice("0123456789abcdef")
    return bytes(model.SerializeToString(deterministic=True))


SAFETENSORS: tuple[Way, ...] = (
    bit_flip, header_bit_flip, bytes_replaced, zeroed, cut, appended, swapped, inserted,
    header_edited, tensors_swapped,
)  # fmt: skip
ONNX: tuple[Way, ...] = (
    bit_flip, zeroed, cut, appended, stretch_swapped, message_appended, initializers_swapped,
    graph_edited, properties_edited,
)  # fmt: skip
