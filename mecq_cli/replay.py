"""Replays a network layer by layer and counts the integers on which its runtimes differ.

The measure is the NumPy reference. A runtime that took another step somewhere reads other values
behind it, and there comparing with the reference's own values would tell nothing. So where the
inputs of an operation are not the reference's, the reference executes that operation once more,
on the inputs that the runtime really had. In this way every integer of every layer is compared,
and a difference is counted where it arises.

Left out are, for runtimes that add floats, the layers whose terms cancel to less than float32
resolves: what remains there may be off by any number of steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mecq_cli.errors import VerificationError
from mecq_cli.integer.geometry import shapes
from mecq_cli.integer.ir import INPUT, Grid, IntegerModel, Node, multiplied_weight
from mecq_cli.integer.reference import execute, run
from mecq_cli.verify import FLOAT_TOLERANCE

Array = NDArray[np.float32]
Values = Mapping[str, NDArray[Any]]

RARE = 1e-5
"""Share of the integers that may be one step off where sums are sums of floats."""

FEW = 3
"""So many may be off in any case: in a small sample one is more than its share."""

_RESOLVED = 0.1 * 2**23
"""Steps of the output that a float32 sum may reach before rounding is felt in its last step."""

_MOST_VALUES = 2**24
"""Of one part of a batch, all layers together."""


@dataclass(frozen=True)
class Way:
    """A way of running a network.

    Attributes:
        name: for people.
        run: images [N, C, H, W] -> the output of every operation by its name, integers of any
            type where the operation has a grid.
        exact: whether every integer must be the reference's. Otherwise it adds floats: `RARE`
            integers may be one step off.
    """

    name: str
    run: Callable[[Array], Values]
    exact: bool


@dataclass
class Count:
    """What one way computed.

    Attributes:
        values: integers compared.
        left_out: not compared, see above.
        differing: of which are not the reference's.
        steps: the largest difference.
        floats: largest difference of a float output, relative to the largest one; layers without
            a grid have no integers.
    """

    values: int = 0
    left_out: int = 0
    differing: int = 0
    steps: int = 0
    floats: float = 0.0

    def add(self, expected: NDArray[Any], got: NDArray[Any], *, on_grid: bool) -> None:
        """Compare the outputs of an operation."""
        if not on_grid:
            span = max(float(np.abs(expected).max()), 1e-30)
            difference = float(np.abs(expected - got).max()) / span
            # a NaN anywhere is a difference, whatever the maximum says
            self.floats = max(self.floats, difference if np.isfinite(difference) else float("inf"))
            return
        steps = np.abs(expected.astype(np.int32) - got.astype(np.int32))
        self.values += steps.size
        self.differing += int(np.count_nonzero(steps))
        self.steps = max(self.steps, int(steps.max()))


@dataclass
class Layer:
    """One operation, and what each way made of it."""

    name: str
    op: str
    on_grid: bool
    ways: dict[str, Count]


@dataclass
class Replay:
    """What was found.

    Attributes:
        layers: all operations in the order of execution.
        ways: those that were compared with the reference.
        images: replayed.
    """

    layers: list[Layer]
    ways: list[Way]
    images: int = 0

    def total(self, way: str) -> Count:
        """Over all layers."""
        counts = [layer.ways[way] for layer in self.layers]
        return Count(
            values=sum(count.values for count in counts),
            left_out=sum(count.left_out for count in counts),
            differing=sum(count.differing for count in counts),
            steps=max(count.steps for count in counts),
            floats=max(count.floats for count in counts),
        )

    def require(self, what: str) -> None:
        """Raise VerificationError where a way differs by more than it may.

        Args:
            what: the file, for the message.
        """
        for way in self.ways:
            for layer in self.layers:
                problem = _problem(layer.ways[way.name], exact=way.exact)
                if problem:
                    raise VerificationError(
                        f"{what}: layer {layer.name} ({layer.op}), run by {way.name}, {problem}; "
                        "the file was not kept"
                    )
            total = self.total(way.name)
            if total.differing > FEW + RARE * total.values:
                raise VerificationError(
                    f"{what}: run by {way.name}, {total.differing} of {total.values} integers are "
                    f"one step off, allowed is one in {round(1 / RARE):,}; the file was not kept"
                )

    def to_json(self, *, layers: bool) -> dict[str, Any]:
        """Totals for each way, and each layer where ``layers`` says so."""
        document: dict[str, Any] = {
            "images": self.images,
            "layers": sum(1 for layer in self.layers if layer.on_grid),
            "ways": [
                {
                    "way": way.name,
                    "exact": way.exact,
                    "compared": self.total(way.name).values,
                    "left_out": self.total(way.name).left_out,
                    "differing": self.total(way.name).differing,
                    "differing_layers": [
                        layer.name for layer in self.layers if layer.ways[way.name].differing
                    ],
                }
                for way in self.ways
            ],
        }
        if layers:
            document["by_layer"] = [
                {
                    "layer": layer.name,
                    "op": layer.op,
                    "ways": {
                        name: {"compared": count.values, "differing": count.differing}
                        for name, count in layer.ways.items()
                    },
                }
                for layer in self.layers
                if layer.on_grid
            ]
        return document


def _problem(count: Count, *, exact: bool) -> str | None:
    """Why a layer cannot pass."""
    if exact and count.differing:
        return (
            f"differs in {count.differing} of {count.values} integers, by up to {count.steps} steps"
        )
    if count.steps > 1:
        return f"is off by {count.steps} steps"
    if count.floats > FLOAT_TOLERANCE:
        return f"differs by {count.floats:.1e} of its largest value"
    return None


def replay(model: IntegerModel, ways: Iterable[Way], batches: Iterable[Array]) -> Replay:
    """Run images every way there is and compare all integers of all layers.

    Args:
        model: a valid integer model.
        ways: what is compared with the reference.
        batches: preprocessed images [N, C, H, W] each, worked off in bounded parts.

    Raises:
        VerificationError: a way does not know a layer.
        MecqError: a way fails.
    """
    ways = list(ways)
    names = [way.name for way in ways]
    layers = [
        Layer(node.name, node.op, node.grid is not None, {name: Count() for name in names})
        for node in model.nodes
    ]
    result = Replay(layers, ways)
    per_image = sum(int(np.prod(shape)) for shape in shapes(model).values())
    step = max(1, _MOST_VALUES // per_image)
    for images in batches:
        for start in range(0, len(images), step):
            part = np.ascontiguousarray(images[start : start + step], np.float32)
            reference = run(model, part, keep=True)
            for way in ways:
                _compare(model, part, reference, way, layers)
            result.images += len(part)
    return result


def _compare(
    model: IntegerModel, images: Array, reference: Values, way: Way, layers: list[Layer]
) -> None:
    values: dict[str, NDArray[Any]] = {INPUT: images, **way.run(images)}
    same = {INPUT}
    grids: dict[str, Grid | None] = {INPUT: None, **{n.name: n.grid for n in model.nodes}}
    for node, layer in zip(model.nodes, layers, strict=True):
        if node.name not in values:
            raise VerificationError(f"{way.name}: there is no layer {node.name} in the file")
        got, expected = values[node.name], reference[node.name]
        if got.shape != expected.shape:
            raise VerificationError(
                f"{way.name}: layer {node.name} puts out {list(got.shape)}, not "
                f"{list(expected.shape)}"
            )
        if np.array_equal(got, expected):
            same.add(node.name)
        if not same.issuperset(node.inputs):
            expected = _again(node, values, grids)
        source = grids[node.inputs[0]]
        if not way.exact and source and node.grid and _cancels(node, source, node.grid):
            layer.ways[way.name].left_out += got.size
        else:
            layer.ways[way.name].add(expected, got, on_grid=layer.on_grid)


def _cancels(node: Node, source: Grid, target: Grid) -> bool:
    """Whether large terms may cancel to less than a float32 sum of them resolves.

    That takes a layer of which the grid is thousands of times finer than its terms.
    """
    terms = float(source.reach)
    if node.op in ("conv2d", "linear"):
        weight = np.abs(multiplied_weight(node).astype(np.float64))
        bias = np.abs(node.tensors["bias"].astype(np.float64))
        sums = weight.reshape(len(weight), -1).sum(1) * terms + bias
        terms = float((sums * np.abs(node.tensors["weight_scale"].astype(np.float64))).max())
    return terms * source.scale / target.scale > _RESOLVED


def _again(node: Node, values: Values, grids: Mapping[str, Grid | None]) -> NDArray[Any]:
    """The reference's output for the inputs that another way had."""
    inputs = []
    for name in node.inputs:
        grid = grids[name]
        inputs.append(values[name].astype(np.float32 if grid is None else np.uint8))
    return execute(node, inputs, [grids[name] for name in node.inputs])
