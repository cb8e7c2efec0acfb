"""Each rule of the integer model, broken on its own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mecq_cli.errors import ArtifactError
from mecq_cli.integer.ir import Grid, IntegerModel, Node
from mecq_cli.integer.operations import RULES, Value
from mecq_cli.integer.validate import validate

GRID = Grid(0.5, 1, 4, 0, 15)
OTHER = Grid(0.25, 1, 4, 0, 15)
EVEN = Grid(0.5, 2, 4, 0, 15)
CODES = Grid(0.5, 0, 2, 0, 3)
CONV: dict[str, Any] = {"stride": (2, 2), "padding": (0, 1, 1, 0), "dilation": (1, 1), "groups": 1}
POOL: dict[str, Any] = {"kernel": (3, 3), "stride": (2, 2), "padding": (1, 1), "ceil_mode": True}
CUT: dict[str, Any] = {"axes": (1, 2), "starts": (0, -3), "ends": (2**63 - 1, 4), "steps": (2, 1)}


def tensors(*shape: int) -> dict[str, Any]:
    return {
        "weight": np.ones(shape, np.int8),
        "weight_scale": np.ones(shape[0], np.float32),
        "bias": np.zeros(shape[0], np.int32),
    }


ONES = np.ones((6, 4, 3, 3), np.int8)


def changed(**others: Any) -> dict[str, Any]:
    return {**tensors(*ONES.shape), **others}


def model(*nodes: Node) -> IntegerModel:
    """An image [4, 5, 5] on a grid, the nodes, and what makes logits of the last one."""
    first = Node("x", "quantize", ("input",), GRID)
    grid = nodes[-1].grid
    last = Node("y", "flatten", (nodes[-1].name,), grid)
    return IntegerModel((first, *nodes, last), (4, 5, 5))


def conv(**changes: Any) -> Node:
    node = Node("c", "conv2d", ("x",), OTHER, CONV, 2, tensors(6, 4, 3, 3))
    return replace(node, **changes)


def node(op: str, *inputs: str, grid: Grid | None = GRID, **attributes: Any) -> Node:
    return Node("n", op, inputs, grid, attributes)


F = Node("f", "dequantize", ("x",), None)


@pytest.mark.parametrize(
    "nodes",
    [
        (conv(),),
        (conv(grid=None),),
        (conv(attributes={**CONV, "groups": 2}, tensors=tensors(6, 2, 3, 3)),),
        (F, conv(inputs=("f",), grid=None, tensors=changed(bias=np.ones(6, "f4")))),
        (node("add", "x", "x", grid=EVEN),),
        (F, node("add", "f", "f", grid=None)),
        (F, node("clip", "f", grid=None, min=0.0, max=6.0)),
        (F, node("clip", "f", grid=None, min=0.0, max=None)),
        (node("max_pool2d", "x", **POOL, dilation=(1, 1)),),
        (node("avg_pool2d", "x", **POOL, count_include_pad=False),),
        (F, node("avg_pool2d", "f", grid=None, **POOL, count_include_pad=False)),
        (node("global_avg_pool", "x", grid=OTHER),),
        (node("global_avg_pool", "x", grid=None),),
        (node("concat", "x", "x", "x"),),
        (node("slice", "x", **CUT),),
        (node("pad", "x", before=(1, 0, 0), after=(1, 0, 2)),),
        (node("requantize", "x", grid=OTHER),),
        (node("threshold", "x", grid=CODES, thresholds=(1, 1, 256)),),
    ],
)  # fmt: skip
def test_what_the_table_allows_is_valid(nodes: tuple[Node, ...]) -> None:
    validate(model(*nodes))


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (node("erf", "x"), "unknown operation"),
        (node("requantize", "z"), "input 'z' is not an earlier node"),
        (node("requantize", "n"), "input 'n' is not an earlier node"),
        (node("requantize"), "0 inputs are given, it takes 1"),
        (node("add", "x"), "1 inputs are given, it takes 2"),
        (node("add", "x", "input"), "all float or all integers"),
        (node("add", "x", "x", grid=None), "its output must be integers"),
        (node("quantize", "x"), "its inputs must be float"),
        (node("requantize", "x", grid=None), "its output must be integers"),
        (node("flatten", "x", grid=OTHER), "scale and zero point of every input"),
        (node("flatten", "x", grid=None), "its output must be integers"),
        (node("flatten", "input", grid=GRID), "its output must be float"),
        (node("flatten", "x", axis=1), "the attributes must be: none"),
        (replace(node("flatten", "x"), name="x"), "used twice"),
        (replace(node("flatten", "x"), name="input"), "used twice"),
        (replace(node("flatten", "x"), name="a\nb"), "printable"),
        (replace(node("flatten", "x"), weight_bits=2), "has no weights"),
        (node("requantize", "x", grid=replace(GRID, qmax=16)), "do not go together"),
        (node("requantize", "x", grid=replace(GRID, bits=9)), "do not go together"),
        (node("requantize", "x", grid=replace(GRID, qmin=2, qmax=1)), "do not go together"),
        (node("requantize", "x", grid=replace(GRID, zero_point=256)), "0 to 255"),
        (node("requantize", "x", grid=replace(GRID, scale=0.0)), "the scale 0.0 is not"),
        (node("requantize", "x", grid=replace(GRID, scale=float("nan"))), "the scale nan is not"),
        (node("requantize", "x", grid=replace(GRID, scale=0.1)), "not a float32 number"),
        (node("add", "x", "x", grid=replace(EVEN, scale=0.75)), "not a power of two"),
        (node("add", "x", "x"), "zero point 1 is odd"),
        (node("concat", "x", "x", grid=OTHER), "scale and zero point of every input"),
        (node("clip", "input", grid=None, min=1.0, max=0.0), "min 1.0 is more than max 0.0"),
        (node("clip", "input", grid=None, min=None, max=0.0), "min cannot be None"),
        (node("max_pool2d", "x", **POOL), "the attributes must be"),
        (node("max_pool2d", "x", **{**POOL, "kernel": (9, 9)}, dilation=(1, 1)), "does not fit"),
        (node("max_pool2d", "x", **{**POOL, "padding": (2, 2)}, dilation=(1, 1)), "more than half"),
        (node("max_pool2d", "x", **{**POOL, "stride": (0, 1)}, dilation=(1, 1)), "stride cannot"),
        (node("max_pool2d", "x", **{**POOL, "ceil_mode": 1}, dilation=(1, 1)), "ceil_mode cannot"),
        (node("slice", "x", **{**CUT, "axes": (0, 1)}), "axes cannot be"),
        (node("slice", "x", **{**CUT, "axes": (1, 4)}), "has no axis 4"),
        (node("slice", "x", **{**CUT, "axes": (1, 1)}), "each axis once"),
        (node("slice", "x", **{**CUT, "starts": (5, 5)}), "would have the shape"),
        (node("pad", "x", before=(2**16, 2**16, 2**16), after=(0, 0, 0)), "would have the shape"),
        (node("threshold", "x", grid=CODES, thresholds=(1, 3, 2)), "do not ascend"),
        (node("threshold", "x", grid=CODES, thresholds=(1, 2)), "2 thresholds .* take 3"),
        (node("threshold", "x", grid=CODES, thresholds=(1, 2, 3, 4)), "4 thresholds .* take 3"),
        (node("threshold", "x", grid=CODES, thresholds=(0, 2, 3)), "thresholds cannot be"),
        (node("threshold", "x", grid=CODES, thresholds=(1, 2, 257)), "thresholds cannot be"),
        (node("threshold", "x", grid=CODES, thresholds=(1, 2, 3.0)), "thresholds cannot be"),
        (node("threshold", "x", grid=CODES, thresholds=()), "thresholds cannot be"),
        (node("threshold", "x", grid=CODES), "the attributes must be: thresholds"),
        (node("threshold", "input", grid=CODES, thresholds=(1, 2, 3)), "its inputs must be integ"),
        (node("threshold", "x", "x", grid=CODES, thresholds=(1, 2, 3)), "it takes 1"),
        (node("threshold", "x", grid=None, thresholds=(1, 2, 3)), "its output must be integers"),
        (node("threshold", "x", grid=replace(CODES, qmax=2), thresholds=(1, 2, 3)), "the range"),
        (node("threshold", "x", grid=replace(CODES, qmin=1), thresholds=(1, 2, 3)), "the range"),
        (node("threshold", "x", grid=replace(CODES, zero_point=2), thresholds=(1, 2, 3)), "be 0"),
        (node("threshold", "x", grid=Grid(1.0, 0, 5, 0, 31), thresholds=(1, 2, 3)), "most 4 bits"),
        (node("requantize", "x", grid=Grid(1.0, 3, 2, 0, 6, 2)), "is made by a threshold"),
        (node("flatten", "x", grid=Grid(1.0, 3, 2, 0, 6, 2)), "is made by a threshold"),
        (conv(tensors=tensors(6, 3, 3, 3)), "does not fit 4 channels"),
        (conv(attributes={**CONV, "groups": 4}, tensors=tensors(6, 1, 3, 3)), "does not fit"),
        (conv(attributes={**CONV, "groups": True}), "groups cannot be True"),
        (conv(attributes={**CONV, "padding": (1, 1)}), "padding cannot be"),
        (conv(attributes={**CONV, "dilation": (9, 9)}), "would have the shape"),
        (conv(attributes={**CONV, "padding": (2**16, 0, 0, 2**16)}), "padded input is too large"),
        (node("adaptive_avg_pool2d", "x", size=(2**16, 2**16)), "would have the shape"),
        (node("avg_pool2d", "x", **{**POOL, "padding": (2, 1)}, count_include_pad=True), "half of"),
        (
            node(
                "max_pool2d", "x", kernel=(2, 2), stride=(1, 1), padding=(2, 0), dilation=(4, 4),
                ceil_mode=False,
            ),
            "padding 2 is more than half of the kernel 2",
        ),
        (node("add", "x", "x", grid=replace(EVEN, scale=2.0**-42)), "too far apart"),
        (conv(tensors=changed(weight_scale=np.full(6, 2.0**92, "f4"))), "factor of unusual size"),
        (
            conv(
                grid=replace(OTHER, scale=2.0**-60),
                tensors=changed(weight_scale=np.full(6, 2.0**40, "f4")),
            ),
            "factor of unusual size",
        ),
        (node("global_avg_pool", "x", grid=replace(OTHER, scale=2.0**-95)), "of unusual size"),
        (conv(tensors={}), "the tensors must be"),
        (conv(tensors=changed(bias=np.zeros(6, "f4"))), "must be .*'int32'"),
        (conv(tensors=changed(bias=np.zeros(5, "i4"))), "one value for each"),
        (conv(tensors=changed(bias=np.full(6, 2**31 - 9, "i4"))), "overflow"),
        (conv(tensors=changed(weight_scale=np.zeros(6, "f4"))), "is zero"),
        (conv(tensors=changed(weight=ONES * 2)), "-2 to 1"),
        (conv(weight_bits=1, tensors=changed(weight=ONES * 0)), r"-1 and \+1"),
        (conv(weight_bits=9), "1 to 8 or 32, not 9"),
        (conv(weight_bits=32), "float weights need a float input"),
        (conv(inputs=("input",)), "its output must be float"),
        (Node("n", "linear", ("x",), None, {}, 2, tensors(6, 100)), "does not fit integers"),
    ],
)  # fmt: skip
def test_what_it_does_not_allow_is_named(broken: Node, message: str) -> None:
    with pytest.raises(ArtifactError, match=message) as caught:
        validate(model(broken))
    assert "\n" not in str(caught.value)
    assert repr(broken.name) in str(caught.value)


def test_the_model_as_a_whole() -> None:
    good = model(conv())
    with pytest.raises(ArtifactError, match="no nodes"):
        validate(replace(good, nodes=()))
    with pytest.raises(ArtifactError, match="input_shape"):
        validate(replace(good, input_shape=(3, 2**20, 2**20)))
    for shape in ((4, 6), (2, 1, 2, 6)):  # no class is left beside four numbers; too many axes
        tokens = Node("t", "reshape", ("c",), OTHER, {"shape": shape})
        with pytest.raises(ArtifactError, match=r"yield logits \[N, classes\]"):
            validate(replace(good, nodes=(*good.nodes[:-1], tokens)))
    anchors = replace(
        good, nodes=(*good.nodes[:-1], Node("t", "reshape", ("c",), OTHER, {"shape": (6, 4)}))
    )
    validate(replace(anchors, metadata={"classes": ["a", "b"]}))
    with pytest.raises(ArtifactError, match="must name 2 classes"):
        validate(replace(anchors, metadata={"classes": [*"abcdef"]}))
    with pytest.raises(ArtifactError, match="must name 24 classes"):
        validate(replace(good, metadata={"classes": ["a", "b"]}))


@pytest.mark.parametrize("size", range(1, 12))
@pytest.mark.parametrize("ceil_mode", [False, True])
def test_pooling_counts_windows_as_torch_does(size: int, ceil_mode: bool) -> None:
    torch = pytest.importorskip("torch")
    for kernel, stride, padding in [
        (1, 1, 0),
        (2, 2, 0),
        (3, 2, 1),
        (2, 3, 1),
        (3, 1, 1),
        (4, 3, 2),
    ]:
        if kernel > size + 2 * padding:
            continue
        settings = {"kernel": kernel, "stride": stride, "padding": padding}
        attributes: dict[str, Any] = {name: (value, value) for name, value in settings.items()}
        n = node("avg_pool2d", "x", **attributes, ceil_mode=ceil_mode, count_include_pad=True)
        shape = RULES["avg_pool2d"].shape(n, [Value((1, size, size), GRID)])
        expected = torch.nn.functional.avg_pool2d(
            torch.zeros(1, 1, size, size), kernel, stride, padding, ceil_mode
        )
        assert shape == tuple(expected.shape[1:])
