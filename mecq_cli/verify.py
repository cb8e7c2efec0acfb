"""Does an exported file compute what the simulator computes? Asked of the file itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mecq_cli.errors import VerificationError
from mecq_cli.integer.ir import INPUT, Grid, IntegerModel
from mecq_cli.integer.reference import execute

Array = NDArray[np.float32]
Predict = Callable[[Array], Array]

FLOAT_TOLERANCE = 1e-4
"""Largest difference of logits, relative to the largest logit, where a float operation differs
in the order of its sums between two runtimes."""

AGREEMENT = 0.999
"""Share of images whose top-1 must agree where float operations lie between the integers."""

RARE = 1e-5
"""Share of the integers of an unfused graph that may be one step off."""

FEW = 3
"""So many may be off in any case: in a small sample one is more than its share."""

SHOWN = 5
"""Mismatches that are listed one by one."""


@dataclass
class Comparison:
    """How two ways of running one network compare.

    Attributes:
        images: compared.
        agree: of which the top-1 is the same.
        largest_difference: of a logit, relative to the largest logit.
        mismatches: (image number, margin of the reference) where the top-1 differs.
    """

    images: int = 0
    agree: int = 0
    largest_difference: float = 0.0
    mismatches: list[tuple[int, float]] = field(default_factory=list)

    def add(self, expected: Array, got: Array) -> None:
        """Compare the logits [N, classes] of a batch."""
        scale = max(float(np.abs(expected).max()), 1e-6)
        difference = float(np.abs(expected - got).max()) / scale
        # a NaN anywhere is a difference, whatever the maximum says
        self.largest_difference = max(
            self.largest_difference, difference if np.isfinite(difference) else float("inf")
        )
        same = expected.argmax(1) == got.argmax(1)
        for index in np.flatnonzero(~same):
            top = np.sort(expected[index])[-2:]
            margin = float(top[1] - top[0]) if len(top) == 2 else 0.0
            self.mismatches.append((self.images + int(index), margin))
        self.images += len(same)
        self.agree += int(same.sum())

    def require(self, what: str, *, exact: bool) -> None:
        """Raise VerificationError unless the two agree.

        Args:
            what: the file, for the message.
            exact: whether every operation before the logits is an integer one, so that logits
                may differ by the rounding of their last multiplication only.
        """
        if not self.images:
            raise VerificationError(
                f"{what}: there was no image to compare on; give others by --data"
            )
        if exact and self.largest_difference <= FLOAT_TOLERANCE and self.agree == self.images:
            return
        if not exact and self.agree >= AGREEMENT * self.images:
            return
        listed = ", ".join(f"#{i} (margin {m:.2g})" for i, m in self.mismatches[:SHOWN])
        raise VerificationError(
            f"{what}: does not compute what the simulator computes: top-1 agrees on "
            f"{self.agree} of {self.images} images{f' (not on {listed})' if listed else ''}, "
            f"logits differ by up to {self.largest_difference:.1e} of the largest; the file "
            "was not kept"
        )


@dataclass
class StepCount:
    """How the operations of an unfused graph round, each given its own inputs.

    Attributes:
        values: integers compared.
        other: of which are one step off.
    """

    values: int = 0
    other: int = 0

    def require(self, what: str) -> None:
        """Raise VerificationError where more round differently than float32 explains."""
        if self.other > FEW + RARE * self.values:
            raise VerificationError(
                f"{what}: {self.other} of {self.values} integers are one step off, allowed is one "
                f"in {round(1 / RARE):,}; the file was not kept"
            )


def count_steps(
    model: IntegerModel, outputs: Mapping[str, NDArray[Any]], images: Array, what: str
) -> StepCount:
    """Compare each operation's output with the reference, given the inputs that it really had.

    Without fusion onnxruntime computes in float32, where a value close to a half may round the
    other way. Such a step spreads through the layers behind it, so whole networks cannot be
    compared integer by integer; single operations can.

    Args:
        model: the integer model.
        outputs: of every operation by its name, as the unfused graph computed them.
        images: what it read, [N, C, H, W].
        what: the file, for messages.

    Raises:
        VerificationError: an integer is off by more than one step.
    """
    count = StepCount()
    values: dict[str, NDArray[Any]] = {INPUT: images, **outputs}
    grids: dict[str, Grid | None] = {INPUT: None, **{n.name: n.grid for n in model.nodes}}
    for node in model.nodes:
        if node.grid is None or node.name not in outputs:
            continue
        if any(name not in values for name in node.inputs):
            continue
        inputs = [values[name] for name in node.inputs]
        expected = execute(node, inputs, [grids[name] for name in node.inputs])
        difference = np.abs(expected.astype(np.int16) - outputs[node.name].astype(np.int16))
        if difference.size and int(difference.max()) > 1:
            raise VerificationError(
                f"{what}: layer {node.name} is off by {int(difference.max())} steps; the file was "
                "not kept"
            )
        count.values += difference.size
        count.other += int(difference.sum())
    return count


def compare(reference: Predict, other: Predict, batches: Iterable[Array]) -> Comparison:
    """Run both on every batch [N, C, H, W] of normalised images."""
    result = Comparison()
    for images in batches:
        result.add(reference(images), other(images))
    return result
