"""The reference executor against torch in float64, and against numbers worked out by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from mecq_cli.errors import ArtifactError, UsageError
from mecq_cli.integer import reference
from mecq_cli.integer.ir import Grid, IntegerModel, Node
from mecq_cli.integer.reference import execute, run
from tests.integer.random_models import resnet18

BYTES = Grid(0.5, 7, 8, 0, 255)


def integers(*shape: int, seed: int = 0, low: int = 0, high: int = 256) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(low, high, shape).astype(np.uint8)


@pytest.mark.parametrize(
    ("groups", "outputs", "stride", "padding", "dilation"),
    [
        (1, 5, (1, 1), (0, 0, 0, 0), (1, 1)),
        (1, 5, (2, 3), (1, 0, 2, 1), (2, 1)),
        (2, 6, (2, 1), (1, 1, 1, 1), (1, 2)),
        (4, 4, (1, 1), (1, 1, 1, 1), (1, 1)),
        (4, 8, (2, 2), (0, 1, 0, 1), (1, 1)),
    ],
)
@pytest.mark.parametrize("bias_reach", [100, 2**30])
def test_convolutions_hold_the_exact_sum(
    groups: int, outputs: int, stride: Any, padding: Any, dilation: Any, bias_reach: int
) -> None:
    rng = np.random.default_rng(1)
    x = integers(3, 4, 9, 8)
    weight = rng.integers(-128, 128, (outputs, 4 // groups, 3, 2)).astype(np.int8)
    bias = rng.integers(-bias_reach, bias_reach, outputs).astype(np.int32)
    tensors: dict[str, Any] = {
        "weight": weight,
        "weight_scale": np.ones(outputs, np.float32),
        "bias": bias,
    }
    attributes = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    node = Node("c", "conv2d", ("x",), None, attributes, 8, tensors)
    top, left, bottom, right = padding
    wanted = F.conv2d(
        F.pad(torch.from_numpy(x).double() - 7, (left, right, top, bottom)),
        torch.from_numpy(weight).double(),
        torch.from_numpy(bias).double(),
        stride,
        0,
        dilation,
        groups,
    )
    got = execute(node, [x], [Grid(1.0, 7, 8, 0, 255)])
    # The sum is exact; only then it becomes a float32.
    np.testing.assert_array_equal(got, wanted.numpy().astype(np.float32))


@pytest.mark.parametrize("ceil_mode", [False, True])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding"),
    [((2, 2), (2, 2), (0, 0)), ((3, 3), (2, 2), (1, 1)), ((3, 2), (1, 3), (1, 0))],
)
def test_pools_have_the_windows_of_torch(
    kernel: Any, stride: Any, padding: Any, ceil_mode: bool
) -> None:
    x = integers(2, 3, 8, 10)
    centred = torch.from_numpy(x).double() - BYTES.zero_point
    window = {"kernel": kernel, "stride": stride, "padding": padding, "ceil_mode": ceil_mode}
    node = Node("p", "max_pool2d", ("x",), BYTES, {**window, "dilation": (1, 1)})
    largest = F.max_pool2d(centred, kernel, stride, padding, 1, ceil_mode) + BYTES.zero_point
    np.testing.assert_array_equal(execute(node, [x], [BYTES]), largest.numpy())
    for include in (False, True):
        attributes = {**window, "count_include_pad": include}
        node = Node("p", "avg_pool2d", ("x",), BYTES, attributes)
        mean = F.avg_pool2d(centred, kernel, stride, padding, ceil_mode, include)
        steps = np.rint((mean + BYTES.zero_point).numpy())
        np.testing.assert_allclose(execute(node, [x], [BYTES]), steps.clip(0, 255), atol=1)
        floats = execute(Node("p", "avg_pool2d", ("x",), None, attributes), [x * 0.5], [None])
        mean = F.avg_pool2d(torch.from_numpy(x * 0.5), kernel, stride, padding, ceil_mode, include)
        np.testing.assert_allclose(floats, mean.numpy(), rtol=1e-6)


def test_halves_round_to_even_after_the_scale_and_before_the_zero_point() -> None:
    grid = Grid(1.0, 3, 8, 0, 255)
    images = np.array([0.5, 1.5, 2.5, -0.5, -3.5, 900.0], np.float32)
    node = Node("q", "quantize", ("input",), grid)
    assert execute(node, [images], [None]).tolist() == [3, 5, 5, 3, 0, 255]
    # 0.5 and 1.5 on a grid of ones: an addition rounds what already has the zero point.
    node = Node("a", "add", ("x", "y"), Grid(1.0, 4, 8, 0, 255))
    halves = Grid(0.5, 0, 8, 0, 255)
    x, y = np.array([1, 3, 5], np.uint8), np.zeros(3, np.uint8)
    assert execute(node, [x, y], [halves, halves]).tolist() == [4, 6, 6]


def test_parts_of_a_batch_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    model = resnet18(rng, wbits=2, abits=2, size=32)
    images = rng.normal(size=(5, 3, 32, 32)).astype(np.float32)
    at_once = run(model, images)
    assert at_once.dtype == np.float32
    assert at_once.shape == (5, 1000)
    assert (at_once.argmax(1) != at_once[0].argmax()).any()
    monkeypatch.setattr(reference, "_WORKSPACE_BYTES", 1)
    every = run(model, images, keep=True)
    np.testing.assert_array_equal(every[model.output.name], at_once)
    for node in model.nodes:
        values = every[node.name]
        assert values.dtype == (np.float32 if node.grid is None else np.uint8)
        if node.grid is not None:
            assert node.grid.qmin <= values.min() < values.max() <= node.grid.qmax


def test_what_does_not_fit_is_named() -> None:
    model = IntegerModel((Node("f", "flatten", ("input",), None),), (3, 4, 4))
    with pytest.raises(UsageError, match=r"shape \[2, 3, 4, 5\], the model wants \[N, 3, 4, 4\]"):
        run(model, np.zeros((2, 3, 4, 5), np.float32))
    model = IntegerModel((Node("s", "erf", ("input",), None),), (3, 4, 4))
    with pytest.raises(ArtifactError, match="s: unknown operation 'erf'"):
        run(model, np.zeros((2, 3, 4, 4), np.float32))
