"""Sensitivity by curvature: the trace of a layer's Hessian, and how far rounding moves its weights.

HAWQ-V2 (Dong et al., arXiv 1911.03852) takes the mean of the Hessian's eigenvalues, tr H / n, times
the squared rounding error |w_b - w|^2; half of that is the second-order estimate of the loss it
adds. The trace is Hutchinson's estimate, the mean of v^T H v over random signs v; one product with
the Hessian serves all layers, since signs of other layers average out.

Departure: the loss is the divergence of the outputs from the float network's own, as in loss.py,
not the cross-entropy with labels. At the float weights its Hessian is the Gauss-Newton matrix of
both: no curvature is negative, and it does not matter how well the network knows the labels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mecq_cli.insertion import QuantizedModel
from mecq_cli.precision.choices import Choice
from mecq_cli.precision.rounding import MakeQuantizer, rounded
from mecq_cli.sites import ProductSite

PROBES = 48
"""Products with the Hessian, over all parts of the images."""

PART = 300_000
"""Input values at a time: the graph of a gradient holds several times what a training step does."""


def curvature_costs(
    model: QuantizedModel,
    images: Tensor,
    choices: Sequence[Choice],
    make: MakeQuantizer,
    seed: int,
    told: Callable[[], None],
    classes: int | None = None,
) -> dict[str, dict[int, float]]:
    """The second-order estimate, in nats, for each layer and each number of bits.

    Args:
        model: in float (`mecq_cli.calibration.float_mode`).
        images: [N, C, H, W].
        choices: the layers.
        make: the quantizers.
        seed: of the signs.
        told: called after each part of the images.
        classes: how many of the outputs are logits; None: all.
    """
    sites = {site.name: site for site in model.sites()}
    weights = [_weight(sites[choice.name]) for choice in choices]
    traces = _traces(model, images, weights, seed, told, classes)
    costs: dict[str, dict[int, float]] = {}
    for choice, weight, trace in zip(choices, weights, traces, strict=True):
        mean = max(trace, 0.0) / choice.weights  # of an estimate that may fall below zero
        costs[choice.name] = {
            bits: 0.5 * mean * float((rounded(weight, bits, make) - weight.detach()).square().sum())
            for bits in choice.bits
        }
    return costs


def parts_of(images: Tensor) -> list[Tensor]:
    """The images in parts whose graphs fit into memory."""
    return list(images.split(max(PART // images[0].numel(), 2)))


def _traces(
    model: QuantizedModel,
    images: Tensor,
    weights: Sequence[Tensor],
    seed: int,
    told: Callable[[], None],
    classes: int | None,
) -> list[float]:
    """Of the diagonal block of each weight."""
    parts = parts_of(images)
    probes = -(-PROBES // len(parts))
    generator = torch.Generator(images.device).manual_seed(seed)
    totals = torch.zeros(len(weights), dtype=torch.float64, device=images.device)
    for part in parts:
        with torch.enable_grad():
            outputs = torch.log_softmax(model(part)[:, :classes], 1)
            goal = outputs.detach().exp()
            loss = -(goal * outputs).sum(1).mean()
            slopes = torch.autograd.grad(loss, weights, create_graph=True)
        for _ in range(probes):
            signs = [
                torch.randint(0, 2, w.shape, generator=generator, device=w.device).to(w) * 2 - 1
                for w in weights
            ]
            products = torch.autograd.grad(slopes, weights, signs, retain_graph=True)
            found = [
                (v * hv).sum(dtype=torch.float64) for v, hv in zip(signs, products, strict=True)
            ]
            totals += torch.stack(found) * (len(part) / probes)
        told()
    traces: list[float] = (totals / len(images)).tolist()
    return traces


def _weight(site: object) -> Tensor:
    assert isinstance(site, ProductSite)
    return site.weight
