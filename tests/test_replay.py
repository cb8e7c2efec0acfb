"""Layer by layer: a difference is counted where it arises, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mecq_cli.errors import VerificationError
from mecq_cli.integer.ir import INPUT, IntegerModel
from mecq_cli.integer.reference import execute, run
from mecq_cli.replay import Count, Values, Way, replay
from tests.integer.random_models import Maker

IMAGES = np.random.default_rng(0).normal(size=(30, 3, 8, 8)).astype(np.float32)


@pytest.fixture(scope="module")
def model() -> IntegerModel:
    """Three convolutions and a linear layer, with a float operation between them."""
    maker = Maker(np.random.default_rng(1), IMAGES)
    maker.bias_reach, maker.tight = [0.1], 0.0
    last = maker.conv(maker.quantize(INPUT, 8), 8, 3, wbits=4, abits=8)
    last = maker.conv(last, 8, 3, wbits=4, abits=None)
    last = maker.conv(maker.quantize(last, 8), 8, 3, wbits=4, abits=8)
    maker.linear(maker.flatten(last), 5)
    return maker.model()


def way(model: IntegerModel, *, exact: bool = True) -> Way:
    return Way("other", lambda images: run(model, images, keep=True), exact)


def altered(model: IntegerModel, name: str, change: Callable[[NDArray[Any]], Any]) -> Way:
    """Runs the model layer by layer, with another output of one layer."""

    def run_altered(images: NDArray[np.float32]) -> Values:
        nodes = model.nodes
        place = [node.name for node in nodes].index(name)
        values: dict[str, NDArray[Any]] = dict(run(model, images, keep=True))
        values[name] = change(values[name])
        grids = {INPUT: None, **{node.name: node.grid for node in nodes}}
        known = {INPUT: images, **values}
        for node in nodes[place + 1 :]:
            inputs = [known[source] for source in node.inputs]
            known[node.name] = execute(node, inputs, [grids[source] for source in node.inputs])
        return known

    return Way("altered", run_altered, exact=False)


def one_step(share: float) -> Callable[[NDArray[Any]], Any]:
    """Every so many integers is one step higher or lower."""

    def change(values: NDArray[Any]) -> Any:
        flat = values.reshape(-1).copy()
        every = slice(None, None, round(1 / share))
        flat[every] = np.where(flat[every] > 0, flat[every] - 1, 1)
        return flat.reshape(values.shape)

    return change


def test_the_same_integers_everywhere(model: IntegerModel) -> None:
    found = replay(model, [way(model)], [IMAGES[:12], IMAGES[12:]])
    found.require("net.onnx")
    sizes = {name: v.size for name, v in run(model, IMAGES, keep=True).items()}
    grids = {node.name for node in model.nodes if node.grid is not None}
    total = found.total("other")
    assert (total.values, total.differing) == (sum(sizes[name] for name in grids), 0)
    assert {layer.name for layer in found.layers if layer.ways["other"].values} == grids
    document = found.to_json(layers=True)
    assert (document["images"], document["layers"]) == (30, len(grids))
    named = [node.name for node in model.nodes if node.grid is not None]
    assert [row["layer"] for row in document["by_layer"]] == named
    rows = [row["ways"]["other"] for row in document["by_layer"]]
    assert sum(row["compared"] for row in rows) == total.values
    assert "by_layer" not in found.to_json(layers=False)


def test_a_wrong_weight_is_found_in_its_own_layer(model: IntegerModel) -> None:
    convolutions = [node for node in model.nodes if node.op == "conv2d" and node.grid]
    for wrong in convolutions:
        bias = wrong.tensors["bias"] + np.int32(100_000)
        other = replace(wrong, tensors={**wrong.tensors, "bias": bias})
        nodes = tuple(other if node is wrong else node for node in model.nodes)
        found = replay(model, [way(replace(model, nodes=nodes))], [IMAGES])
        document = found.to_json(layers=False)
        assert document["ways"][0]["differing_layers"] == [wrong.name]
        with pytest.raises(
            VerificationError, match=f"layer {wrong.name} .*, run by other, differs"
        ):
            found.require("net.onnx")


def test_single_steps_are_rare_or_an_error(model: IntegerModel) -> None:
    name = model.nodes[1].name
    few = replay(model, [altered(model, name, one_step(1e-4))], [IMAGES])
    assert 0 < few.total("altered").differing <= 12
    assert few.to_json(layers=False)["ways"][0]["differing_layers"] == [name]
    many = replay(model, [altered(model, name, one_step(0.01))], [IMAGES])
    with pytest.raises(VerificationError, match=r"integers are one step off, allowed is one in"):
        many.require("net.onnx")
    strict = replay(model, [replace(altered(model, name, one_step(1e-4)), exact=True)], [IMAGES])
    with pytest.raises(VerificationError, match="differs in"):
        strict.require("net.onnx")


def test_two_steps_are_always_an_error(model: IntegerModel) -> None:
    def change(values: NDArray[Any]) -> Any:
        other = values.copy()
        other[0, 0, 0, 0] = other[0, 0, 0, 0] + 2 if other[0, 0, 0, 0] < 100 else 3
        return other

    found = replay(model, [altered(model, model.nodes[1].name, change)], [IMAGES])
    with pytest.raises(VerificationError, match=r"is off by \d+ steps"):
        found.require("net.onnx")


@pytest.mark.parametrize("value", [1.01, np.nan])
def test_floats_are_compared_too(model: IntegerModel, value: float) -> None:
    logits = model.output.name
    found = replay(model, [altered(model, logits, lambda v: v * np.float32(value))], [IMAGES])
    with pytest.raises(VerificationError, match=f"layer {logits} .*of its largest value"):
        found.require("net.onnx")


def test_a_layer_that_is_missing_or_of_another_shape(model: IntegerModel) -> None:
    name = model.nodes[2].name

    def without(images: NDArray[np.float32]) -> Values:
        return {key: v for key, v in run(model, images, keep=True).items() if key != name}

    with pytest.raises(VerificationError, match=f"no layer {name}"):
        replay(model, [Way("other", without, exact=False)], [IMAGES])
    with pytest.raises(VerificationError, match="puts out"):
        replay(model, [altered(model, model.output.name, lambda v: v[:, :2])], [IMAGES])


def test_an_integer_model_of_large_images_is_worked_off_in_parts() -> None:
    maker = Maker(np.random.default_rng(0), np.ones((1, 3, 600, 600), np.float32))
    maker.flatten(maker.quantize(INPUT, 8))
    seen: list[int] = []

    def run_counted(images: NDArray[np.float32]) -> Values:
        seen.append(len(images))
        return run(maker.model(), images, keep=True)

    images = np.ones((9, 3, 600, 600), np.float32)
    found = replay(maker.model(), [Way("other", run_counted, exact=True)], [images])
    assert sum(seen) == found.images == 9
    assert max(seen) < 9


def test_a_count_adds_up() -> None:
    count = Count()
    count.add(np.array([1, 2], np.uint8), np.array([1.0, 3.0], np.float32), on_grid=True)
    count.add(np.array([255], np.uint8), np.array([0], np.uint8), on_grid=True)
    assert (count.values, count.differing, count.steps) == (3, 2, 255)


def test_what_float32_cannot_resolve_is_left_out_of_float_graphs() -> None:
    """A grid a million times finer than the terms of its sums."""
    maker = Maker(np.random.default_rng(1), IMAGES)
    maker.flatten(maker.conv(maker.quantize(INPUT, 8), 4, 3, wbits=8, abits=8))
    fine = maker.nodes[1]
    assert fine.grid is not None
    grid = replace(fine.grid, scale=float(np.float32(fine.grid.scale / 1e6)))
    nodes = (maker.nodes[0], replace(fine, grid=grid), replace(maker.nodes[2], grid=grid))
    model = IntegerModel(nodes, (3, 8, 8))

    def off(values: NDArray[Any]) -> Any:
        return 255 - values

    found = replay(model, [altered(model, fine.name, off)], [IMAGES])
    found.require("net.onnx")
    total = found.total("altered")
    sizes = {name: v.size for name, v in run(model, IMAGES, keep=True).items()}
    assert (total.left_out, total.differing) == (sizes[fine.name], 0)
    assert total.values == sum(sizes.values()) - total.left_out
    strict = replay(model, [replace(altered(model, fine.name, off), exact=True)], [IMAGES])
    with pytest.raises(VerificationError, match=fine.name):
        strict.require("net.onnx")
