"""Do two ways of running a network give the same logits?"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from mecq_cli.errors import VerificationError

Array = NDArray[np.float32]
Predict = Callable[[Array], Array]

FLOAT_TOLERANCE = 1e-4
"""Largest difference of logits, relative to the largest logit, where a float operation differs
in the order of its sums between two runtimes."""

AGREEMENT = 0.999
"""Share of images (or pixels) whose top-1 must agree where floats lie between the integers."""

SHOWN = 5
"""Mismatches that are listed one by one."""


@dataclass
class Comparison:
    """How two ways of running one network compare.

    Attributes:
        images: compared.
        answers: one an image; of a network that segments one a pixel.
        agree: of which the top-1 is the same.
        largest_difference: of a logit, relative to the largest logit.
        mismatches: (number of the answer, margin of the reference) where the top-1 differs.
    """

    images: int = 0
    answers: int = 0
    agree: int = 0
    largest_difference: float = 0.0
    mismatches: list[tuple[int, float]] = field(default_factory=list)

    def add(self, expected: Array, got: Array) -> None:
        """Compare the logits of a batch, [N, classes] or [N, classes, H, W]."""
        self.images += len(expected)
        expected, got = _rows(expected), _rows(got)
        scale = max(float(np.abs(expected).max()), 1e-6)
        difference = float(np.abs(expected - got).max()) / scale
        # a NaN anywhere is a difference, whatever the maximum says
        self.largest_difference = max(
            self.largest_difference, difference if np.isfinite(difference) else float("inf")
        )
        same = expected.argmax(1) == got.argmax(1)
        for index in np.flatnonzero(~same)[:SHOWN]:
            top = np.sort(expected[index])[-2:]
            margin = float(top[1] - top[0]) if len(top) == 2 else 0.0
            self.mismatches.append((self.answers + int(index), margin))
        self.answers += len(same)
        self.agree += int(same.sum())

    def require_images(self, what: str) -> None:
        """Raise VerificationError where nothing was compared."""
        if not self.images:
            raise VerificationError(
                f"{what}: there was no image to compare on; give others by --data"
            )

    def require(self, what: str, *, exact: bool) -> None:
        """Raise VerificationError unless the two agree.

        Args:
            what: the file, for the message.
            exact: whether every operation before the logits is an integer one, so that logits
                may differ by the rounding of their last multiplication only.
        """
        self.require_images(what)
        if exact and self.largest_difference <= FLOAT_TOLERANCE and self.agree == self.answers:
            return
        if not exact and self.agree >= AGREEMENT * self.answers:
            return
        answers = f"{self.answers} {'images' if self.answers == self.images else 'pixels'}"
        listed = ", ".join(f"#{i} (margin {m:.2g})" for i, m in self.mismatches[:SHOWN])
        raise VerificationError(
            f"{what}: does not compute what the simulator computes: top-1 agrees on "
            f"{self.agree} of {answers}{f' (not on {listed})' if listed else ''}, "
            f"logits differ by up to {self.largest_difference:.1e} of the largest; the file "
            "was not kept"
        )


def _rows(logits: Array) -> Array:
    """[answers, classes]."""
    return logits if logits.ndim == 2 else np.moveaxis(logits, 1, -1).reshape(-1, logits.shape[1])


def compare(reference: Predict, other: Predict, batches: Iterable[Array]) -> Comparison:
    """Run both on every batch [N, C, H, W] of normalised images."""
    result = Comparison()
    for images in batches:
        result.add(reference(images), other(images))
    return result
