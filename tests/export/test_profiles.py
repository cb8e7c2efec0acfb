"""The other profiles of ONNX files, each one in the runtime it is meant for."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper
from torch import Tensor, nn

from mecq_cli.calibration import calibrate
from mecq_cli.errors import EnvironmentFailure, VerificationError
from mecq_cli.export.onnx import save, to_model
from mecq_cli.export.ort import OrtRunner
from mecq_cli.export.qonnx import QonnxRunner, to_integers
from mecq_cli.export.qonnx_builder import DOMAIN
from mecq_cli.insertion import BitPlan, insert
from mecq_cli.integer.ir import INPUT, Grid, IntegerModel, Node
from mecq_cli.integer.reference import run
from mecq_cli.integerize import integerize
from mecq_cli.replay import Way, replay
from tests.integer.random_models import Maker, integer_models, resnet18

SUITE = settings(
    deadline=None,
    database=None,
    derandomize=True,
    max_examples=60,
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture
def qonnx() -> Any:
    """The package that defines the operators."""
    return pytest.importorskip("qonnx", reason="needs the extra: pip install 'mecq[qonnx]'")


def portable(model: IntegerModel, images: NDArray[np.float32], path: Path) -> OrtRunner:
    """Every integer and every logit of optimized onnxruntime is the reference's."""
    save(model, path, profile="portable", force=True)
    runner = OrtRunner(path, threads=1)
    plain = OrtRunner(path, optimize=False, threads=1)
    ways = [Way("ort", runner.run_all, True), Way("plain", plain.run_all, False)]
    replay(model, ways, [images]).require("portable")
    np.testing.assert_array_equal(runner.run(images), run(model, images))
    return runner


def by_qonnx(model: IntegerModel, images: NDArray[np.float32], path: Path) -> Counter[str]:
    """Every integer is at most one step from the reference's; how many there are, and how many."""
    save(model, path, profile="qonnx", force=True)
    runner = QonnxRunner(path)
    way = Way("qonnx", lambda x: to_integers(model, runner.run_all(x), "test"), False)
    found = replay(model, [way], [images])
    found.require("qonnx")
    total = found.total("qonnx")
    return Counter(all=total.values, off=total.differing)


def test_random_models_are_portable(tmp_path: Path) -> None:
    @SUITE
    @given(integer_models())
    def compare(maker: Maker) -> None:
        portable(maker.model(), maker.images, tmp_path / "model.onnx")

    compare()


def check_random_qonnx(examples: settings, path: Path) -> None:
    counts: Counter[str] = Counter()

    @examples
    @given(integer_models())
    def compare(maker: Maker) -> None:
        counts.update(by_qonnx(maker.model(), maker.images, path))

    compare()
    assert counts["off"] <= 3 + 1e-5 * counts["all"], counts


def test_random_models_agree_in_qonnx(qonnx: Any, tmp_path: Path) -> None:
    check_random_qonnx(SUITE, tmp_path / "model.onnx")


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_many_random_models_agree_in_qonnx(qonnx: Any, tmp_path: Path) -> None:
    check_random_qonnx(settings(SUITE, max_examples=2000, derandomize=False), tmp_path / "m.onnx")


class Moving(nn.Module):
    """What is moved in two steps, and a linear layer on tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3), nn.Linear(6, 4)
        self.inner = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(torch.relu(self.stem(x)), size=(13, 11))
        x = torch.roll(x, (3, -2), (2, 3)).flatten(2).transpose(1, 2)
        logits: Tensor = self.head(self.inner(x).mean(1))
        return logits


def test_tokens_and_what_moves_in_two_steps_agree_in_qonnx(qonnx: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    images = torch.randn(2, 3, 10, 10)
    network = insert(Moving().eval(), (3, 10, 10), BitPlan(4, 4))
    calibrate(network, [images], 1)
    counts = by_qonnx(integerize(network.eval(), (3, 10, 10), {}), images.numpy(), tmp_path / "m")
    assert counts["off"] <= 1


def test_a_portable_resnet18_is_plain_and_fused(tmp_path: Path) -> None:
    """Nothing of it is newer than opset 13, and onnxruntime still finds its integer kernels."""
    rng = np.random.default_rng(0)
    model = resnet18(rng, wbits=2, abits=2, size=64)
    images = rng.normal(size=(2, 3, 64, 64)).astype(np.float32)
    runner = portable(model, images, tmp_path / "portable.onnx")
    kernels = runner.kernels()
    expected = {"QLinearConv": 20, "QLinearAdd": 8, "QLinearGlobalAveragePool": 1, "QGemm": 1}
    assert expected.items() <= kernels.items()
    assert not {"Conv", "Add", "Gemm", "Cast", "Mul"} & kernels.keys()

    proto = onnx.load(tmp_path / "portable.onnx")
    assert (proto.ir_version, [o.version for o in proto.opset_import]) == (7, [13])
    stored = {tensor.name: tensor for tensor in proto.graph.initializer}
    plain = {"FLOAT", "INT8", "UINT8", "INT32", "INT64"}
    assert {TensorProto.DataType.Name(t.data_type) for t in stored.values()} <= plain
    assert not {"Cast", "ConstantOfShape"} & {node.op_type for node in proto.graph.node}
    assert proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    for node in model.nodes:
        if node.weight_bits:
            weight = numpy_helper.to_array(stored[f"{node.name}::weight"])
            scale = numpy_helper.to_array(stored[f"{node.name}::weight_scale"])
            assert weight.dtype == np.int8
            assert node.weight_bits == 8 or np.abs(weight).max() <= 64
            lowest = weight.reshape(len(weight), -1).min(1)
            assert ((scale > 0) | (lowest == -128)).all()
            assert (node.tensors["weight_scale"] < 0).any()


def test_a_sign_that_int8_cannot_hold_stays_in_the_scale(tmp_path: Path) -> None:
    maker = Maker(np.random.default_rng(0), np.ones((2, 4, 3, 3), np.float32))
    maker.flatten(maker.conv(maker.quantize(INPUT, 8), 6, 3, wbits=8))
    for node in maker.nodes:
        if node.weight_bits:
            np.clip(node.tensors["weight"], -127, 127, out=node.tensors["weight"])
            node.tensors["weight"][:3] = -128
            node.tensors["weight_scale"][:] = [-0.01, 0.01, -0.02, -0.01, -0.01, 0.02]
    images = np.random.default_rng(1).normal(size=(8, 4, 3, 3)).astype(np.float32)
    portable(maker.model(), images, tmp_path / "model.onnx")
    stored = {t.name: t for t in onnx.load(tmp_path / "model.onnx").graph.initializer}
    [scale] = [numpy_helper.to_array(t) for n, t in stored.items() if n.endswith("weight_scale")]
    np.testing.assert_array_equal(np.sign(scale), [-1, 1, -1, 1, 1, 1])


def test_the_quantizers_of_qonnx_say_what_the_bits_are(qonnx: Any, tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    maker = Maker(rng, rng.normal(size=(4, 3, 8, 8)).astype(np.float32))
    maker.tight = 0.0
    last = maker.quantize(INPUT, 8)
    for wbits, abits in ((1, 2), (2, 3), (3, 1), (8, 4)):
        last = maker.conv(last, 4, 3, padding=1, wbits=wbits, abits=abits, relu=True)
    last = maker.conv(last, 4, 3, padding=1, wbits=4, abits=5)
    maker.linear(maker.flatten(last), 3)
    model = maker.model()
    assert by_qonnx(model, maker.images, tmp_path / "model.onnx")["off"] <= 3

    proto = onnx.load(tmp_path / "model.onnx")
    assert {o.domain: o.version for o in proto.opset_import} == {"": 13, DOMAIN: 1}
    stored = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}
    custom = {node.name: node for node in proto.graph.node if node.domain == DOMAIN}
    for node in model.nodes:
        if node.weight_bits:
            weight = custom[f"{node.name}::weight_quantized"]
            assert (stored[weight.input[1]] > 0).all()
            if node.weight_bits == 1:
                assert weight.op_type == "BipolarQuant"
                continue
            assert float(stored[weight.input[3]]) == node.weight_bits
            signed = {a.name: a.i for a in weight.attribute if a.name in ("signed", "narrow")}
            assert signed == {"signed": 1, "narrow": 0}
        if node.grid is not None and node.op != "flatten":
            quant = custom[node.name]
            assert float(stored[quant.input[3]]) == node.grid.bits
            assert float(stored[quant.input[1]]) == np.float32(node.grid.scale)
            if node.grid.zero_point == 0:
                assert float(stored[quant.input[2]]) == 0


def test_the_tools_of_qonnx_take_the_file(qonnx: Any, tmp_path: Path) -> None:
    """Its own clean-up, which its compilers begin with, keeps every bit of the logits."""
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.core.onnx_exec import execute_onnx
    from qonnx.util.cleanup import cleanup_model

    rng = np.random.default_rng(4)
    maker = Maker(rng, rng.normal(size=(1, 3, 8, 8)).astype(np.float32))
    last = maker.conv(maker.quantize(INPUT, 8), 4, 3, wbits=2, abits=8, power_of_two=True)
    last = maker.add(last, maker.conv(last, 4, 1, abits=8, power_of_two=True), relu=True)
    maker.linear(maker.flatten(maker.pool("global_avg_pool", last, 8)), 3)
    path = tmp_path / "model.onnx"
    save(maker.model(), path, profile="qonnx")
    wrapper = ModelWrapper(str(path))
    logits = execute_onnx(wrapper, {"input": maker.images})["logits"]
    clean = cleanup_model(wrapper, extract_conv_bias=True)
    [output] = execute_onnx(clean, {clean.graph.input[0].name: maker.images}).values()
    np.testing.assert_allclose(output, logits, rtol=1e-5)
    np.testing.assert_array_equal(logits, QonnxRunner(path).run(maker.images))


@pytest.mark.parametrize("zero_point", [12, 13])
def test_halves_round_to_even_in_qonnx_too(qonnx: Any, tmp_path: Path, zero_point: int) -> None:
    """A quarter of the means of 2x2 integers are halves, as are all odd ones of half the scale."""
    grid = Grid(float(np.float32(0.0371)), zero_point, 8, 0, 255)
    coarse = Grid(2 * grid.scale, zero_point, 8, 0, 255)
    images = np.random.default_rng(0).normal(size=(4, 8, 12, 12)).astype(np.float32)
    window = {"kernel": (2, 2), "stride": (2, 2), "padding": (0, 0)}
    attributes = {**window, "ceil_mode": False, "count_include_pad": True}
    nodes = (
        Node("x", "quantize", (INPUT,), grid),
        Node("half", "requantize", ("x",), coarse),
        Node("mean", "avg_pool2d", ("half",), coarse, attributes),
        Node("means", "global_avg_pool", ("mean",), coarse),
        Node("y", "flatten", ("means",), coarse),
    )
    counts = by_qonnx(IntegerModel(nodes, (8, 12, 12)), images, tmp_path / "model.onnx")
    assert counts["off"] == 0


def test_numbers_beside_the_grid_are_found() -> None:
    grid = Grid(0.5, 1, 2, 0, 3)
    model = IntegerModel((Node("x", "quantize", (INPUT,), grid),), (1, 1, 1))
    values = {"x": np.array([-0.5, 0.0, 1.0], np.float32)}
    np.testing.assert_array_equal(to_integers(model, values, "f")["x"], [0, 1, 3])
    values["x"][1] = 0.01
    with pytest.raises(VerificationError, match="layer x puts out numbers that do not lie on"):
        to_integers(model, values, "f")


def test_without_the_package_the_command_to_install_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    maker = Maker(np.random.default_rng(0), np.ones((1, 1, 4, 4), np.float32))
    maker.flatten(maker.quantize(INPUT, 8))
    save(maker.model(), tmp_path / "model.onnx", profile="qonnx")
    assert to_model(maker.model(), "qonnx").graph.node
    for name in [name for name in sys.modules if name.partition(".")[0] == "qonnx"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "qonnx", None)
    with pytest.raises(EnvironmentFailure, match=r"pip install 'mecq\[qonnx\]'") as caught:
        QonnxRunner(tmp_path / "model.onnx")
    assert "\n" not in str(caught.value)
