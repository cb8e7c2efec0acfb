"""`mecq bench entropy`: error and time of the estimators of the coding length."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mecq_cli.entropy import MoeState, coding_length, normalise, share_of_answers
from mecq_cli.errors import NumericError, UsageError
from mecq_cli.events import Listener
from mecq_cli.workflow.machine import cpu_name

FAMILIES = (
    "isotropic",
    "relu",
    "relu-pooled",
    "classes-10",
    "classes-1000",
    "power-0.5",
    "power-1",
    "power-2",
    "rank-one",
    "duplicated",
    "zero",
)
# What bench shows of the mixture is its steady state: calls before the first that is timed.
_WARM_CALLS = 2
_TASK = "bench"


def make(family: str, samples: int, features: int, seed: int = 0) -> Tensor:
    """Rows of unit length [samples, features] with a spectrum of one of `FAMILIES`.

    Raises:
        UsageError: an unknown family.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    kind, _, detail = family.partition("-")
    if family not in FAMILIES:
        raise UsageError(f"family {family!r} is unknown; there are {', '.join(FAMILIES)}")
    if kind == "isotropic":
        rows = normal(samples, features)
    elif family == "relu":
        rows = F.relu(normal(samples, features))
    elif kind == "relu":  # pooled over 16 positions
        rows = torch.stack([F.relu(normal(samples, features)) for _ in range(16)]).mean(0)
    elif kind == "classes":
        labels = torch.randint(0, int(detail), (samples,), generator=generator)
        rows = normal(int(detail), features)[labels] + 0.3 * normal(samples, features)
    elif kind == "power":
        scale = torch.arange(1, features + 1).pow(-float(detail) / 2)
        mixing = torch.linalg.qr(normal(features, min(features, 8))).Q
        rows = normal(samples, features) * scale
        rows = rows - 2.0 * (rows @ mixing) @ mixing.mT
    elif kind == "rank":
        rows = normal(samples, 1) * normal(1, features)
    elif kind == "duplicated":  # each row eight times
        rows = normal(-(-samples // 8), features).repeat(8, 1)[:samples]
    else:
        rows = torch.zeros(samples, features)
    return normalise(rows)


def bench(
    sizes: Sequence[tuple[int, int]],
    families: Sequence[str],
    distortions: Sequence[float],
    repeats: int,
    listener: Listener,
) -> dict[str, Any]:
    """Value error, gradient angle and time of forward and backward, against float64.

    The estimators take turns, so that what else the machine does meets all of them, and the
    speed-up is the median of the ratios. ``moe`` has a state and is warm; ``moe_alone`` is not.

    Returns:
        {"machine": ..., "rows": [...], "experts": share of all calls each expert answered}.
    """
    rows = []
    counts: dict[str, int] = {}
    listener.start(_TASK, len(sizes) * len(families) * len(distortions))
    for samples, features in sizes:
        for family in families:
            z = make(family, samples, features)
            for distortion in distortions:
                row, state = _row(z, distortion, repeats)
                for name, count in state.counts.items():
                    counts[name] = counts.get(name, 0) + count
                rows.append({"samples": samples, "features": features, "family": family, **row})
                listener.advance(_TASK, len(rows))
    listener.finish(_TASK)
    return {"machine": machine(), "rows": rows, "experts": share_of_answers(counts)}


def machine() -> dict[str, Any]:
    """What the times depend on."""
    return {
        "cpu": cpu_name(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def _row(z: Tensor, distortion: float, repeats: int) -> tuple[dict[str, Any], MoeState]:
    reference = _call(z.double(), distortion, estimator="exact")
    state = MoeState()
    times: dict[str, list[float]] = {"exact": [], "taylor": [], "moe": [], "moe_alone": []}
    errors: dict[str, tuple[float, float]] = {}
    for turn in range(-_WARM_CALLS, repeats):
        for name, options in _contestants(state).items():
            if turn < 0 and name != "moe":
                continue
            try:
                answer = _call(z, distortion, **options)
            except NumericError:  # the series does not hold, and says so
                continue
            worst = errors.get(name, (0.0, 0.0))
            off = _error(answer, reference)
            errors[name] = (max(worst[0], off[0]), max(worst[1], off[1]))
            if turn >= 0:
                times[name].append(answer[2])
    row: dict[str, Any] = {"distortion": distortion, "value": float(reference[0])}
    for name, seconds in times.items():
        row[name] = _summary(seconds, times["exact"], errors[name]) if seconds else None
    row["experts"] = share_of_answers(state.counts)
    return row, state


def _contestants(state: MoeState) -> dict[str, dict[str, Any]]:
    return {
        "exact": {"estimator": "exact"},
        "taylor": {"estimator": "taylor"},
        "moe": {"estimator": "moe", "state": state},
        "moe_alone": {"estimator": "moe"},
    }


def _call(z: Tensor, distortion: float, **options: Any) -> tuple[Tensor, Tensor, float]:
    """Value, gradient, seconds."""
    z = z.detach().requires_grad_()
    start = time.perf_counter()
    value = coding_length(z, distortion=distortion, **options)
    value.backward()
    if z.device.type == "cuda":
        torch.cuda.synchronize(z.device)
    seconds = time.perf_counter() - start
    assert z.grad is not None
    return value.detach().double(), z.grad.double(), seconds


def _error(
    answer: tuple[Tensor, Tensor, float], reference: tuple[Tensor, Tensor, float]
) -> tuple[float, float]:
    """Relative error of the value, one minus the cosine of the gradients."""
    true, gradient = reference[0], reference[1].flatten()
    if not bool(gradient.any()):
        return float((answer[0] - true).abs()), float(answer[1].abs().amax())
    cosine = F.cosine_similarity(answer[1].flatten(), gradient, dim=0)
    return float((answer[0] - true).abs() / true), float(1.0 - cosine)


def _summary(
    seconds: list[float], exact: list[float], error: tuple[float, float]
) -> dict[str, float]:
    return {
        "value_error": error[0],
        "one_minus_cosine": error[1],
        "seconds": statistics.median(seconds),
        "speedup": statistics.median(e / s for e, s in zip(exact, seconds, strict=True)),
    }
