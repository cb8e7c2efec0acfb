"""A new last layer, fitted to what the float network in front of it puts out.

Whoever has classes of his own gets a network without a layer for them. Trained from random weights
along with the rounding, that layer learns while everything in front of it changes, and there is
nothing to distil from. Logistic regression on the features of the float network takes one pass over
the images and no step, and makes it a teacher.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PENALTIES = (1.0, 0.1, 1e-2, 1e-3, 1e-4)
"""Weights of the squared weights, of which held out images choose one; each begins where the one
before ended."""

DEFAULT_PENALTY = 1e-2
"""Where there are too few images to hold some out."""

HELD_OUT = 5
"""Every fifth image chooses the penalty."""

FEWEST = 50
"""Images from which on some are held out for that."""

_ITERATIONS = 100


def last_layer(module: nn.Module, names: Sequence[str]) -> nn.Linear | None:
    """The one linear layer that makes the outputs; None where they come about otherwise.

    Args:
        module: a classifier.
        names: of the submodules that make its outputs.
    """
    if len(names) != 1:
        return None
    found = module.get_submodule(names[0])
    return found if isinstance(found, nn.Linear) else None


@torch.no_grad()
def inputs_of(module: nn.Module, layer: nn.Linear, batches: Iterable[Tensor]) -> Tensor | None:
    """What reaches the layer, float32 [images, d] on the CPU.

    Args:
        module: in evaluation mode.
        layer: one of its layers.
        batches: normalised images.

    Returns:
        None where that is not a row for each image, of which the output is that of the network.
    """
    seen: list[tuple[Tensor, Tensor]] = []
    handle = layer.register_forward_hook(lambda _, given, out: seen.append((given[0], out)))
    rows = []
    try:
        for images in batches:
            seen.clear()
            outputs = module(images)
            if len(seen) != 1 or seen[0][0].dim() != 2 or not torch.equal(seen[0][1], outputs):
                return None
            rows.append(seen[0][0].float().cpu())
    finally:
        handle.remove()
    return torch.cat(rows)


def fit(
    features: Tensor, labels: Tensor, classes: int, *, bias: bool = True
) -> tuple[Tensor, Tensor]:
    """Weight [classes, d] and bias [classes] of a logistic regression.

    The mean cross-entropy, and the squared weights of features at variance 1 times a penalty, are
    minimised by L-BFGS.

    Args:
        features: float32 [images, d].
        labels: int64 [images].
        classes: how many there are, with or without images.
        bias: whether the layer has one; else it is 0, and features are scaled to a mean square of
            1 instead.
    """
    mean = features.mean(0) if bias else torch.zeros_like(features[0])
    size = (features - mean).square().mean(0).sqrt()
    # A feature that never changes has nothing to say, and must not be divided by nothing.
    scale = torch.where(size > 1e-6 * (mean.abs() + 1e-6), size, torch.inf)
    rows = (features - mean) / scale
    if bias:
        rows = F.pad(rows, (0, 1), value=1.0)
    penalty = _best_penalty(rows, labels, classes, bias) if len(rows) >= FEWEST else DEFAULT_PENALTY
    solution = rows.new_zeros(classes, rows.shape[1])
    for each in (p for p in PENALTIES if p >= penalty):
        solution = _solve(rows, labels, solution, each, bias)
    weight = solution[:, : len(scale)] / scale
    return weight, solution[:, -1] - weight @ mean if bias else weight.new_zeros(classes)


def _best_penalty(rows: Tensor, labels: Tensor, classes: int, bias: bool) -> float:
    """That of least cross-entropy on images that were not fitted to."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    held, fitted = order[::HELD_OUT], order[torch.arange(len(order)) % HELD_OUT != 0]
    solution = rows.new_zeros(classes, rows.shape[1])
    errors = []
    for penalty in PENALTIES:
        solution = _solve(rows[fitted], labels[fitted], solution, penalty, bias)
        errors.append(float(F.cross_entropy(rows[held] @ solution.mT, labels[held])))
    return PENALTIES[errors.index(min(errors))]


def _solve(rows: Tensor, labels: Tensor, start: Tensor, penalty: float, bias: bool) -> Tensor:
    """[classes, columns]; with a ``bias`` that is the last column, which is not penalised."""
    solution = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [solution],
        max_iter=_ITERATIONS,
        tolerance_grad=1e-5,
        history_size=10,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        weights = solution[:, :-1] if bias else solution
        loss: Tensor = F.cross_entropy(rows @ solution.mT, labels)
        loss = loss + 0.5 * penalty * weights.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return solution.detach()
