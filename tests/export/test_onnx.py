"""The ONNX file in onnxruntime against the reference: every integer, bit for bit."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from numpy.typing import NDArray
from onnx import TensorProto, helper

from mecq_cli.errors import ArtifactError, UsageError
from mecq_cli.export.onnx import PROFILES, save, to_bytes, to_model
from mecq_cli.export.ort import OrtRunner
from mecq_cli.integer.ir import INPUT, Grid, IntegerModel, Node
from mecq_cli.integer.reference import run
from mecq_cli.integer.validate import validate
from tests.integer.random_models import Maker, integer_models, resnet18

SUITE = settings(
    deadline=None,
    database=None,
    derandomize=True,
    max_examples=150,
    suppress_health_check=list(HealthCheck),
)
UNIT = Grid(1.0, 0, 8, 0, 255)


def check(model: IntegerModel, images: NDArray[np.float32], path: Path) -> Counter[str]:
    """Compare every node's output; returns how many integers the unfused graph computed (all)
    and how many of them differ (off) although their inputs were the same."""
    validate(model)
    save(model, path, force=True)
    wanted = run(model, images, keep=True)
    fused = OrtRunner(path, threads=1)
    values = fused.run_all(images)
    for node in model.nodes:
        np.testing.assert_array_equal(values[node.name], wanted[node.name], f"{node}")
    # Extra outputs keep onnxruntime from some fusions, so the plain session is checked too.
    np.testing.assert_array_equal(fused.run(images), run(model, images))

    counts: Counter[str] = Counter()
    unfused = OrtRunner(path, optimize=False, threads=1).run_all(images)
    same = {INPUT}
    for node in model.nodes:
        if node.grid is not None and same.issuperset(node.inputs):
            steps = np.abs(unfused[node.name].astype(int) - wanted[node.name])
            assert steps.max() <= 1, node
            counts.update(all=steps.size, off=int(np.count_nonzero(steps)))
        if np.array_equal(unfused[node.name], wanted[node.name]):
            same.add(node.name)
    return counts


def check_rare(counts: Counter[str]) -> None:
    """One in 100,000, and in a small sample a few."""
    assert counts["off"] <= 5 + 1e-5 * counts["all"], counts


def check_random(examples: settings, path: Path) -> None:
    counts: Counter[str] = Counter()

    @examples
    @given(integer_models())
    def compare(maker: Maker) -> None:
        counts.update(check(maker.model(), maker.images, path))

    compare()
    check_rare(counts)


def test_random_models_agree_with_the_reference(tmp_path: Path) -> None:
    check_random(SUITE, tmp_path / "model.onnx")


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_many_random_models_agree_with_the_reference(tmp_path: Path) -> None:
    many = settings(SUITE, max_examples=5000, derandomize=False)
    check_random(many, tmp_path / "model.onnx")


def product(op: str, grid: Grid, output: Grid | None) -> Node:
    """A conv2d or linear whose bias alone decides the sum: of each channel one for which
    fl(fl(s_x s_w) / s_y) and fl(s_x fl(s_w / s_y)) round to different integers."""
    rng = np.random.default_rng(5)
    channels, zero_point = 128, output.zero_point if output else 0
    s_x, s_y = np.float32(grid.scale), np.float32(output.scale if output else 1.5)
    s_w = (rng.uniform(0.001, 0.002, channels) * rng.choice([-1, 1], channels)).astype(np.float32)
    halves = np.arange(-zero_point, 255 - zero_point) + 0.5
    bias = np.zeros(channels, np.int32)
    for i, factor in enumerate(s_w):
        near = np.rint(halves / (s_x * factor / s_y))[:, None] + np.arange(-2, 3)
        near = near.astype(np.int32).ravel()
        first = np.rint(near.astype(np.float32) * (s_x * factor / s_y))
        other = np.rint(near.astype(np.float32) * (s_x * (factor / s_y)))
        bias[i] = rng.choice(np.append(near[first != other], 0))
    assert np.count_nonzero(bias) > channels // 4
    groups = channels if op == "depthwise" else 1
    kernel = {"conv2d": (4, 1, 1), "depthwise": (1, 1, 1), "linear": (4,)}[op]
    weight = rng.integers(-2, 2, (channels, *kernel)).astype(np.int8)
    tensors: dict[str, Any] = {"weight": weight, "weight_scale": s_w, "bias": bias}
    attributes: dict[str, Any] = {}
    if op != "linear":
        attributes = {"stride": (1, 1), "padding": (0,) * 4, "dilation": (1, 1), "groups": groups}
    kind = "linear" if op == "linear" else "conv2d"
    return Node("y", kind, ("x",), output, attributes, 2, tensors)


@pytest.mark.parametrize("op", ["conv2d", "depthwise", "linear"])
def test_the_scales_are_multiplied_in_the_order_of_the_table(op: str, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    grid, output = Grid(float(np.float32(0.0137)), 7, 8, 0, 255), Grid(1.5, 101, 8, 0, 255)
    size = 128 if op == "depthwise" else 4
    images = np.zeros((1, size, 1, 1), np.float32)
    first = Node("image", "quantize", (INPUT,), grid)
    flat = Node("x", "flatten", ("image",), grid)
    for target in (output, None):
        node = product(op, grid, target)
        nodes = [first, flat, node]
        if op != "linear":
            nodes = [Node("x", "quantize", (INPUT,), grid), node]
            nodes.append(Node("logits", "flatten", ("y",), target))
        model = IntegerModel(tuple(nodes), (size, 1, 1))
        save(model, path, force=True)
        wanted = run(model, images, keep=True)["y"]
        assert len(np.unique(wanted)) > 30
        np.testing.assert_array_equal(OrtRunner(path).run_all(images)["y"], wanted)


def test_resnet18_is_fused_small_and_exact(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    path = tmp_path / "model.onnx"
    model = resnet18(rng, wbits=2, abits=2, size=64)
    counts = check(model, rng.normal(size=(2, 3, 64, 64)).astype(np.float32), path)
    check_rare(counts)
    runner = OrtRunner(path)
    kernels = runner.kernels()
    # Eight residual adds, eight requantizations. Three convolutions come in four parts, one in two.
    expected = {"QLinearConv": 30, "QLinearAdd": 16, "Concat": 4}
    expected |= {"QLinearGlobalAveragePool": 1, "QGemm": 1}
    assert expected.items() <= kernels.items()
    assert not {"Conv", "Add", "Gemm", "Cast", "Mul", "DequantizeLinear"} & kernels.keys()
    weights = [(n.tensors["weight"].size * n.weight_bits, n) for n in model.nodes if n.weight_bits]
    ideal = sum(bits // 8 + 8 * len(n.tensors["bias"]) for bits, n in weights)
    assert path.stat().st_size < 1.02 * ideal


@pytest.mark.parametrize(
    ("bits", "dtype", "packed"),
    [(1, "INT2", 72), (2, "INT2", 72), (3, "INT4", 144), (4, "INT4", 144), (5, "INT8", 288)],
)
def test_weights_are_packed(bits: int, dtype: str, packed: int) -> None:
    maker = Maker(np.random.default_rng(bits), np.ones((1, 4, 6, 6), np.float32))
    maker.flatten(maker.conv(maker.quantize(INPUT, 8), 8, 3, wbits=bits))
    proto = to_model(maker.model())
    assert (proto.ir_version, proto.opset_import[0].version) == (13, 25)
    [weight] = [t for t in proto.graph.initializer if t.name.endswith("::weight")]
    assert weight.data_type == getattr(TensorProto, dtype)
    assert len(weight.raw_data) == packed


STEMS: list[tuple[int, int, int, tuple[int, ...], tuple[int, int], list[int]]] = [
    # channels, kernel, stride, padding, size of the image, shape of the weight that runs
    (3, 7, 2, (3, 3, 3, 3), (16, 12), [16, 12, 4, 4]),
    (3, 3, 2, (1, 1, 1, 1), (10, 10), [16, 12, 2, 2]),
    (3, 3, 2, (0, 0, 1, 1), (8, 8), [16, 12, 2, 2]),  # "same" padding
    (3, 1, 2, (1, 0, 2, 1), (8, 6), [16, 12, 1, 1]),
    (1, 11, 4, (2, 2, 2, 2), (24, 24), [16, 16, 4, 4]),
    (3, 3, 2, (1, 1, 1, 1), (9, 10), [16, 4, 3, 3]),  # no whole blocks
    (3, 3, 1, (1, 1, 1, 1), (8, 8), [16, 4, 3, 3]),
    (5, 3, 3, (0, 2, 1, 0), (9, 9), [16, 8, 3, 3]),
    (4, 3, 1, (1, 1, 1, 1), (8, 8), [16, 4, 3, 3]),
]


@pytest.mark.parametrize("wbits", [1, 8])
@pytest.mark.parametrize("stem", STEMS, ids=str)
def test_the_first_convolution_is_rewritten_and_exact(
    stem: tuple[Any, ...], wbits: int, tmp_path: Path
) -> None:
    channels, kernel, stride, padding, size, shape = stem
    rng = np.random.default_rng(0)
    maker = Maker(rng, rng.normal(size=(3, channels, *size)).astype(np.float32))
    last = maker.quantize(INPUT, 8)
    last = maker.conv(last, 16, kernel, stride=stride, padding=padding, wbits=wbits, abits=8)
    maker.flatten(last)
    path = tmp_path / "model.onnx"
    check_rare(check(maker.model(), maker.images, path))
    graph = OrtRunner(path).optimized()
    [convolution] = [node for node in graph.node if node.op_type == "QLinearConv"]
    shapes = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    assert shapes[convolution.input[3]] == shape


def test_halves_are_requantized_by_the_order_of_the_table(tmp_path: Path) -> None:
    """QLinearAdd would round them after the zero point, which is odd here."""
    images = np.arange(256, dtype=np.float32).reshape(1, 1, 16, 16)
    path = tmp_path / "model.onnx"
    for scale, op in ((2.0, "QuantizeLinear"), (2.1, "QLinearAdd")):
        target = Grid(float(np.float32(scale)), 101, 8, 0, 255)
        nodes = (
            Node("x", "quantize", (INPUT,), UNIT),
            Node("r", "requantize", ("x",), target),
            Node("y", "flatten", ("r",), target),
        )
        assert check(IntegerModel(nodes, (1, 16, 16)), images, path)["off"] == 0
        kernels = OrtRunner(path).kernels()
        assert kernels["QLinearAdd"] == (op == "QLinearAdd"), kernels


def test_requantizations_in_a_row_are_not_merged(tmp_path: Path) -> None:
    images = np.random.default_rng(0).normal(size=(4, 3, 8, 8)).astype(np.float32)
    scales = [float(np.float32(scale)) for scale in (0.013, 0.037, 0.021)]
    nodes = [Node("0", "quantize", (INPUT,), Grid(scales[0], 128, 8, 0, 255))]
    for i, scale in enumerate(scales[1:], 1):
        nodes.append(Node(str(i), "requantize", (str(i - 1),), Grid(scale, 99, 8, 0, 255)))
    nodes.append(Node("y", "flatten", ("2",), nodes[-1].grid))
    check(IntegerModel(tuple(nodes), (3, 8, 8)), images, tmp_path / "model.onnx")


def test_float_operations_between_grids_are_not_fused_with_them(tmp_path: Path) -> None:
    """QLinearAdd would round halves after the zero point, which is odd here."""
    images = np.random.default_rng(0).normal(size=(4, 3, 8, 8)).astype(np.float32)
    grid, other = Grid(2.0**-6, 100, 8, 0, 255), Grid(2.0**-5, 101, 8, 0, 255)
    nodes = [
        Node("x", "quantize", (INPUT,), grid),
        Node("a", "dequantize", ("x",), None),
        Node("b", "add", ("a", "a"), None),
        Node("c", "quantize", ("b",), Grid(2.0**-3, 101, 8, 0, 255)),
        Node("d", "quantize", ("a",), other),
        Node("e", "dequantize", ("d",), None),
        Node("f", "global_avg_pool", ("e",), None),
        Node("g", "quantize", ("f",), Grid(2.0**-8, 101, 8, 0, 255)),
    ]
    for last in ("c", "d", "g"):
        used = [*nodes, Node("y", "flatten", (last,), {n.name: n for n in nodes}[last].grid)]
        check(IntegerModel(tuple(used), (3, 8, 8)), images, tmp_path / "model.onnx")


def test_averages_on_the_grid_of_the_input_agree_unfused_too(tmp_path: Path) -> None:
    """A quarter of the means of 2x2 integers are ties."""
    grid = Grid(float(np.float32(0.0371)), 13, 8, 0, 255)
    images = np.random.default_rng(0).normal(size=(4, 8, 12, 12)).astype(np.float32)
    window = {"kernel": (2, 2), "stride": (2, 2), "padding": (0, 0)}
    attributes = {**window, "ceil_mode": False, "count_include_pad": True}
    nodes = (
        Node("x", "quantize", (INPUT,), grid),
        Node("mean", "avg_pool2d", ("x",), grid, attributes),
        Node("means", "global_avg_pool", ("mean",), grid),
        Node("y", "flatten", ("means",), grid),
    )
    counts = check(IntegerModel(nodes, (8, 12, 12)), images, tmp_path / "model.onnx")
    assert counts["off"] == 0


def test_large_sums_do_not_saturate(tmp_path: Path) -> None:
    """Products of 255 and 127 need more than 16 bits in pairs and more than 24 in the end."""
    maker = Maker(np.random.default_rng(0), np.full((2, 512, 4, 4), 300, np.float32))
    maker.append(Node("x", "quantize", (INPUT,), UNIT))
    weight = np.full((8, 512, 3, 3), 127, np.int8)
    weight[1::2] = -128
    scale = np.full(8, 1e-6, np.float32)
    tensors: dict[str, Any] = {
        "weight": weight,
        "weight_scale": scale,
        "bias": np.arange(8, dtype=np.int32),
    }
    attributes = {"stride": (1, 1), "padding": (1,) * 4, "dilation": (1, 1), "groups": 1}
    grid = Grid(1.5, 120, 8, 0, 255)
    maker.append(Node("y", "conv2d", ("x",), grid, attributes, 8, tensors))
    maker.append(Node("z", "conv2d", ("x",), None, attributes, 8, tensors))
    assert maker.values["z"].max() > 2**24 * 1e-6
    for last in ("y", "z"):
        nodes = [n for n in maker.nodes if n.name in ("x", last)]
        nodes.append(Node("logits", "flatten", (last,), nodes[-1].grid))
        model = IntegerModel(tuple(nodes), (512, 4, 4))
        check(model, maker.images, tmp_path / "model.onnx")


@pytest.mark.parametrize("exponent", [0, -10, -14, -15, -20, -30])
def test_products_are_exact_however_many_steps_they_are(exponent: int, tmp_path: Path) -> None:
    """QLinearMul lets what exceeds 31 bits wrap around."""
    source, target = Grid(1.0, 120, 8, 0, 255), Grid(2.0**exponent, 86, 8, 0, 255)
    images = np.random.default_rng(0).integers(-130, 140, (2, 1, 32, 32)).astype(np.float32)
    nodes = (
        Node("x", "quantize", (INPUT,), source),
        Node("y", "mul", ("x", "x"), target),
        Node("logits", "flatten", ("y",), target),
    )
    check(IntegerModel(nodes, (1, 32, 32)), images, tmp_path / "model.onnx")


@pytest.mark.parametrize("low", [-14, -7, -2, 0, 6])
@pytest.mark.parametrize("high", [0, 5, 12, 16, 22, 26])
def test_adds_are_exact_however_far_the_steps_lie_apart(
    low: int, high: int, tmp_path: Path
) -> None:
    """QLinearAdd rounds its constant term, and what exceeds 31 bits wraps around."""
    rng = np.random.default_rng(0)
    q = rng.integers(-300, 300, (2, 1, 64, 64)) * rng.choice([0, 1, 1], (2, 1, 64, 64))
    images = (q * np.where(np.arange(64) < 32, 2.0**low, 2.0**high)).astype(np.float32)
    cut: dict[str, Any] = {"axes": (3,), "steps": (1,)}
    for zero_points in ((0, 0, 0), rng.integers(1, 256, 3)):
        fine, coarse, target = (
            Grid(2.0**exponent, int(zero_point), 8, 0, 255)
            for exponent, zero_point in zip(
                (low, high, 0), zero_points // np.array(2) * 2, strict=True
            )
        )
        nodes = (
            Node("x", "quantize", (INPUT,), fine),
            Node("fine", "slice", ("x",), fine, {**cut, "starts": (0,), "ends": (32,)}),
            Node("y", "quantize", (INPUT,), coarse),
            Node("coarse", "slice", ("y",), coarse, {**cut, "starts": (32,), "ends": (64,)}),
            Node("sum", "add", ("fine", "coarse"), target),
            Node("logits", "flatten", ("sum",), target),
        )
        counts = check(IntegerModel(nodes, (1, 64, 64)), images, tmp_path / "model.onnx")
        assert counts["off"] == 0


def test_float_layers(tmp_path: Path) -> None:
    """W2A32 and W32A32, with everything that may lie between."""
    rng = np.random.default_rng(0)
    maker = Maker(rng, rng.normal(size=(3, 4, 12, 12)).astype(np.float32))
    last = maker.plain("clip", maker.conv(INPUT, 8, 3, padding=1, abits=None), min=0.0, max=None)
    window: dict[str, Any] = {"kernel": (3, 3), "stride": (2, 2), "padding": (1, 1)}
    last = maker.plain("max_pool2d", last, **window, dilation=(1, 1), ceil_mode=True)
    last = maker.plain("avg_pool2d", last, **window, ceil_mode=True, count_include_pad=False)
    last = maker.plain("global_avg_pool", maker.plain("add", last, last))
    last = maker.flatten(last)
    tensors = {
        "weight": rng.normal(size=(5, 8)).astype(np.float32),
        "weight_scale": np.full(5, 1.25, np.float32),
        "bias": rng.normal(size=5).astype(np.float32),
    }
    maker.append(Node("fc", "linear", (last,), None, {}, 32, tensors))
    validate(maker.model())
    save(maker.model(), tmp_path / "model.onnx")
    wanted = run(maker.model(), maker.images, keep=True)
    for optimize in (True, False):
        values = OrtRunner(tmp_path / "model.onnx", optimize=optimize).run_all(maker.images)
        assert values.keys() == wanted.keys()
        for name, value in values.items():
            np.testing.assert_allclose(value, wanted[name], rtol=1e-5, atol=1e-5)


@pytest.fixture
def small() -> IntegerModel:
    rng = np.random.default_rng(0)
    maker = Maker(rng, rng.normal(size=(2, 3, 6, 6)).astype(np.float32))
    last = maker.conv(maker.quantize(INPUT, 8), 4, 3, abits=4)
    maker.linear(maker.flatten(maker.pool("global_avg_pool", last, 8)), 2)
    model = maker.model()
    return IntegerModel(model.nodes, model.input_shape, {"model": "né", "classes": ["a", "b"]})


def test_the_same_model_gives_the_same_bytes(small: IntegerModel, tmp_path: Path) -> None:
    path = tmp_path / "folder" / "model.onnx"
    save(small, path)
    assert path.read_bytes() == to_bytes(small)
    with pytest.raises(UsageError, match="--force"):
        save(small, path)
    runner = OrtRunner(path)
    assert runner.verified
    assert runner.metadata.items() >= small.metadata.items()
    assert runner.input_shape == (3, 6, 6)
    with pytest.raises(UsageError, match=r"shape \[1, 3, 6, 7\], .* wants \[N, 3, 6, 6\]"):
        runner.run(np.zeros((1, 3, 6, 7), np.float32))


def test_no_damaged_file_loads(small: IntegerModel, tmp_path: Path) -> None:
    data, path = to_bytes(small), tmp_path / "model.onnx"
    rng = np.random.default_rng(0)
    damaged = [data[:length] for length in rng.integers(0, len(data), 200)]
    damaged += [data + b"\0", data + b"junk" * 100, data + data, b"", b"PK\3\4" * 10]
    for place in rng.integers(0, 8 * len(data), 1000):
        flipped = bytearray(data)
        flipped[place // 8] ^= 1 << (place % 8)
        damaged.append(bytes(flipped))
    for start in rng.integers(0, len(data) - 16, 200):
        damaged.append(data[:start] + bytes(16) + data[start + 16 :])
    for content in damaged:
        if content == data:
            continue
        path.write_bytes(content)
        for allow_foreign in (False, True):
            with pytest.raises(ArtifactError) as caught:
                OrtRunner(path, allow_foreign=allow_foreign)
            assert "\n" not in str(caught.value)


def foreign(initializer: TensorProto) -> onnx.ModelProto:
    graph = helper.make_graph(
        [helper.make_node("Mul", ["image", "w"], ["y"], name="scaled")],
        "other",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["n", 3, "h", "w"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3, "h", "w"])],
        initializer=[initializer],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_files_of_others_are_run_only_when_asked_for(tmp_path: Path) -> None:
    path, images = tmp_path / "other.onnx", np.ones((1, 3, 2, 5), np.float32)
    model = foreign(helper.make_tensor("w", TensorProto.FLOAT, [], [2.0]))
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ArtifactError, match="not written by mecq"):
        OrtRunner(path)
    runner = OrtRunner(path, allow_foreign=True)
    assert (runner.verified, runner.metadata, runner.input_shape) == (False, {}, (3, None, None))
    np.testing.assert_array_equal(runner.run(images), images * 2)

    stored = model.graph.initializer[0]
    stored.data_location = TensorProto.EXTERNAL
    stored.external_data.add(key="location", value="../../../etc/passwd")
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ArtifactError, match="tensors in other files"):
        OrtRunner(path, allow_foreign=True)
    model = foreign(helper.make_tensor("v", TensorProto.FLOAT, [], [2.0]))
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ArtifactError, match=r"onnxruntime .* does not accept"):
        OrtRunner(path, allow_foreign=True)
    with pytest.raises(ArtifactError, match="no such file"):
        OrtRunner(tmp_path / "missing.onnx")


@pytest.mark.parametrize("profile", PROFILES)
def test_metadata_is_json_in_the_file(small: IntegerModel, profile: str) -> None:
    proto = onnx.load_from_string(to_bytes(small, profile))
    properties = {entry.key: entry.value for entry in proto.metadata_props}
    metadata = json.loads(properties["mecq.metadata"])
    layout = {"name": "input", "layout": "NCHW", "colors": "RGB", "pixels_divided_by": 255}
    assert metadata == {**small.metadata, "profile": profile, "input": layout}
    assert len(properties["mecq.sha256"]) == 64


@pytest.mark.parametrize(("channels", "colors"), [(1, "grey"), (3, "RGB"), (4, None)])
def test_metadata_says_what_the_channels_are(channels: int, colors: str | None) -> None:
    maker = Maker(np.random.default_rng(0), np.ones((1, channels, 4, 4), np.float32))
    maker.linear(maker.flatten(maker.quantize(INPUT, 8)), 2)
    proto = to_model(maker.model())
    properties = {entry.key: entry.value for entry in proto.metadata_props}
    assert json.loads(properties["mecq.metadata"])["input"].get("colors") == colors
