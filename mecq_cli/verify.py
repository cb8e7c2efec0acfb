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

BOX_TOLERANCE = 1e-3
"""Largest difference of a probability, and of a coordinate in sizes of the image."""

BOX_AGREEMENT = 0.99
"""Share of boxes that must be the same: of two that are as probable either may be dropped."""

SHOWN = 5
"""Mismatches that are listed one by one."""


@dataclass
class Comparison:
    """How two ways of running one network compare.

    Attributes:
        images: compared.
        answers: one an image; of a network that segments one a pixel, of one that detects one an
            anchor.
        agree: of which the top-1 is the same.
        largest_difference: of a logit, relative to the largest logit.
        mismatches: (number of the answer, margin of the reference) where the top-1 differs.
        classes: how many of the outputs are logits, where not all of them are.
    """

    images: int = 0
    answers: int = 0
    agree: int = 0
    largest_difference: float = 0.0
    mismatches: list[tuple[int, float]] = field(default_factory=list)
    classes: int | None = None

    def add(self, expected: Array, got: Array) -> None:
        """Compare the outputs of a batch, [N, classes], [N, classes, H, W] or [N, columns, A]."""
        self.images += len(expected)
        expected, got = _rows(expected), _rows(got)
        scale = max(float(np.abs(expected).max()), 1e-6)
        difference = float(np.abs(expected - got).max()) / scale
        # a NaN anywhere is a difference, whatever the maximum says
        self.largest_difference = max(
            self.largest_difference, difference if np.isfinite(difference) else float("inf")
        )
        expected, got = expected[:, : self.classes], got[:, : self.classes]
        same = expected.argmax(1) == got.argmax(1)
        for index in np.flatnonzero(~same)[:SHOWN]:
            top = np.sort(expected[index])[-2:]
            margin = float(top[1] - top[0]) if len(top) == 2 else 0.0
            self.mismatches.append((self.answers + int(index), margin))
        self.answers += len(same)
        self.agree += int(same.sum())

    @property
    def unit(self) -> str:
        """What has an answer."""
        if self.answers == self.images:
            return "images"
        return "pixels" if self.classes is None else "anchors"

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
                may differ by the rounding of their last multiplication only. Of many answers an
                image some have two classes that are as good.
        """
        self.require_images(what)
        enough = self.agree >= AGREEMENT * self.answers
        if exact and self.answers == self.images:
            enough = self.agree == self.answers
        if enough and (not exact or self.largest_difference <= FLOAT_TOLERANCE):
            return
        answers = f"{self.answers} {self.unit}"
        listed = ", ".join(f"#{i} (margin {m:.2g})" for i, m in self.mismatches[:SHOWN])
        raise VerificationError(
            f"{what}: does not compute what the simulator computes: top-1 agrees on "
            f"{self.agree} of {answers}{f' (not on {listed})' if listed else ''}, "
            f"logits differ by up to {self.largest_difference:.1e} of the largest; the file "
            "was not kept"
        )


def _rows(logits: Array) -> Array:
    """[answers, columns]."""
    return logits if logits.ndim == 2 else np.moveaxis(logits, 1, -1).reshape(-1, logits.shape[1])


def compare(
    reference: Predict, other: Predict, batches: Iterable[Array], classes: int | None = None
) -> Comparison:
    """Run both on every batch [N, C, H, W] of normalised images.

    Args:
        reference, other: images to outputs.
        batches: the images.
        classes: how many of the outputs are logits; None: all.
    """
    result = Comparison(classes=classes)
    for images in batches:
        result.add(reference(images), other(images))
    return result


@dataclass
class BoxComparison:
    """How the boxes compare that two ways of running one network give.

    Attributes:
        boxes: of the reference.
        agree: of which the other has one of the same class, place and probability.
        others: how many more the other has, where it has more.
    """

    boxes: int = 0
    agree: int = 0
    others: int = 0

    def add(self, expected: Array, got: Array, size: int) -> None:
        """Compare the boxes of a batch: [N, D, 6], as `mecq_cli.tasks.decoding` has them.

        Args:
            expected, got: of the two ways.
            size: of the images, in pixels.
        """
        for mine, theirs in zip(expected, got, strict=True):
            mine, theirs = mine[mine[:, 4] > 0], theirs[theirs[:, 4] > 0]
            far = np.abs(mine[:, None] - theirs[None])
            near = (far[..., :4] < BOX_TOLERANCE * size).all(-1)
            near &= (far[..., 4] < BOX_TOLERANCE) & (far[..., 5] == 0)
            self.boxes += len(mine)
            self.agree += int(near.any(1).sum())
            self.others += max(len(theirs) - len(mine), 0)

    def require(self, what: str) -> None:
        """Raise VerificationError unless they agree."""
        if self.agree >= BOX_AGREEMENT * self.boxes and self.others <= (
            (1 - BOX_AGREEMENT) * self.boxes
        ):
            return
        raise VerificationError(
            f"{what}: its boxes are not those of the simulator: {self.agree} of {self.boxes} "
            f"agree, and it has {self.others} more; the file was not kept"
        )
