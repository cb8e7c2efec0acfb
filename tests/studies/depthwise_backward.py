"""Measures the backward pass of depthwise convolutions: PyTorch's, in two types, and ours.

    python -m tests.studies.depthwise_backward [THREADS]

Prints a table of milliseconds of CPU time, medians of rounds in which all take turns.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mecq_cli import loops

ROUNDS = 7


class Case(NamedTuple):
    """A convolution, as EfficientNet-Lite0, MobileNetV2 or ConvNeXt has it."""

    images: int
    channels: int
    size: int
    kernel: int
    stride: int
    padding: int

    def __str__(self) -> str:
        return f"{self.channels}, {self.size}, {self.images}, {self.kernel}, {self.stride}"


CASES = (
    Case(32, 96, 49, 3, 2, 0),
    Case(32, 144, 27, 5, 2, 0),
    Case(32, 240, 12, 5, 1, 2),
    Case(32, 672, 9, 5, 2, 0),
    Case(32, 1152, 3, 5, 1, 2),
    Case(8, 96, 112, 3, 2, 1),
    Case(8, 96, 56, 7, 1, 3),
    Case(32, 144, 24, 3, 1, 1),
)


def main(threads: int) -> None:
    """Print the table."""
    torch.set_num_threads(threads)
    if not loops.is_available():
        sys.exit("there is no C++ compiler here")
    rows = [
        "| channels, pixels, images, kernel, stride | float32, ms | bfloat16, ms | ours, ms |",
        "|---|---|---|---|",
    ]
    for case in CASES:
        times = " | ".join(f"{seconds * 1e3:.1f}" for seconds in measure(case))
        rows.append(f"| {case} | {times} |")
    print("\n".join(rows))  # noqa: T201


def measure(case: Case) -> list[float]:
    """Seconds of CPU time: float32, bfloat16, and ours in bfloat16."""
    arms = [_theirs(case, torch.float32), _theirs(case, torch.bfloat16), _ours(case)]
    taken: list[list[float]] = [[] for _ in arms]
    for _ in range(ROUNDS + 1):
        for arm, times in zip(arms, taken, strict=True):
            start = time.process_time()
            arm()
            times.append(time.process_time() - start)
    return [statistics.median(times[1:]) for times in taken]


def _tensors(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient, map and weight."""
    torch.manual_seed(0)
    x = torch.randn(case.images, case.channels, case.size, case.size, dtype=dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    weight = torch.randn(case.channels, 1, case.kernel, case.kernel, dtype=dtype)
    out = torch.conv2d(x, weight, None, case.stride, case.padding, 1, case.channels)
    return torch.randn_like(out), x, weight


def _theirs(case: Case, dtype: torch.dtype) -> Callable[[], object]:
    grad, x, weight = _tensors(case, dtype)
    both = [case.stride] * 2, [case.padding] * 2, [1, 1]
    return lambda: torch.ops.aten.convolution_backward(
        grad, x, weight, None, *both, False, [0, 0], case.channels, [True, True, False]
    )


def _ours(case: Case) -> Callable[[], object]:
    grad, x, weight = _tensors(case, torch.bfloat16)
    both = [case.stride] * 2, [case.padding] * 2, [1, 1]
    return lambda: loops.depthwise_backward(grad, x, weight, *both)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1)
