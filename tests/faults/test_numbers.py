"""NaN and Inf in a loss, a gradient or a scale: step and layer are named, nothing is lost."""

from __future__ import annotations

import shutil
from typing import Any

import pytest

from mecq_cli.training import container, state
from tests.faults.conftest import Course, assert_same
from tests.faults.warm import Warm

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("where", "value", "said"),
    [
        ({"tensor": "conv1.output_quantizer.scale"}, NAN, "the loss is not finite"),
        ({"tensor": "conv1.output_quantizer.scale"}, INF, "the loss is not finite"),
        ({"tensor": "conv2.weight_quantizer.scale"}, NAN, "the loss is not finite"),
        ({"tensor": "conv2.weight"}, NAN, "the loss is not finite"),
        ({"tensor": "conv2.weight", "gradient": True}, NAN, "the gradient of conv2.weight is not"),
        ({"tensor": "fc.bias", "gradient": True}, INF, "the gradient of fc.bias is not finite"),
        (
            {"tensor": "conv1.output_quantizer.scale", "gradient": True}, NAN,
            "the gradient of conv1.output_quantizer.scale is not finite",
        ),
    ],
)  # fmt: skip
def test_a_run_with_such_a_number_ends_before_the_update(
    warm: Warm, short: Course, where: dict[str, Any], value: float, said: str
) -> None:
    run = short.work / "numbers"
    shutil.rmtree(run, ignore_errors=True)
    done = warm.run(
        *short.arguments, "--output", "numbers", cwd=short.work,
        at_step={"step": 3, "value": value, **where},
    )  # fmt: skip
    assert done.code == 4, done.err
    assert done.err.count("error: ") == 1
    assert done.line.startswith("error: step 3: ")
    assert said in done.line
    assert where["tensor"] in done.line, "the layer is named"
    assert "nothing was updated" in done.line
    assert "Traceback" not in done.err
    saved = state.checkpoints(run / "checkpoints")
    assert [state.step_of(path) for path in saved] == [0, 2]
    for path in saved:
        container.read(path)
    again = warm.run(*short.arguments, "--resume", "--output", "numbers", cwd=short.work)
    assert "resumed at step 2" in again.err
    assert_same(run, short.whole)
