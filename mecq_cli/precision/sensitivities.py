"""Sensitivities by name: what it costs to round the weights of one layer alone to b bits."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Literal, get_args

import torch
from torch import Tensor

from mecq_cli.calibration import float_mode
from mecq_cli.errors import NumericError
from mecq_cli.events import Listener
from mecq_cli.insertion import QuantizedModel
from mecq_cli.precision.choices import Choice
from mecq_cli.precision.coding import CodingDistance
from mecq_cli.precision.hessian import curvature_costs, parts_of
from mecq_cli.precision.loss import Divergence, LossDistance
from mecq_cli.precision.rounding import MakeQuantizer, Outputs, outputs_of, outputs_rounded
from mecq_cli.tasks.divergence import divergence

Sensitivity = Literal["coding", "hessian", "loss"]
SENSITIVITIES: tuple[str, ...] = get_args(Sensitivity)

Sensitivities = dict[str, dict[int, float]]
"""For each layer, the cost of each number of bits."""

_TASK = "sensitivity"

_NOTHING = 1e-12
"""Nats: noise of float64, as where two rows are compared, whose geometry is always the same."""


def measure(
    kind: Sensitivity,
    model: QuantizedModel,
    images: Tensor,
    choices: Sequence[Choice],
    make: MakeQuantizer,
    *,
    distortion: float = 0.06,
    seed: int = 0,
    listener: Listener | None = None,
    divergence: Divergence = divergence,
) -> Sensitivities:
    """Measure on images; the network is in float but for the layer in question.

    Args:
        kind: one of `SENSITIVITIES`.
        model: the quantized network, which taps what `coding` looks at; left as it was.
        images: normalised [N, C, H, W], on its device.
        choices: what to measure; those with nothing to choose are left out.
        make: the quantizers of the weights.
        distortion: of the coding length.
        seed: of random signs.
        listener: hears of the progress.
        divergence: of the task, which `loss` is measured by; `hessian` is for classes alone.

    Returns:
        Costs of 0 and more, none of which rises with the bits: where rounding to fewer bits happens
        to do less harm than rounding to more, a layer need not have more.

    Raises:
        NumericError: one that is not finite, or a geometry that rounding does not change at all.
    """
    listener = listener or Listener()
    wanted = [choice for choice in choices if choice.open]
    with float_mode(model):
        if kind == "hessian":
            found = _by_curvature(model, images, wanted, make, seed, listener)
        else:
            reference = outputs_of(model, images)
            distance: Callable[[Outputs], float] = LossDistance(reference, divergence)
            if kind == "coding":
                distance = CodingDistance(reference, distortion)
            found = _by_outputs(model, images, wanted, make, distance, listener)
    for name, costs in found.items():
        if not all(map(math.isfinite, costs.values())):
            raise NumericError(
                f"--sensitivity {kind}: layer {name} gives a number that is not finite; check "
                "weights and images, or give --wbits instead of a target"
            )
    unseen = [name for name, costs in found.items() if max(costs.values()) < _NOTHING]
    if kind == "coding" and unseen and len(unseen) == len(found):
        seen = f"{len(images)} image{'s' * (len(images) != 1)}"
        raise NumericError(
            f"--sensitivity {kind}: on {seen} rounding makes no difference in any layer; give more "
            "training images, another sensitivity, or --wbits instead of a target"
        )
    if unseen:
        listener.warn(
            f"--sensitivity {kind}: rounding {len(unseen)} of {len(found)} layers makes no "
            f"difference, so they get few bits: {', '.join(unseen[:3])}"
            f"{', ...' * (len(unseen) > 3)}; [[layers]] patterns can give them more"
        )
    return {name: _falling(costs) for name, costs in found.items()}


def _falling(costs: dict[int, float]) -> dict[int, float]:
    """The least cost of so many bits or fewer."""
    bits = sorted(costs)
    return dict(zip(bits, accumulate((max(costs[b], 0.0) for b in bits), min), strict=True))


def _by_outputs(
    model: QuantizedModel,
    images: Tensor,
    choices: Sequence[Choice],
    make: MakeQuantizer,
    distance: Callable[[Outputs], float],
    listener: Listener,
) -> Sensitivities:
    found: Sensitivities = {}
    listener.start(_TASK, sum(len(choice.bits) for choice in choices))
    for done, (choice, bits, outputs) in enumerate(
        outputs_rounded(model, images, choices, make), 1
    ):
        found.setdefault(choice.name, {})[bits] = distance(outputs)
        listener.advance(_TASK, done)
    listener.finish(_TASK)
    return found


def _by_curvature(
    model: QuantizedModel,
    images: Tensor,
    choices: Sequence[Choice],
    make: MakeQuantizer,
    seed: int,
    listener: Listener,
) -> Sensitivities:
    done = 0

    def told() -> None:
        nonlocal done
        done += 1
        listener.advance(_TASK, done)

    listener.start(_TASK, len(parts_of(images)))
    with torch.autocast(images.device.type, enabled=False):
        found = curvature_costs(model, images, choices, make, seed, told)
    listener.finish(_TASK)
    return found
