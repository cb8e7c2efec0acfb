"""The pack-quantized layout: as it is written down, and as the library itself reads it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import load as load_with_safetensors
from torch import nn

from mecq_cli.errors import ArtifactError
from mecq_cli.export.compressed_tensors import config, to_bytes, with_weights_of
from mecq_cli.integer.ir import INPUT, Grid, IntegerModel, Node, weight_multiplier
from mecq_cli.integer.reference import run
from mecq_cli.integer.validate import validate
from tests.integer.random_models import Maker
from tests.mutations import mutations

WIDTHS = range(1, 9)


def networks() -> tuple[IntegerModel, NDArray[np.float32]]:
    """Convolutions and linear layers of every width, with float weights and float inputs too."""
    rng = np.random.default_rng(0)
    maker = Maker(rng, rng.normal(size=(4, 3, 9, 9)).astype(np.float32))
    last = maker.conv(INPUT, 6, 3, wbits=5, abits=None)
    last = maker.quantize(last, 8)
    for bits in WIDTHS:
        groups = 6 if bits == 3 else 2
        last = maker.conv(last, 6, 3, padding=1, groups=groups, wbits=bits)
    last = maker.flatten(maker.conv(last, 3, 1, wbits=8, abits=8))
    for bits in WIDTHS:
        last = maker.linear(last, 37 + bits, wbits=bits, abits=8)
    last = maker.append(Node("floats", "dequantize", (last,), None))
    weight = rng.normal(size=(5, maker.shape(last)[0])).astype(np.float32)
    tensors: dict[str, Any] = {
        "weight": weight,
        "weight_scale": np.full(5, -1.25, np.float32),
        "bias": rng.normal(size=5).astype(np.float32),
    }
    maker.append(Node("fc", "linear", (last,), None, {}, 32, tensors))
    validate(maker.model())
    return maker.model(), maker.images


def weighted(model: IntegerModel) -> list[tuple[Node, Grid | None]]:
    grids = {INPUT: None, **{node.name: node.grid for node in model.nodes}}
    return [(node, grids[node.inputs[0]]) for node in model.nodes if node.tensors]


def real_weight(node: Node, source: Grid | None) -> NDArray[np.float32]:
    """What the weight stands for, [O, K]."""
    multiplier = 1 if source is None else weight_multiplier(node.weight_bits or 0)
    integers = node.tensors["weight"].astype(np.float32).reshape(len(node.tensors["bias"]), -1)
    real: NDArray[np.float32] = integers * multiplier * node.tensors["weight_scale"][:, None]
    return real


def test_the_file_is_what_is_written_down() -> None:
    model, _ = networks()
    data = to_bytes(model)
    assert data == to_bytes(networks()[0])
    tensors = load_with_safetensors(data)
    document = json.loads(config(model))
    quantization = document["quantization_config"]
    widths = {
        name: group["weights"]["num_bits"]
        for group in quantization["config_groups"].values()
        for name in group["targets"]
    }
    assert {*widths.values()} == {2, 3, 4, 5, 6, 7, 8}
    assert quantization["ignore"] == ["fc"]
    for node, source in weighted(model):
        unit = 1.0 if source is None else source.scale * node.tensors["weight_scale"].astype(float)
        np.testing.assert_allclose(
            tensors.pop(f"{node.name}.bias"), node.tensors["bias"] * unit, rtol=1e-6
        )
        if node.name == "fc":
            np.testing.assert_array_equal(tensors.pop("fc.weight"), real_weight(node, source))
            continue
        bits = widths[node.name]
        assert bits == max(node.weight_bits or 0, 2)
        rows, columns = tensors.pop(f"{node.name}.weight_shape").tolist()
        assert document["mecq"]["weight_shapes"][node.name] == list(node.tensors["weight"].shape)
        packed, scale = (tensors.pop(f"{node.name}.weight_{what}") for what in ("packed", "scale"))
        assert packed.dtype == np.int32
        assert packed.shape == (rows, math.ceil(columns * bits / 32))
        assert scale.shape == (rows, 1)
        for row, words, step in zip(real_weight(node, source), packed, scale, strict=True):
            stream = int.from_bytes(words.astype("<u4").tobytes(), "little")
            codes = [(stream >> i * bits) % 2**bits - 2 ** (bits - 1) for i in range(columns)]
            np.testing.assert_array_equal(np.array(codes, np.float32) * step, row)
            assert stream >> bits * columns == 0
    assert not tensors


def test_reading_back_gives_the_same_network(tmp_path: Path) -> None:
    model, images = networks()
    path = tmp_path / "model.safetensors"
    path.write_bytes(to_bytes(model))
    stored = with_weights_of(path, model)
    validate(stored)
    np.testing.assert_array_equal(run(stored, images), run(model, images))
    for node, other in zip(model.nodes, stored.nodes, strict=True):
        if node.tensors and node.weight_bits != 32:
            for name, tensor in node.tensors.items():
                np.testing.assert_array_equal(other.tensors[name], tensor, f"{node.name} {name}")
    with pytest.raises(ArtifactError, match="does not hold the weights of this model"):
        with_weights_of(path, smaller(model))
    for name, damaged in mutations(to_bytes(model), 200, 0):
        path.write_bytes(damaged)
        with pytest.raises(ArtifactError) as caught:
            with_weights_of(path, model)
        assert "\n" not in str(caught.value), name


def smaller(model: IntegerModel) -> IntegerModel:
    """Another network with the same names."""
    first = model.nodes[0]
    tensors = {name: tensor[:4] for name, tensor in first.tensors.items()}
    node = Node(first.name, first.op, first.inputs, None, first.attributes, 5, tensors)
    return IntegerModel((node, *model.nodes[1:]), model.input_shape)


# -- the library itself ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def library() -> Any:
    return pytest.importorskip(
        "compressed_tensors",
        reason="compressed-tensors is not installed (pip install 'mecq[compressed-tensors]')",
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model, _ = networks()
    (tmp_path / "model.safetensors").write_bytes(to_bytes(model))
    (tmp_path / "config.json").write_bytes(config(model))
    return tmp_path


def test_the_library_unpacks_every_layer_of_a_folder(library: Any, folder: Path) -> None:
    """Convolutions as well, where it works on tensors and not on modules."""
    converters = pytest.importorskip("compressed_tensors.entrypoints.convert.converters")
    reader = converters.CompressedTensorsDequantizer(folder, dtype=torch.float32)
    stored = load_with_safetensors((folder / "model.safetensors").read_bytes())
    tensors = reader.process({name: torch.from_numpy(a) for name, a in stored.items()})
    for node, source in weighted(networks()[0]):
        wanted = real_weight(node, source)
        np.testing.assert_array_equal(tensors.pop(f"{node.name}.weight").numpy(), wanted)
        assert tensors.pop(f"{node.name}.bias").shape == wanted.shape[:1]
    assert not tensors


def test_the_library_loads_linear_layers_into_a_network(library: Any, folder: Path) -> None:
    """Compressed, and then decompressed in place, as its users do."""
    lifecycle = pytest.importorskip("compressed_tensors.quantization.lifecycle")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    compressors = pytest.importorskip("compressed_tensors.compressors")
    layers = {n.name: (n, s) for n, s in weighted(networks()[0]) if n.op == "linear"}
    network = nn.ModuleDict(
        {
            name.replace(".", "_"): nn.Linear(*reversed(node.tensors["weight"].shape))
            for name, (node, _) in layers.items()
        }
    )
    document = json.loads((folder / "config.json").read_text())["quantization_config"]
    for group in document["config_groups"].values():
        group["targets"] = [name.replace(".", "_") for name in group["targets"]]
    settings = quantization.QuantizationConfig.model_validate(document)
    lifecycle.apply_quantization_config(network, settings)
    compressor = compressors.ModelCompressor(quantization_config=settings)
    compressor.compress_model(network)
    stored = load_with_safetensors((folder / "model.safetensors").read_bytes())
    state = {
        f"{name.replace('.', '_')}.{key.removeprefix(f'{name}.')}": torch.from_numpy(array)
        for name in layers
        for key, array in stored.items()
        if key.startswith(f"{name}.")
    }
    network.load_state_dict(state)
    compressor.decompress_model(network)
    for name, (node, source) in layers.items():
        weight = network.state_dict()[f"{name.replace('.', '_')}.weight"]
        np.testing.assert_array_equal(weight.numpy(), real_weight(node, source))
