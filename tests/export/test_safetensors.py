"""The integer artifact: exact round trips, small files, and not one damaged byte unnoticed."""

from __future__ import annotations

import hashlib
import json
import math
import random
import struct
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load as load_with_the_library

from mecq_cli.errors import ArtifactError, UsageError
from mecq_cli.export.safetensors import KIND, load, save, to_bytes
from mecq_cli.integer import reference
from mecq_cli.integer.ir import Grid, IntegerModel, Node
from mecq_cli.tensorfile import FileKind, RawTensor, decode, encode
from tests.mutations import mutations, overwrite

STREAM = Grid(0.0625, 100, 8, 0, 255)
CONV = {"stride": (1, 1), "padding": (1, 1, 1, 1), "dilation": (1, 1), "groups": 1}
WINDOW = {"kernel": (2, 2), "stride": (2, 2), "padding": (0, 0), "ceil_mode": False}


def weights(
    shape: tuple[int, ...], bits: int, *, seed: int = 0, float_bias: bool = False
) -> dict[str, NDArray[Any]]:
    rng = np.random.default_rng(seed)
    weight: NDArray[Any]
    if bits == 32:
        weight = rng.standard_normal(shape).astype(np.float32)
    elif bits == 1:
        weight = rng.choice([-1, 1], shape).astype(np.int8)
    else:
        weight = rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), shape, np.int8)
    bias = rng.integers(-100, 100, shape[0], np.int32)
    scale = rng.uniform(0.01, 0.02, shape[0]) * rng.choice([-1, 1], shape[0])
    return {
        "weight": weight,
        "weight_scale": scale.astype(np.float32),
        "bias": bias.astype(np.float32) if float_bias else bias,
    }


def small_model() -> IntegerModel:
    """Every bit width, and nearly every operation."""
    nodes = [
        Node(
            "stem", "conv2d", ("input",), None, CONV, 32, weights((8, 3, 3, 3), 32, float_bias=True)
        ),
        Node("relu", "clip", ("stem",), None, {"min": 0.0, "max": None}),
        Node("q", "quantize", ("relu",), STREAM),
    ]
    for bits in range(1, 9):
        grid = Grid(float(np.float32(0.1)) * 2, 3, 4, 3, 15)
        groups = 8 if bits % 2 else 2
        attributes = {**CONV, "groups": groups}
        shape = (8, 8 // groups, 3, 3)
        before = nodes[-1].name
        nodes += [
            Node(f"c{bits}", "conv2d", (before,), grid, attributes, bits, weights(shape, bits)),
            Node(f"r{bits}", "requantize", (f"c{bits}",), STREAM),
            Node(f"a{bits}", "add", (before, f"r{bits}"), STREAM),
        ]
    nodes += [
        Node("max", "max_pool2d", ("a8",), STREAM, {**WINDOW, "dilation": (1, 1)}),
        Node("avg", "avg_pool2d", ("a8",), STREAM, {**WINDOW, "count_include_pad": True}),
        Node("cat", "concat", ("max", "avg"), STREAM),
        Node("gap", "global_avg_pool", ("cat",), STREAM),
        Node("flat", "flatten", ("gap",), STREAM),
        Node("fc", "linear", ("flat",), None, {}, 8, weights((5, 16), 8)),
    ]
    metadata = {"model": "small", "classes": ["a", "é", "日本", 'd"', "e\\"], "wbits": 2}
    return IntegerModel(tuple(nodes), (3, 8, 8), metadata)


def assert_same(a: IntegerModel, b: IntegerModel) -> None:
    assert a.input_shape == b.input_shape
    assert a.metadata == b.metadata
    assert len(a.nodes) == len(b.nodes)
    for x, y in zip(a.nodes, b.nodes, strict=True):
        assert replace(x, tensors={}) == replace(y, tensors={})
        assert {*x.tensors} == {*y.tensors}
        for name, array in x.tensors.items():
            other = y.tensors[name]
            assert (array.dtype, array.shape) == (other.dtype, other.shape)
            assert array.tobytes() == other.tobytes()


@pytest.fixture(scope="module")
def artifact() -> bytes:
    return to_bytes(small_model())


@pytest.fixture
def load_bytes(tmp_path: Path) -> Callable[[bytes], IntegerModel]:
    path = tmp_path / "m.safetensors"
    path.touch()

    def load_written(data: bytes) -> IntegerModel:
        overwrite(path, data)
        return load(path)

    return load_written


def test_a_model_comes_back_exactly_and_runs(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    model = small_model()
    save(model, path)
    loaded = load(path)
    assert_same(model, loaded)
    images = np.random.default_rng(0).standard_normal((2, 3, 8, 8)).astype(np.float32)
    assert (reference.run(model, images) == reference.run(loaded, images)).all()
    with pytest.raises(UsageError, match="--force"):
        save(model, path)


def backwards(mapping: Mapping[str, Any]) -> dict[str, Any]:
    return dict(reversed([*mapping.items()]))


def test_same_model_same_bytes(artifact: bytes) -> None:
    model = small_model()
    shuffled = [
        replace(
            node,
            tensors=backwards(node.tensors),
            attributes=backwards(node.attributes),
        )
        for node in model.nodes
    ]
    metadata = backwards(model.metadata)
    assert to_bytes(replace(model, nodes=tuple(shuffled), metadata=metadata)) == artifact


def test_other_programs_can_read_it(artifact: bytes) -> None:
    """By nothing but the safetensors library and what docs/artifact-format.md says."""
    tensors = load_with_the_library(artifact)
    length = int.from_bytes(artifact[:8], "little")
    metadata = json.loads(artifact[8 : 8 + length])["__metadata__"]
    document = json.loads(metadata["model"])
    hashes = json.loads(metadata["sha256"])["tensors"]
    assert hashes == {k: hashlib.sha256(v.tobytes()).hexdigest() for k, v in tensors.items()}
    for node, entry in zip(small_model().nodes, document["nodes"], strict=True):
        assert (node.name, node.op, [*node.inputs]) == (entry["name"], entry["op"], entry["inputs"])
        for name, array in node.tensors.items():
            stored, b = tensors[f"{node.name}.{name}"], entry["weight"]["bits"]
            if name == "weight" and b != 32:
                count = math.prod(entry["weight"]["shape"])
                bits = np.unpackbits(stored, count=count * b, bitorder="little").reshape(count, b)
                codes = (bits << np.arange(b)).sum(1)
                stored = 2 * codes - 1 if b == 1 else codes - 2 ** (b - 1)
                stored = stored.reshape(entry["weight"]["shape"])
            assert (stored == array).all()


def resnet18() -> IntegerModel:
    """Its tensors and graph, W2A2 with 8-bit first and last layer; random weights."""
    a2, rng = Grid(0.125, 0, 2, 0, 3), random.Random(0)
    nodes = [Node("quantize", "quantize", ("input",), STREAM)]

    def conv(name: str, source: str, o: int, i: int, k: int, stride: int, grid: Grid) -> str:
        attributes = {**CONV, "stride": (stride, stride), "padding": (k // 2,) * 4}
        bits = 8 if name == "conv1" else 2
        tensors = weights((o, i, k, k), bits, seed=rng.randrange(2**32))
        nodes.append(Node(name, "conv2d", (source,), grid, attributes, bits, tensors))
        return name

    x, channels = conv("conv1", "quantize", 64, 3, 7, 2, STREAM), 64
    for stage, width in enumerate((64, 128, 256, 512), 1):
        for block in range(2):
            name, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            nodes.append(Node(f"{name}.in", "requantize", (x,), a2))
            conv(f"{name}.conv1", f"{name}.in", width, channels, 3, stride, a2)
            y = conv(f"{name}.conv2", f"{name}.conv1", width, width, 3, 1, STREAM)
            if stride > 1:
                x = conv(f"{name}.downsample.0", f"{name}.in", width, channels, 1, 2, STREAM)
            nodes.append(Node(f"{name}.add", "add", (x, y), STREAM))
            x, channels = f"{name}.add", width
    nodes += [
        Node("global_pool", "global_avg_pool", (x,), STREAM),
        Node("flatten", "flatten", ("global_pool",), STREAM),
        Node("fc", "linear", ("flatten",), None, {}, 8, weights((1000, 512), 8)),
    ]
    metadata = {"model": "resnet18", "classes": [f"n{i:08d} some words" for i in range(1000)]}
    return IntegerModel(tuple(nodes), (3, 224, 224), metadata)


def test_resnet18_is_as_small_as_its_content(tmp_path: Path) -> None:
    model = resnet18()
    ideal = 0
    for node in model.nodes:
        for name, array in node.tensors.items():
            bits = node.weight_bits or 0
            ideal += array.size * bits // 8 if name == "weight" else array.nbytes
    assert ideal == pytest.approx(3.36e6, rel=0.001)
    save(model, tmp_path / "m")
    assert (tmp_path / "m").stat().st_size <= 1.03 * ideal
    assert_same(load(tmp_path / "m"), model)


def assert_each_is_noticed(
    artifact: bytes, load_bytes: Callable[[bytes], IntegerModel], count: int, seed: int
) -> None:
    for name, damaged in mutations(artifact, count, seed):
        message = None
        try:
            load_bytes(damaged)
        except ArtifactError as error:
            message = str(error)
        assert message is not None, f"{name} was not noticed"
        assert "\n" not in message, name
        assert len(message) < 600, name


def test_no_damage_goes_unnoticed(
    artifact: bytes, load_bytes: Callable[[bytes], IntegerModel]
) -> None:
    assert_each_is_noticed(artifact, load_bytes, 8_000, 1)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(2, 12))
def test_no_damage_goes_unnoticed_at_length(
    artifact: bytes, load_bytes: Callable[[bytes], IntegerModel], seed: int
) -> None:
    assert_each_is_noticed(artifact, load_bytes, 20_000, seed)


@pytest.mark.long
def test_no_flipped_bit_goes_unnoticed(
    artifact: bytes, load_bytes: Callable[[bytes], IntegerModel]
) -> None:
    for bit in range(8 * len(artifact)):
        damaged = bytearray(artifact)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ArtifactError):
            load_bytes(bytes(damaged))


def test_damage_is_named(artifact: bytes, load_bytes: Callable[[bytes], IntegerModel]) -> None:
    tensors, _ = decode(KIND, artifact, "")
    position = artifact.index(tensors["c3.weight"].data)
    damaged = bytearray(artifact)
    damaged[position] ^= 1
    with pytest.raises(ArtifactError, match=r"SHA-256 of tensor 'c3.weight'"):
        load_bytes(bytes(damaged))
    with pytest.raises(ArtifactError, match="a header of 72057594037927936 bytes"):
        load_bytes(b"\0\0\0\0\0\0\0\1" + artifact[8:])
    with pytest.raises(ArtifactError, match="0 bytes only"):
        load_bytes(b"")


def entry(begin: int, end: int, shape: list[int]) -> dict[str, Any]:
    return {"dtype": "U8", "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    "tensors",
    [
        b'{"a":' + b"[" * 500_000,
        b'{"a":' + b"9" * 500_000 + b"}",
        b'{"a":NaN}',
        b"[]",
        b"\xff\xfe",
        {"a": entry(0, 2**63, [2**63])},
        {"a": entry(0, 8, [2**48] * 16)},
        {"a": entry(0, 8, [8, 1, -1])},
        {"a": entry(0, 8, [True, 8])},
        {"a": entry(8, 0, [8])},
        {f"t{i}": entry(0, 4_000_000, [4_000_000]) for i in range(100_000)},
        {"a": entry(0, 4_000_000, [4_000_000]), "b": entry(2_000_000, 4_000_000, [2_000_000])},
        {"a": entry(1, 4_000_000, [3_999_999])},
        {"a": entry(0, 0, [0])},
    ],
    ids=range(14),
)
def test_hostile_headers_cost_neither_time_nor_memory(
    load_bytes: Callable[[bytes], IntegerModel], tensors: bytes | dict[str, Any]
) -> None:
    """Overlapping tensors, for one, would take a tenth of a terabyte to hash."""
    if isinstance(tensors, dict):
        stamp = {"format": "mecq-integer", "version": "1", "sha256": "{}", "model": "{}"}
        header = json.dumps({"__metadata__": stamp, **tensors}).encode()
    else:
        header = tensors
    start = time.process_time()
    with pytest.raises(ArtifactError) as caught:
        load_bytes(struct.pack("<Q", len(header)) + header + bytes(4_000_000))
    assert time.process_time() - start < 5
    assert len(str(caught.value)) < 600


def rewritten(
    artifact: bytes,
    change: Callable[[dict[str, Any]], None] = lambda document: None,
    tensors: Mapping[str, RawTensor] | None = None,
    kind: FileKind = KIND,
) -> bytes:
    """A file whose hashes are right and whose model is not: what an attacker could write."""
    original, metadata = decode(KIND, artifact, "")
    document = json.loads(metadata["model"])
    change(document)
    text = json.dumps(document, sort_keys=True, separators=(",", ":"))
    version = 1 if kind is KIND else kind.version
    return b"".join(encode(kind, {**original, **(tensors or {})}, {"model": text}, version))


def test_a_newer_version_is_told_from_damage(
    artifact: bytes, load_bytes: Callable[[bytes], IntegerModel]
) -> None:
    with pytest.raises(ArtifactError, match=r"version 3 is newer than 2.*update mecq"):
        load_bytes(rewritten(artifact, kind=FileKind("mecq-integer", 3, ArtifactError)))
    with pytest.raises(ArtifactError, match="its format is 'mecq-checkpoint'"):
        load_bytes(rewritten(artifact, kind=FileKind("mecq-checkpoint", 1, ArtifactError)))


def test_more_than_the_model_is_refused(
    artifact: bytes, load_bytes: Callable[[bytes], IntegerModel]
) -> None:
    load_bytes(rewritten(artifact))
    extra = {"payload": RawTensor("U8", (3,), b"abc")}
    with pytest.raises(ArtifactError, match="more than the model"):
        load_bytes(rewritten(artifact, tensors=extra))
    tensors, metadata = decode(KIND, artifact, "")
    with pytest.raises(ArtifactError, match="more than the model"):
        load_bytes(b"".join(encode(KIND, tensors, {**metadata, "x": "y"})))
    spaced = metadata["model"].replace(",", ", ", 1)
    with pytest.raises(ArtifactError, match="more than the model"):
        load_bytes(b"".join(encode(KIND, tensors, {"model": spaced})))


HOSTILE = [
    None, True, -1, 0, 1, 3, 255, 256, 2**31, 2**63, 2**200, -0.0, 0.1, 1e-300, 1e300, "", "input",
    "conv2d", "c3", "\ud800", "x" * 1000, [], {}, [1], [0, 0], [-1, 2], [2**40, 2**40], [[1, 1]],
    [1, 1, 1, 1], ["input"], ["q", "q"], {"a": 1},
]  # fmt: skip


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) inside a JSON document."""
    pairs = list(value.items() if isinstance(value, dict) else enumerate(value))
    found = [(value, key) for key, _ in pairs]
    for _, entry in pairs:
        if isinstance(entry, dict | list):
            found += places(entry)
    return found


def test_hostile_values_are_refused_or_harmless(
    artifact: bytes, load_bytes: Callable[[bytes], IntegerModel]
) -> None:
    rng = random.Random(0)
    images = np.ones((1, 3, 8, 8), np.float32)
    harmless = 0

    def change(document: dict[str, Any]) -> None:
        container, key = rng.choice(places(document))
        if rng.random() < 0.1:
            del container[key]
        else:
            container[key] = rng.choice(HOSTILE)

    for _ in range(1_000):
        try:
            model = load_bytes(rewritten(artifact, change))
        except ArtifactError:
            continue
        harmless += 1
        if model.input_shape == (3, 8, 8):
            assert np.isfinite(reference.run(model, images)).all()
    assert 0 < harmless < 200


@pytest.mark.parametrize(
    ("name", "dtype", "values", "message"),
    [
        ("fc.weight_scale", "<f4", [1, 1, np.nan, 1, 1], "weight_scale is zero, not finite"),
        ("fc.weight_scale", "<f4", [1, 1, 0, 1, 1], "weight_scale is zero, not finite"),
        ("fc.weight_scale", "<f4", [1, 1, 1, 1], "one value for each output channel"),
        ("fc.bias", "<f4", [1, 1, 1, 1, 1], "must be"),
        ("fc.bias", "<i4", [0, 0, 0, 0, 2**31 - 1], "channel 4 may overflow"),
        ("fc.weight", "u1", [0] * 79, "does not have the size"),
        ("stem.bias", "<f4", [np.inf] + [0] * 7, "not finite"),
    ],
)
def test_hostile_tensors_are_refused(
    artifact: bytes,
    load_bytes: Callable[[bytes], IntegerModel],
    name: str,
    dtype: str,
    values: list[float],
    message: str,
) -> None:
    array = np.array(values, dtype)
    kind = {"f": "F32", "i": "I32", "u": "U8"}[array.dtype.kind]
    raw = RawTensor(kind, array.shape, array.tobytes())
    with pytest.raises(ArtifactError, match=message):
        load_bytes(rewritten(artifact, tensors={name: raw}))


def test_metadata_must_survive_the_file() -> None:
    model = small_model()
    for metadata in ({"a": (1, 2)}, {"a": {1: 2}}, {"a": math.nan}, {"a": np.float32(1)}):
        with pytest.raises(ArtifactError, match="not plain JSON"):
            to_bytes(replace(model, metadata=metadata))
