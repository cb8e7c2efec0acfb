"""First activation steps from a few batches, and batch norm statistics measured anew."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mecq_cli.errors import NumericError
from mecq_cli.insertion import QuantizedModel
from mecq_cli.quantizers import ActivationQuantizer, Quantizer, WeightQuantizer
from mecq_cli.sites import DropoutSite

SAMPLE = 200_000
"""Values kept of each activation over all batches; the search reads them all."""


@torch.no_grad()
def calibrate(
    model: QuantizedModel,
    batches: Iterable[Tensor],
    count: int,
    *,
    to_be_trained: bool = False,
    trained: bool = False,
) -> None:
    """Give every activation quantizer its step and zero point.

    The network runs once in float with the FP batch norm statistics; every quantizer keeps an
    even sample of what reaches it and searches the step of least squared error.

    Where a network that is to be trained has no statistics yet, those of each batch are used, and
    not kept: what a network of random weights puts out without normalization may be of a size that
    it never has in training, and grids of that size make gradients that overflow.

    A network that was ``trained`` with rounded weights is no float network: neither do its weights
    mean anything before they are rounded, nor do its statistics fit them. So its weights stay
    rounded, by steps that are found already, and the statistics are those of each batch.

    Args:
        model: as inserted.
        batches: normalised images [N, C, H, W].
        count: how many batches there are.
        to_be_trained: batch norm will be that of the batches.
        trained: with other grids, as far as it got.

    Raises:
        NumericError: a value that is not finite reached a quantizer.
    """
    samples: dict[ActivationQuantizer, list[Tensor]] = {}
    share = max(SAMPLE // max(count, 1), 1)
    norms = [m for m in model.modules() if isinstance(m, (nn.BatchNorm2d, nn.BatchNorm1d))]
    fresh = [norm for norm in norms if trained or (to_be_trained and _is_fresh(norm))]
    with float_mode(model, rounded_weights=trained), _listening(model, samples, share):
        for images in batches:
            for norm in fresh:
                several = len(images) > 1  # one has no variance
                norm.train(several)
                norm.track_running_stats = not several
            model(images)
    for norm in fresh:
        norm.track_running_stats = True
    for site in model.sites():
        quantizer = site.output_quantizer
        if quantizer is None or quantizer not in samples:
            continue
        values = torch.cat(samples.pop(quantizer))
        if not bool(torch.isfinite(values).all()):
            raise NumericError(
                f"calibration: layer {site.name} puts out NaN or Inf in float already; "
                "check the weights and the images"
            )
        quantizer.initialize(values)


@contextmanager
def _listening(
    model: nn.Module, samples: dict[ActivationQuantizer, list[Tensor]], share: int
) -> Iterator[None]:
    def keep(module: nn.Module, arguments: Any) -> None:
        assert isinstance(module, ActivationQuantizer)
        values = arguments[0].detach().flatten()
        step = max(values.numel() // share, 1)
        # With no factor of any side it does not fall into the rhythm of rows and channels.
        while math.gcd(step, values.numel()) > 1:
            step += 1
        sample = values[::step].to(torch.float32, copy=True)  # a view would keep all
        samples.setdefault(module, []).append(sample)

    handles = [
        m.register_forward_pre_hook(keep)
        for m in model.modules()
        if isinstance(m, ActivationQuantizer)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def float_mode(model: nn.Module, *, rounded_weights: bool = False) -> Iterator[None]:
    """Real values through the training path: no rounding, FP statistics, no dropout.

    With ``rounded_weights`` those alone are on their grids.
    """
    was_training = model.training
    quantizers = [
        m
        for m in model.modules()
        if isinstance(m, Quantizer) and not (rounded_weights and isinstance(m, WeightQuantizer))
    ]
    model.train()
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.BatchNorm1d, DropoutSite)):
            module.eval()
    for quantizer in quantizers:
        quantizer.active = False
    try:
        yield
    finally:
        for quantizer in quantizers:
            quantizer.active = True
        model.train(was_training)


def _is_fresh(norm: nn.BatchNorm2d | nn.BatchNorm1d) -> bool:
    """Whether its statistics are those that it was made with."""
    mean, var = norm.running_mean, norm.running_var
    return mean is not None and var is not None and not mean.any() and bool((var == 1).all())


@torch.no_grad()
def reestimate_batch_norm(model: QuantizedModel, batches: Iterable[Tensor]) -> int:
    """Replace the running statistics by the average over ``batches`` of the quantized network.

    Returns the number of batches used; with none the statistics stay as they are.
    """
    norms = [m for m in model.modules() if isinstance(m, (nn.BatchNorm2d, nn.BatchNorm1d))]
    if not norms:
        return 0
    was_training = model.training
    old = [(n.momentum, n.running_mean, n.running_var) for n in norms]
    saved = [(m.clone(), v.clone()) for _, m, v in old if m is not None and v is not None]
    model.train()
    for module in model.modules():
        if isinstance(module, DropoutSite):
            module.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain average over all batches
    count = 0
    for images in batches:
        model(images)
        count += 1
    for norm, (momentum, _, _), (mean, var) in zip(norms, old, saved, strict=True):
        norm.momentum = momentum
        if count == 0 and norm.running_mean is not None and norm.running_var is not None:
            norm.running_mean.copy_(mean)
            norm.running_var.copy_(var)
    model.train(was_training)
    return count
