"""Networks of tokens: captured as they are, exact where that is promised, trained, exported."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from mecq_cli.capture import capture
from mecq_cli.config import QuantizeConfig
from mecq_cli.entropy import as_rows
from mecq_cli.errors import ArtifactError, UsageError
from mecq_cli.events import Listener
from mecq_cli.export import onnx
from mecq_cli.insertion import BitPlan, insert
from mecq_cli.insertion.streams import float_values
from mecq_cli.integer.ir import Grid, IntegerModel, Node
from mecq_cli.integer.reference import execute
from mecq_cli.integer.validate import validate
from mecq_cli.integerize import integerize
from mecq_cli.kernels import run_node
from mecq_cli.sites import MatmulSite, ProductSite
from mecq_cli.training.family import family_of
from mecq_cli.training.integer_teacher import make_teacher
from mecq_cli.training.recipe import choose, make_optimizer
from mecq_cli.training.step import TrainingStep
from mecq_cli.training.teacher import Teacher
from tests.exactness import check, quantized, random_images
from tests.token_networks import NETWORKS, Attention, network

SHAPE = (3, 8, 8)
IMAGES = random_images(6, 8)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_float_copy_computes_what_the_model_does(name: str) -> None:
    model = network(name).eval()
    copy = Teacher(model, SHAPE, ())
    for norm in copy.modules():
        if isinstance(norm, nn.BatchNorm1d):
            norm.eval()
    with torch.no_grad():
        torch.testing.assert_close(copy(IMAGES)[0], model(IMAGES), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("bits", [(4, 4), (2, 3), (1, 1)])
@pytest.mark.parametrize("name", NETWORKS)
def test_every_integer_is_the_same_in_all_runtimes(
    name: str, bits: tuple[int, int], tmp_path: Path
) -> None:
    counts = check(quantized(network(name), BitPlan(*bits), IMAGES), IMAGES, tmp_path)
    assert counts["off"] <= 5, counts
    assert counts["alive"] > 0.75 * (counts["alive"] + counts["dead"]), counts


@pytest.mark.parametrize("plan", [BitPlan(4, 32), BitPlan(32, 4), BitPlan(4, 4, residual_bits=32)])
def test_floats_where_they_are_asked_for(plan: BitPlan, tmp_path: Path) -> None:
    for name in ("vit", "convnext"):
        check(quantized(network(name), plan, IMAGES), IMAGES, tmp_path)


def test_both_products_of_attention_are_of_integers() -> None:
    model = integerize(quantized(network("vit"), BitPlan(3, 4), IMAGES), SHAPE, {})
    grids = {node.name: node.grid for node in model.nodes}
    products = [node for node in model.nodes if node.op == "matmul"]
    assert len(products) == 6
    for scores, values in zip(products[::2], products[1::2], strict=True):
        found = [grids[name] for name in (*scores.inputs, *values.inputs)]
        assert [grid.bits for grid in found if grid is not None] == [4] * 4
        shares = found[2]
        assert shares is not None
        assert shares.zero_point == 0
        assert scores.attributes["factor"] == float(np.float32(8**-0.5))
        assert scores.grid is None
        assert values.grid is not None
    # Queries, keys and values have grids of their own.
    names = [node.name for node in model.nodes if node.op == "linear"]
    assert {"blocks.0.attn.qkv.q", "blocks.0.attn.qkv.k", "blocks.0.attn.qkv.v"} <= {*names}


def test_the_ends_have_bits_of_their_own_and_streams_of_norms_are_floats() -> None:
    model = insert(network("vit"), SHAPE, BitPlan(2, 3))
    bits = {s.name: (s.wbits, s.abits) for s in model.sites() if isinstance(s, ProductSite)}
    assert bits.pop("embed") == bits.pop("head") == (8, 8)
    assert {*bits.values()} == {(2, 3)}
    assert {s.abits for s in model.sites() if isinstance(s, MatmulSite)} == {3}
    layers = capture(network("vit"), SHAPE)
    assert {layer.name for layer in layers if layer.kind == "add"} <= float_values(layers)
    # The convolutions of a ConvNeXt read its stream, which is of integers therefore.
    layers = capture(network("convnext"), SHAPE)
    assert not {layer.name for layer in layers if layer.kind == "add"} & float_values(layers)
    heads = insert(network("mixer"), SHAPE, BitPlan(2, 2))
    assert heads.classifiers == ["head1", "head2"]


def test_a_factor_of_each_channel_is_part_of_the_layer_before_it() -> None:
    layers = {layer.name: layer for layer in capture(network("convnext"), SHAPE)}
    assert not [layer for layer in layers.values() if layer.kind == "rescale"]
    assert layers["blocks.0.3"].gain is not None
    model = network("vit")
    layers = {layer.name: layer for layer in capture(model, SHAPE)}
    gain = layers["blocks.1.mlp.2"].gain
    assert gain is not None
    assert dict(gain.named_parameters()).popitem()[1] is model.get_parameter("blocks.1.gamma")


def test_overrides_reach_attention() -> None:
    plan = BitPlan(4, 4, overrides=[("blocks.0.attn.scores", None, 8), ("*.qkv.k", 2, None)])
    model = insert(network("vit"), SHAPE, plan)
    bits = {s.name: (s.wbits, s.abits) for s in model.sites()}
    assert bits["blocks.0.attn.scores"] == (None, 8)
    assert bits["blocks.1.attn.qkv.k"] == (2, 4)


@pytest.mark.parametrize(
    ("name", "count"), [("vit", 3), ("swin", 2), ("convnext", 2), ("mixer", 2)]
)
def test_stages_are_rows_of_averaged_tokens(name: str, count: int) -> None:
    model = insert(network(name), SHAPE, BitPlan(4, 4), ("stages", "penultimate", "layers"))
    stages = insert(network(name), SHAPE, BitPlan(4, 4), ("stages",))
    assert len(stages.taps) == count
    values = model.train().graph(IMAGES)
    assert all(rows.dim() == 2 and len(rows) == len(IMAGES) for rows in values[1:])
    teacher = Teacher(network(name), SHAPE, ("stages",))
    kept: list[torch.Tensor] = []
    if name == "vit":
        model_fp = network(name)
        model_fp.get_submodule("blocks").register_forward_hook(lambda *a: kept.append(a[2]))
        model_fp(IMAGES)
        torch.testing.assert_close(teacher(IMAGES)[-1], as_rows(kept[0]), atol=1e-4, rtol=1e-3)


class Warnings(Listener):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def warn(self, text: str) -> None:
        self.texts.append(text)


def losses(name: str, what: str, heard: Listener) -> list[float]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = quantized(network(name), BitPlan(4, 4), IMAGES)
    taps = insert(network(name), SHAPE, BitPlan(4, 4), ("stages",))
    taps.load_state_dict(model.state_dict())
    plain = network(name).eval().requires_grad_(False)
    config = QuantizeConfig.model_validate({
        "model": name, "wbits": 4, "abits": 4, "data": "data", "epochs": 1, "amp": "off",
        "compile": what, "mec_weight": 0.01, "lr": 0.003,
    })  # fmt: skip
    recipe = choose(config, 3, len(IMAGES), torch.device("cpu"), family=family_of(plain))
    assert recipe.optimizer == "adamw"
    recipe = dataclasses.replace(recipe, warmup_steps=0)
    teacher = make_teacher(plain, SHAPE, ("stages",), 1, recipe, lambda: [IMAGES])
    assert isinstance(teacher, Teacher)
    optimizer, _ = make_optimizer(taps.train(), recipe)
    step = TrainingStep(taps, teacher, recipe, optimizer, heard)
    return [step(IMAGES, torch.arange(6), i).total for i in range(3)]


def test_training_goes_down_and_compiled_quantizers_are_the_same() -> None:
    heard = Warnings()
    plain = losses("vit", "off", heard)
    assert plain[-1] < plain[0]
    compiled = losses("vit", "quantizers", heard)
    assert compiled[:2] == pytest.approx(plain[:2], rel=2e-3)
    # By then values lie on halves of steps that were halved: a last digit turns some of them.
    assert compiled[2] == pytest.approx(plain[2], rel=1e-2)
    assert not heard.texts


@pytest.mark.long
@pytest.mark.parametrize("name", NETWORKS)
def test_a_compiled_network_of_tokens_trains_as_a_plain_one(name: str) -> None:
    heard = Warnings()
    plain = losses(name, "off", heard)
    assert losses(name, "model", heard) == pytest.approx(plain, rel=1e-2)
    assert not heard.texts


@pytest.mark.parametrize("reach", [(15, 15, 200), (255, 255, 300)])
@pytest.mark.parametrize("bits", [None, 8, 3])
def test_products_of_values_are_exact(reach: tuple[int, int, int], bits: int | None) -> None:
    """Against integers of 64 bits, with sums that float32 does not hold too."""
    left, right, depth = reach
    random = np.random.default_rng(0)
    a = random.integers(0, left + 1, (2, 3, 5, depth)).astype(np.uint8)
    b = random.integers(0, right + 1, (2, 3, depth, 7)).astype(np.uint8)
    first = Grid(float(np.float32(0.013)), 3, 8, 0, left)
    second = Grid(float(np.float32(0.7)), 7, 8, 0, right)
    target = None if bits is None else Grid(float(np.float32(9.1)), 2, bits, 0, 2**bits - 1)
    factor = float(np.float32(0.3))
    node = Node("m", "matmul", ("a", "b"), target, {"factor": factor})
    acc = np.matmul(a.astype(np.int64) - 3, b.astype(np.int64) - 7).astype(np.float32)
    scale = np.float32(np.float32(first.scale) * np.float32(factor)) * np.float32(second.scale)
    wanted = acc * scale
    if target is not None:
        steps = np.rint(acc * (scale / np.float32(target.scale))) + 2
        wanted = np.clip(steps, 0, target.qmax)
    grids = [first, second]
    np.testing.assert_array_equal(execute(node, [a, b], grids), wanted)
    tensors = [torch.from_numpy(x.astype(np.float32)) for x in (a, b)]
    np.testing.assert_array_equal(run_node(node, tensors, grids).numpy(), wanted)


class Causal(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)
        return y.mean((1, 2))


class Mixed(nn.Module):
    """Reads the other images of its batch."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention(8, 2)
        self.head = nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.flatten(2)[:, :, :8].permute(1, 0, 2).reshape(-1, 3, 8)
        logits: torch.Tensor = self.head(self.attention(y).mean(1))
        return logits


@pytest.mark.parametrize(
    ("module", "message"), [(Causal(), "causal"), (Mixed(), "would mix images")]
)
def test_what_is_not_supported_is_named(module: nn.Module, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        capture(module, SHAPE)
    assert "\n" not in str(caught.value)


def test_a_profile_that_cannot_hold_it_says_so() -> None:
    model = integerize(quantized(network("vit"), BitPlan(4, 4), IMAGES), SHAPE, {})
    with pytest.raises(ArtifactError, match="as QONNX"):
        onnx.to_bytes(model, "qonnx")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"op": "layer_norm", "attributes": {"eps": 0.0}}, "eps"),
        ({"op": "layer_norm", "attributes": {"eps": 1e-5}, "tensors": {}}, "tensors must be"),
        ({"op": "softmax", "tensors": {"weight": np.ones(4, np.float32)}}, "tensors must be"),
        ({"op": "reshape", "attributes": {"shape": (5,)}}, "shape"),
        ({"op": "transpose", "attributes": {"axes": (1, 1, 2)}}, "axes"),
        ({"op": "roll", "attributes": {"axes": (4,), "shifts": (1,)}}, "no axis 4"),
        ({"op": "matmul", "attributes": {"factor": 0.1}}, "inputs"),
        ({"op": "constant", "tensors": {"value": np.full(3, np.nan, np.float32)}}, "finite"),
    ],
)
def test_a_damaged_operation_is_refused(change: dict[str, object], message: str) -> None:
    tensors = {"weight": np.ones(4, np.float32), "bias": np.zeros(4, np.float32)}
    fields = {
        "attributes": {},
        "tensors": tensors if change["op"] == "layer_norm" else {},
        **change,
    }
    node = Node("x", inputs=("input",), grid=None, **fields)  # type: ignore[arg-type]
    with pytest.raises(ArtifactError, match=message):
        validate(IntegerModel((node,), (2, 3, 4), {}))
