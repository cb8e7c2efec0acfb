"""Random integer models whose grids fit what really flows through them.

`Maker` appends operations one by one and executes each on a few random images, so that the
scale of the next grid can be taken from the values. `integer_models` draws whole networks.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from mecq_cli.integer.ir import INPUT, MOST_THRESHOLD_BITS, Grid, IntegerModel, Node
from mecq_cli.integer.reference import execute

METADATA = {"model": "random", "wbits": 2, "abits": 2}


class Maker:
    def __init__(self, rng: np.random.Generator, images: NDArray[np.float32]) -> None:
        self.rng = rng
        self.images = images
        self.bias_reach = [0.1, 1.0, 100.0]  # in typical sums of products
        self.tight = 0.2  # share of grids that clip more than their bits do
        self.nodes: list[Node] = []
        self.values: dict[str, NDArray[Any]] = {INPUT: images}
        self.grids: dict[str, Grid | None] = {INPUT: None}

    def model(self) -> IntegerModel:
        _, channels, height, width = self.images.shape
        return IntegerModel(tuple(self.nodes), (channels, height, width), METADATA)

    def append(self, node: Node) -> str:
        grids = [self.grids[name] for name in node.inputs]
        self.values[node.name] = execute(node, [self.values[name] for name in node.inputs], grids)
        self.grids[node.name] = node.grid
        self.nodes.append(node)
        return node.name

    def name(self, op: str) -> str:
        return f"{op}.{len(self.nodes)}"

    def shape(self, name: str) -> tuple[int, ...]:
        return self.values[name].shape[1:]

    def grid(
        self,
        values: NDArray[Any],
        bits: int,
        *,
        relu: bool = False,
        even: bool = False,
        power_of_two: bool = False,
    ) -> Grid:
        """A grid that clips a little of the values."""
        top = 2**bits - 1
        values = np.asarray(values, np.float64)
        if relu:
            zero_point, extent = 0, float(np.quantile(values, 0.98)) / top
        else:
            zero_point = int(self.rng.integers(0, top + 1))
            zero_point -= zero_point % 2 if even else 0
            extent = float(np.quantile(np.abs(values), 0.98)) / max(top - zero_point, zero_point)
        scale = np.float32(max(extent, 1e-4) * self.rng.uniform(0.7, 1.3))
        if power_of_two:
            scale = np.float32(2.0 ** np.clip(np.round(np.log2(scale)), -30, 30))
        qmin, qmax = 0, top
        if self.rng.random() < self.tight:  # such as ReLU6, or a ReLU on a signed grid
            qmin = min(zero_point, top - 1)
        if self.rng.random() < self.tight:
            qmax = int(self.rng.integers(qmin + 1, top + 1))
        return Grid(float(scale), zero_point, bits, qmin, qmax)

    def floats(self, name: str) -> NDArray[Any]:
        grid = self.grids[name]
        assert grid is not None
        return (self.values[name].astype(np.float64) - grid.zero_point) * grid.scale

    def quantize(self, source: str, bits: int, **kind: bool) -> str:
        name = self.name("quantize")
        grid = self.grid(self.values[source], bits, **kind)
        return self.append(Node(name, "quantize", (source,), grid))

    def requantize(self, source: str, bits: int, **kind: bool) -> str:
        grid = self.grid(self.floats(source), bits, **kind)
        return self.append(Node(self.name("requantize"), "requantize", (source,), grid))

    def threshold(self, source: str, bits: int, target: Grid | None = None) -> str:
        """Uneven ones, some equal or out of reach now and then; to any grid or ``target``."""
        grid = self.grids[source]
        assert grid is not None
        codes = 2**bits
        top = min(grid.qmax + 2, 256)
        thresholds = sorted(int(t) for t in self.rng.integers(1, top + 1, codes - 1))
        if target is None:
            spacing = int(self.rng.integers(1, 3))
            zero_point = 2 * int(self.rng.integers(0, codes - 1)) + 1 if spacing == 2 else 0
            scale = float(np.float32(self.rng.uniform(0.5, 2.0) / codes))
            target = Grid(scale, zero_point, bits, 0, spacing * (codes - 1), spacing)
        name = self.name("threshold")
        return self.append(Node(name, "threshold", (source,), target, {"thresholds": thresholds}))

    def weighted(
        self,
        op: str,
        source: str,
        shape: tuple[int, ...],
        wbits: int,
        abits: int | None,
        attributes: dict[str, Any] | None = None,
        **kind: bool,
    ) -> str:
        """conv2d or linear; ``abits`` None for a float output."""
        rng, outputs = self.rng, shape[0]
        half = 2 ** (wbits - 1)
        weight = np.rint(rng.normal(size=shape) * half / 2).clip(-half, half - 1)
        weight = weight if wbits > 1 else rng.choice([-1, 1], shape)
        weight_scale = rng.uniform(1.0, 4.0, outputs) / half / np.sqrt(np.prod(shape[1:]))
        weight_scale *= rng.choice([-1, 1], outputs)
        tensors: dict[str, NDArray[Any]] = {
            "weight": weight.astype(np.int8),
            "weight_scale": weight_scale.astype(np.float32),
        }
        if self.grids[source] is None:
            tensors["bias"] = rng.normal(size=outputs).astype(np.float32)
        else:
            reach = half * np.sqrt(np.prod(shape[1:])) * rng.choice(self.bias_reach, outputs)
            tensors["bias"] = np.rint(reach * rng.normal(size=outputs)).astype(np.int32)
        node = Node(self.name(op), op, (source,), None, attributes or {}, wbits, tensors)
        if abits is None:
            return self.append(node)
        values = execute(node, [self.values[source]], [self.grids[source]])
        return self.append(replace(node, grid=self.grid(values, abits, **kind)))

    def conv(
        self,
        source: str,
        outputs: int,
        kernel: int,
        *,
        stride: int = 1,
        padding: int | tuple[int, ...] = 0,
        dilation: int = 1,
        groups: int = 1,
        wbits: int = 2,
        abits: int | None = 8,
        **kind: bool,
    ) -> str:
        attributes = {
            "stride": (stride, stride),
            "padding": (padding,) * 4 if isinstance(padding, int) else padding,
            "dilation": (dilation, dilation),
            "groups": groups,
        }
        shape = (outputs, self.shape(source)[0] // groups, kernel, kernel)
        return self.weighted("conv2d", source, shape, wbits, abits, attributes, **kind)

    def linear(self, source: str, outputs: int, *, wbits: int = 8, abits: int | None = None) -> str:
        """Float output where ``abits`` is None."""
        return self.weighted("linear", source, (outputs, *self.shape(source)), wbits, abits)

    def add(self, first: str, second: str, **kind: bool) -> str:
        """Both on grids with powers of two for scales."""
        total = self.floats(first) + self.floats(second)
        grid = self.grid(total, 8, even=True, power_of_two=True, **kind)
        return self.append(Node(self.name("add"), "add", (first, second), grid))

    def mul(self, first: str, second: str, **kind: bool) -> str:
        """Both on grids with powers of two for scales; an axis of length 1 is repeated."""
        product = self.floats(first) * self.floats(second)
        grid = self.grid(product, 8, even=True, power_of_two=True, **kind)
        return self.append(Node(self.name("mul"), "mul", (first, second), grid))

    def lookup(self, source: str, bits: int) -> str:
        """Any table at all, or that of a function."""
        grid = self.grid(self.rng.normal(size=100), bits)
        table = self.rng.integers(grid.qmin, grid.qmax + 1, 256)
        if self.rng.random() < 0.5:
            table = np.sort(table)
        tensors = {"table": table.astype(np.uint8)}
        return self.append(Node(self.name("lookup"), "lookup", (source,), grid, tensors=tensors))

    def concat(self, first: str, second: str) -> str:
        """The second is brought to the values of the first."""
        grid = self.grids[first]
        assert grid is not None
        if grid.spacing == 2:
            other = self.threshold(second, grid.bits, grid)
        else:
            other = self.append(Node(self.name("requantize"), "requantize", (second,), grid))
        return self.append(Node(self.name("concat"), "concat", (first, other), grid))

    def pool(self, op: str, source: str, bits: int | None, **attributes: Any) -> str:
        """``bits`` None keeps the grid of the input, also where averages can be on it."""
        grid = self.grids[source]
        if op != "max_pool2d" and grid is not None and grid.spacing == 2 and bits is None:
            bits = 8
        node = Node(self.name(op), op, (source,), self.grids[source], attributes)
        if bits is not None:
            node = replace(node, grid=self.grid(self.floats(source), bits))
        return self.append(node)

    def plain(self, op: str, *sources: str, **attributes: Any) -> str:
        """An operation that keeps the grid of its input, if it has one."""
        return self.append(Node(self.name(op), op, sources, self.grids[sources[0]], attributes))

    def flatten(self, source: str) -> str:
        return self.plain("flatten", source)

    def pad(self, source: str) -> str:
        before, after = (tuple(map(int, self.rng.integers(0, 3, 3))) for _ in range(2))
        return self.plain("pad", source, before=before, after=after)

    def slice(self, source: str) -> str:
        """Every second column but the first, and all rows but the last."""
        cut = {"axes": (3, 2), "starts": (1, 0), "ends": (2**63 - 1, -1), "steps": (2, 1)}
        return self.plain("slice", source, **cut)

    def shuffle(self, source: str) -> str:
        """Channels in groups, and the groups in another order; or all axes."""
        channels, height, width = self.shape(source)
        groups = int(self.rng.choice([g for g in range(1, channels + 1) if channels % g == 0]))
        if self.rng.random() < 0.3:
            return self.plain("transpose", source, axes=(1, 3, 2))
        shape = (groups, channels // groups, height, width)
        last = self.plain("reshape", source, shape=shape)
        last = self.plain("transpose", last, axes=(2, 1, 3, 4))
        return self.plain("reshape", last, shape=(channels, height, width))

    def upsample(self, source: str) -> str:
        """Of any size: a multiple, between multiples, or smaller."""
        size = [int(n * self.rng.choice([1, 2, 1.5, 0.7])) for n in self.shape(source)[1:]]
        return self.plain("upsample", source, size=tuple(size))

    def resize(self, source: str, bits: int, factor: float) -> str:
        """By a power of two between steps that are one: exact, though in floats."""
        last = self.requantize(source, bits, power_of_two=True)
        last = self.append(Node(self.name("dequantize"), "dequantize", (last,), None))
        size = tuple(int(n * factor) for n in self.shape(source)[1:])
        last = self.plain("resize", last, size=size, align_corners=False)
        return self.quantize(last, bits)


BITS = st.integers(1, 8)


@st.composite
def integer_models(draw: st.DrawFn) -> Maker:
    """A network of up to six operations of all kinds and a head."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    channels, height, width = (
        draw(st.integers(1, 4)),
        draw(st.integers(4, 9)),
        draw(st.integers(4, 9)),
    )
    images = rng.normal(size=(3, channels, height, width)).astype(np.float32)
    maker = Maker(rng, images)
    last = maker.quantize(INPUT, draw(BITS))
    kinds = ["conv", "conv", "depthwise", "grouped", "add", "concat", "requantize", "max", "avg"]
    kinds += ["pad", "slice", "float", "threshold"]
    kinds += ["lookup", "lookup", "mul", "gate", "shuffle", "upsample", "adaptive"]
    kinds += ["resize"]
    for kind in draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=6)):
        last = _grow(draw, maker, last, kind)
    return _head(draw, maker, last)


def _window(draw: st.DrawFn, shape: tuple[int, ...], *, pooling: bool) -> dict[str, int]:
    kernel = draw(st.integers(1, min(3, *shape[1:])))
    window = {"kernel": kernel, "stride": draw(st.integers(1, 3))}
    window["padding"] = draw(st.integers(0, kernel // 2 if pooling else 2))
    spare = min(shape[1:]) + (2 * window["padding"] if pooling else 0)
    window["dilation"] = draw(st.integers(1, 2)) if 2 * (kernel - 1) < spare else 1
    return window


def _grow(draw: st.DrawFn, maker: Maker, source: str, kind: str) -> str:
    shape, bits = maker.shape(source), draw(BITS)
    if kind == "requantize":
        return maker.requantize(source, bits, relu=draw(st.booleans()))
    if kind == "add":
        left = maker.requantize(source, bits, power_of_two=True)
        right = maker.conv(source, shape[0], 1, wbits=draw(BITS), abits=8, power_of_two=True)
        return maker.add(left, right, relu=draw(st.booleans()))
    if kind == "mul":
        left = maker.requantize(source, bits, power_of_two=True)
        return maker.mul(left, maker.requantize(source, draw(BITS), power_of_two=True))
    if kind == "gate":
        left = maker.requantize(source, bits, power_of_two=True)
        pooled = maker.pool("global_avg_pool", source, 8)
        gate = maker.conv(pooled, shape[0], 1, wbits=draw(BITS), abits=8, power_of_two=True)
        both = [left, gate] if draw(st.booleans()) else [gate, left]
        return maker.add(*both) if draw(st.integers(0, 3)) == 0 else maker.mul(*both)
    if kind == "lookup":
        return maker.lookup(source, bits)
    if kind == "shuffle":
        return maker.shuffle(source)
    if kind == "upsample":
        return maker.upsample(source) if min(shape[1:]) >= 4 and max(shape[1:]) < 20 else source
    if kind == "resize":
        factors = [2.0, 4.0] if max(shape[1:]) < 12 else []
        factors += [] if any(n % 2 for n in shape[1:]) else [0.5]
        return maker.resize(source, bits, draw(st.sampled_from(factors))) if factors else source
    if kind == "adaptive":
        size = (draw(st.integers(1, 7)), draw(st.integers(1, 7)))
        return maker.pool("adaptive_avg_pool2d", source, draw(st.none() | BITS), size=size)
    if kind == "concat":
        return maker.concat(source, maker.conv(source, 2, 1, wbits=draw(BITS), abits=bits))
    if kind == "threshold":
        return maker.threshold(source, draw(st.integers(1, MOST_THRESHOLD_BITS)))
    if kind == "pad":
        return maker.pad(source)
    if kind == "slice":
        return maker.slice(source) if min(shape[1:]) > 1 else source
    if kind == "float":
        return maker.quantize(_floats(draw, maker, source), bits)
    window = _window(draw, shape, pooling=kind in ("max", "avg"))
    if kind in ("max", "avg"):
        pairs: dict[str, Any] = {name: (value, value) for name, value in window.items()}
        pairs["ceil_mode"] = draw(st.booleans()) and window["dilation"] == 1
        if kind == "max":
            return maker.pool("max_pool2d", source, None, **pairs)
        del pairs["dilation"]
        pairs["count_include_pad"] = draw(st.booleans())
        return maker.pool("avg_pool2d", source, draw(st.none() | BITS), **pairs)
    relu, wbits = draw(st.booleans()), draw(BITS)
    groups = {"conv": 1, "depthwise": shape[0], "grouped": 2 if shape[0] % 2 == 0 else 1}[kind]
    outputs = groups * draw(st.integers(1, 3)) if kind != "conv" else draw(st.integers(1, 20))
    padding = draw(st.tuples(*[st.integers(0, 2)] * 4))
    return maker.conv(
        source,
        outputs,
        window["kernel"],
        stride=window["stride"],
        dilation=window["dilation"],
        padding=padding,
        groups=groups,
        wbits=wbits,
        abits=bits,
        relu=relu,
    )


def _floats(draw: st.DrawFn, maker: Maker, source: str) -> str:
    """Float operations that every runner computes alike, between two grids."""
    last = maker.append(Node(maker.name("dequantize"), "dequantize", (source,), None))
    for op in draw(
        st.lists(
            st.sampled_from(["clip", "add", "mul", "concat", "max", "pad", "move"]), max_size=3
        )
    ):
        match op:
            case "clip":
                last = maker.plain("clip", last, min=0.0, max=draw(st.sampled_from([None, 1.5])))
            case "add":
                branch = maker.conv(source, maker.shape(last)[0], 1, wbits=draw(BITS), abits=None)
                if maker.shape(branch) == maker.shape(last):
                    last = maker.plain("add", last, branch)
            case "mul":
                branch = maker.conv(source, 1, 1, wbits=draw(BITS), abits=None)
                if maker.shape(branch)[1:] == maker.shape(last)[1:]:
                    last = maker.plain("mul", branch, last)
            case "move":
                last = maker.upsample(maker.shuffle(last)) if min(maker.shape(last)) > 2 else last
            case "concat":
                last = maker.plain("concat", last, last)
            case "max":
                window: dict[str, Any] = dict.fromkeys(("stride", "padding", "dilation"), (1, 1))
                last = maker.plain("max_pool2d", last, **window, kernel=(2, 2), ceil_mode=False)
            case "pad":
                last = maker.pad(last)
    return last


def _head(draw: st.DrawFn, maker: Maker, last: str) -> Maker:
    match draw(st.sampled_from(["pool", "flatten", "conv", "mean", "float"])):
        case "pool":
            last = maker.pool("global_avg_pool", last, draw(st.none() | BITS))
            maker.linear(maker.flatten(last), 5, wbits=draw(BITS))
        case "flatten":
            last = maker.linear(maker.flatten(last), 7, wbits=draw(BITS), abits=draw(BITS))
            maker.linear(last, 5, wbits=draw(BITS))
        case "conv":
            last = maker.conv(last, 5, 1, wbits=draw(BITS), abits=None)
            maker.flatten(last)
        case "mean":
            last = maker.append(Node("mean", "global_avg_pool", (last,), None))
            maker.flatten(last)
        case "float":
            last = maker.linear(maker.flatten(last), 7, wbits=draw(BITS), abits=None)
            maker.linear(maker.quantize(last, draw(BITS)), 5)
    return maker


def resnet18(
    rng: np.random.Generator, *, wbits: int, abits: int, size: int, images: int = 1
) -> IntegerModel:
    """The shape of ResNet-18: first and last layer and the residual stream 8-bit."""
    maker = Maker(rng, rng.normal(size=(images, 3, size, size)).astype(np.float32))
    # With large biases and hard clips all images look alike after a few layers.
    maker.bias_reach, maker.tight = [0.3], 0.0
    last = maker.quantize(INPUT, 8)
    last = maker.conv(last, 64, 7, stride=2, padding=3, wbits=8, relu=True, power_of_two=True)
    last = maker.pool(
        "max_pool2d",
        last,
        None,
        kernel=(3, 3),
        stride=(2, 2),
        padding=(1, 1),
        dilation=(1, 1),
        ceil_mode=False,
    )
    for index in range(8):
        outputs, stride = 64 * 2 ** (index // 2), 2 if index in (2, 4, 6) else 1
        branch = maker.requantize(last, abits, relu=True)
        inner = maker.conv(
            branch, outputs, 3, stride=stride, padding=1, wbits=wbits, abits=abits, relu=True
        )
        inner = maker.conv(inner, outputs, 3, padding=1, wbits=wbits, power_of_two=True)
        if stride == 2:
            last = maker.conv(branch, outputs, 1, stride=2, wbits=wbits, power_of_two=True)
        last = maker.add(inner, last, relu=True)
    last = maker.pool("global_avg_pool", last, 8)
    maker.linear(maker.flatten(last), 1000)
    return maker.model()
