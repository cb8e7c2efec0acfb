"""The coding length of values: weights or activations as scalars, with their long tails.

One Gaussian is a poor code for a long-tailed tensor. A mixture with a hard choice for each value
costs sum_j pi_j [ 1/2 log(1 + sigma_j^2 / eps^2) - log pi_j ] nats a value: the rate within the
component and the label that names it. One component is always among those compared, since more
can cost more than they save.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mecq_cli.entropy.base import eager
from mecq_cli.errors import UsageError

# The components are fitted on no more values than these, in this many rounds.
_FITTED = 65536
_ROUNDS = 10


@eager
def value_coding_length(values: Tensor, *, distortion: float, components: int = 4) -> Tensor:
    """Nats a value that a Gaussian mixture code needs up to a squared error of ``distortion``.

    The cheapest of 1, 2, 4, ... ``components`` Gaussians. Differentiable with the choices of the
    values held fixed, which is its gradient wherever no value changes sides.

    Args:
        values: any shape; all elements count as one population.
        distortion: eps^2, in squared units of the values (a quantizer's step squared, say).
        components: most components to try, 1 to 64.

    Returns:
        A scalar in float32 or better.

    Raises:
        UsageError: no values, or settings that make no sense.
    """
    if not values.numel() or not values.is_floating_point():
        raise UsageError(f"value coding length: got {values.numel()} values of {values.dtype}")
    if not (math.isfinite(distortion) and distortion > 0.0):
        raise UsageError(f"value coding length: distortion is {distortion}; give a positive number")
    if not 1 <= components <= 64:
        raise UsageError(f"value coding length: components is {components}; give 1 to 64")
    with torch.autocast(values.device.type, enabled=False):
        flat = values.flatten() if values.dtype == torch.float64 else values.flatten().float()
        best = coding_length_of_labels(flat, torch.zeros_like(flat, dtype=torch.long), distortion)
        count = 2
        while count <= components:
            with torch.no_grad():
                labels = _labels(flat, count, distortion)
            length = coding_length_of_labels(flat, labels, distortion)
            best = length if bool(length < best) else best
            count *= 2
        return best


def coding_length_of_labels(flat: Tensor, labels: Tensor, distortion: float) -> Tensor:
    """The code's nats a value for values [N] with components labels [N] (0, 1, ...)."""
    count = int(labels.max()) + 1
    sizes = torch.zeros(count, dtype=flat.dtype, device=flat.device)
    sizes = sizes.index_add(0, labels, torch.ones_like(flat))
    filled = sizes.clamp(min=1.0)
    means = torch.zeros_like(sizes).index_add(0, labels, flat) / filled
    squares = (flat - means[labels]).square()
    variances = torch.zeros_like(sizes).index_add(0, labels, squares) / filled
    share = sizes / flat.numel()
    label_cost = -torch.xlogy(share, share)
    return (share * 0.5 * torch.log1p(variances / distortion) + label_cost).sum()


def _labels(flat: Tensor, count: int, distortion: float) -> Tensor:
    """Components by hard expectation maximisation on a part of the values, labels for all.

    They start nested around the median, as bulk and tails of one distribution are.
    """
    part = flat[:: -(-flat.numel() // _FITTED)]
    distance = (part - part.median()).abs()
    edges = torch.arange(1, count, device=flat.device, dtype=flat.dtype)
    edges = torch.quantile(distance, 1.0 - 0.5**edges)
    labels = torch.bucketize(distance, edges)
    for _ in range(_ROUNDS):
        sizes = torch.bincount(labels, minlength=count).to(flat.dtype)
        filled = sizes.clamp(min=1.0)
        means = torch.zeros_like(sizes).index_add(0, labels, part) / filled
        squares = (part - means[labels]).square()
        variances = torch.zeros_like(sizes).index_add(0, labels, squares) / filled + distortion
        offsets = 0.5 * variances.log() - (sizes / part.numel()).log()
        labels = _cheapest(part, means, variances, offsets)
    return _cheapest(flat, means, variances, offsets)


def _cheapest(flat: Tensor, means: Tensor, variances: Tensor, offsets: Tensor) -> Tensor:
    """For each value the component of the least -log density; an empty one has offset inf."""
    labels = torch.zeros_like(flat, dtype=torch.long)
    least = torch.full_like(flat, math.inf)
    for j in range(len(means)):
        cost = (flat - means[j]).square() / (2.0 * variances[j]) + offsets[j]
        closer = cost < least
        labels[closer] = j
        least = torch.where(closer, cost, least)
    return labels
