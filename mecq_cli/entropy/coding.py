"""The coding length by the name of its estimator."""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches
from typing import Any

from torch import Tensor

from mecq_cli.entropy.base import eager
from mecq_cli.entropy.exact import exact_coding_length
from mecq_cli.entropy.moe import moe_coding_length
from mecq_cli.entropy.taylor import taylor_coding_length
from mecq_cli.errors import UsageError

ESTIMATORS: dict[str, Callable[..., Tensor]] = {
    "moe": moe_coding_length,
    "exact": exact_coding_length,
    "taylor": taylor_coding_length,
}


def require_estimator(name: str) -> None:
    """Raise UsageError unless there is an estimator of that name."""
    if name not in ESTIMATORS:
        near = get_close_matches(name.lower(), ESTIMATORS, n=1, cutoff=0.5)
        hint = f"did you mean '{near[0]}'? " if near else ""
        raise UsageError(f"--mec-estimator: got {name!r}; {hint}allowed: {', '.join(ESTIMATORS)}")


@eager
def coding_length(
    z: Tensor, *, distortion: float = 0.06, estimator: str = "moe", **options: Any
) -> Tensor:
    """logdet(I_m + z z^T / (m * distortion)): the minimal coding length of z, in nats.

    The rate of lossy coding of MEC (arXiv 2210.11464, Eq. 2) without its factor (m + d) / 2.
    Differentiable; computed in float32 or better under any autocast; finite for every finite z.

    Args:
        z: [m, d] samples in rows, taken as they are: centre and normalise them before.
        distortion: eps_d^2 = eps^2 / d.
        estimator: "moe", the cheapest of several experts within a bound of 1e-3; "exact", by a
            Cholesky factorisation; "taylor", the parent paper's series around zero.
        options: what the estimator takes: ``state``, ``tolerance``, ``experts`` (moe); ``order``,
            ``on_divergence``, ``tolerance`` (taylor).

    Returns:
        A scalar on z's device, float64 for float64 and float32 for every other z.

    Raises:
        UsageError: a shape, estimator or option that makes no sense.
        NumericError: "taylor" does not hold for this z.
    """
    if estimator not in ESTIMATORS:
        raise UsageError(
            f"estimator {estimator!r} is unknown; there are {', '.join(sorted(ESTIMATORS))}"
        )
    if z.dim() != 2:
        raise UsageError(
            f"coding length: z has the shape {list(z.shape)}; give [samples, features]"
        )
    return ESTIMATORS[estimator](z, distortion, **options)
