"""Sensitivity by curvature: the trace of a layer's Hessian, and how far rounding moves its weights.

HAWQ-V2 (Dong et al., arXiv 1911.03852) takes the mean of the Hessian's eigenvalues, tr H / n, times
the squared rounding error |w_b - w|^2; half of that is the second-order estimate of the loss it
adds.

Departures. The loss is the divergence of the outputs from the float network's own, as in loss.py,
not the cross-entropy with labels: it does not matter how well the network knows them. And the trace
is not Hutchinson's estimate v^T H v over random signs v: with signs for all layers at once the
products between layers drown a layer of little curvature, which then got a negative one, with
signs for one layer at a time each layer costs as much as all. At the float weights the Hessian is
the Gauss-Newton matrix, the sum over images of J^T (diag p - p p^T) J, J the derivative of the
logits and p their softmax. With random signs u for the logits and

    s = sqrt(p) u - p sum(sqrt(p) u),    E[s s^T] = diag p - p p^T,

the squared length of the gradient of sum(s logits) with respect to a layer's weights is its trace
in expectation, never negative, and one pass backwards serves all layers. Signs of other images are
independent, so a pass may hold several.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mecq_cli.insertion import QuantizedModel
from mecq_cli.precision.choices import Choice
from mecq_cli.precision.rounding import MakeQuantizer, rounded
from mecq_cli.sites import ProductSite

ROUNDS = 8
"""Passes backwards for each image."""

PART = 1_000_000
MOST_TOGETHER = 8
"""Input values and images at a time. The fewer, the more passes; the memory is that of a training
step."""


def curvature_costs(
    model: QuantizedModel,
    images: Tensor,
    choices: Sequence[Choice],
    make: MakeQuantizer,
    seed: int,
    told: Callable[[], None],
) -> dict[str, dict[int, float]]:
    """The second-order estimate, in nats, for each layer and each number of bits.

    Args:
        model: in float (`mecq_cli.calibration.float_mode`).
        images: [N, C, H, W].
        choices: the layers.
        make: the quantizers.
        seed: of the signs.
        told: called after each part of the images.
    """
    sites = {site.name: site for site in model.sites()}
    weights = [_weight(sites[choice.name]) for choice in choices]
    trained = [weight.requires_grad for weight in weights]
    try:
        for weight in weights:  # one that is not trained is rounded all the same
            weight.requires_grad_(True)
        traces = _traces(model, images, weights, seed, told)
    finally:
        for weight, was in zip(weights, trained, strict=True):
            weight.requires_grad_(was)
    costs: dict[str, dict[int, float]] = {}
    for choice, weight, trace in zip(choices, weights, traces, strict=True):
        mean = trace / choice.weights
        costs[choice.name] = {
            bits: 0.5 * mean * float((rounded(weight, bits, make) - weight.detach()).square().sum())
            for bits in choice.bits
        }
    return costs


def parts_of(images: Tensor) -> list[Tensor]:
    """The images in parts."""
    together = min(PART // images[0].numel(), MOST_TOGETHER)
    return list(images.split(max(together, 1)))


def _traces(
    model: QuantizedModel,
    images: Tensor,
    weights: Sequence[Tensor],
    seed: int,
    told: Callable[[], None],
) -> list[float]:
    """Of the diagonal block of each weight, for the mean loss of an image."""
    generator = torch.Generator(images.device).manual_seed(seed)
    totals = torch.zeros(len(weights), dtype=torch.float64, device=images.device)
    for part in parts_of(images):
        with torch.enable_grad():
            logits = model(part).float()
        roots = logits.detach().softmax(1).sqrt()
        # The loss is a mean over the pixels, where these are classified.
        scale = logits[0, 0].numel() ** -0.5
        for turn in range(ROUNDS):
            signs = torch.randint(0, 2, roots.shape, generator=generator, device=roots.device)
            signed = roots * (2 * signs - 1)
            slopes = (signed - roots.square() * signed.sum(1, keepdim=True)) * scale
            found = torch.autograd.grad(
                logits, weights, slopes, retain_graph=turn < ROUNDS - 1, materialize_grads=True
            )
            totals += torch.stack([g.square().sum(dtype=torch.float64) for g in found])
        told()
    traces: list[float] = (totals / (ROUNDS * len(images))).tolist()
    return traces


def _weight(site: object) -> Tensor:
    assert isinstance(site, ProductSite)
    return site.weight
