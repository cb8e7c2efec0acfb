"""Brevitas's quantization-aware training on the same batches, for a row of the comparison.

    python -m tests.studies.results.brevitas_arm --data DIR --model NAME --checkpoint FILE ...

Its stock quantizers: `Int8WeightPerChannelFloat` with a scale that begins at the statistics of the
weights and is learned, `Uint8ActPerTensorFloat` (a percentile of the first 300 steps, then
learned), at the bits of the table; 8 bits in the first and last layer; SGD, schedule, weight decay,
autocast and augmentation as mecq's default has them. Batch norm statistics are measured anew at the
end, as for every arm. The last line of the output is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.scheduler.cosine_lr import CosineLRScheduler
from torch import Tensor, nn

from mecq_cli.config import QuantizeConfig
from mecq_cli.data import (
    ImageDataset,
    batches_per_epoch,
    limit_per_class,
    normalize,
    open_evaluation,
    open_split,
    train_batches,
)
from mecq_cli.evaluation import evaluate
from mecq_cli.training.recipe import choose
from mecq_cli.workflow.common import evaluation_data, load_for_data

EDGE_BITS = 8
BN_IMAGES = 2048


def with_brevitas(network: nn.Module, wbits: int, abits: int) -> nn.Module:
    """Every Conv2d and Linear replaced; the first reads signed values."""
    import brevitas.nn as qnn  # type: ignore[import-not-found,unused-ignore]
    from brevitas.graph.quantize import (  # type: ignore[import-not-found,unused-ignore]
        layerwise_quantize,
    )
    from brevitas.quant import (  # type: ignore[import-not-found,unused-ignore]
        Int8ActPerTensorFloat,
        Int8WeightPerChannelFloat,
        Uint8ActPerTensorFloat,
    )

    names = [n for n, m in network.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    edges = [names[0], names[-1]]

    def layers(wb: int, ab: int, activation: Any) -> dict[type, Any]:
        settings = {
            "weight_quant": Int8WeightPerChannelFloat,
            "weight_bit_width": wb,
            "weight_scaling_impl_type": "parameter_from_stats",
            "input_quant": activation,
            "input_bit_width": ab,
            "return_quant_tensor": False,
        }
        return {nn.Conv2d: (qnn.QuantConv2d, settings), nn.Linear: (qnn.QuantLinear, settings)}

    inner = layers(wbits, abits, Uint8ActPerTensorFloat)
    network = layerwise_quantize(network, compute_layer_map=inner, name_blacklist=edges)
    for name, activation in zip(
        edges, (Int8ActPerTensorFloat, Uint8ActPerTensorFloat), strict=True
    ):
        others = [n for n in names if n != name]
        edge = layers(EDGE_BITS, EDGE_BITS, activation)
        network = layerwise_quantize(network, compute_layer_map=edge, name_blacklist=others)
    return network


def main() -> None:
    """Train one run and print its record."""
    parser = argparse.ArgumentParser()
    for name in ("data", "model", "checkpoint"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("wbits", "abits", "seed", "epochs", "threads"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--per-class", type=int)
    given = parser.parse_args()
    started = time.perf_counter()
    torch.set_num_threads(given.threads)
    torch.manual_seed(given.seed)

    split = open_split(given.data, "train")
    loaded, classes = load_for_data(
        given.model, split.classes, checkpoint=Path(given.checkpoint), pretrained=True,
        reset_classifier=False, img_size=None, crop_pct=None,
    )  # fmt: skip
    if given.per_class is not None:
        split = limit_per_class(split, given.per_class)
    preprocessing, device = loaded.preprocessing, torch.device("cpu")
    train = ImageDataset(split, preprocessing, classes.indices, train=True, seed=given.seed)
    val = evaluation_data(open_evaluation(given.data), preprocessing, classes)
    train.preload(0)
    fp_top1 = evaluate(loaded.module.eval(), val, batch_size=256, device=device).figures["top1"]

    config = QuantizeConfig.model_validate({
        "model": given.model, "data": given.data, "wbits": given.wbits, "abits": given.abits,
        "epochs": given.epochs,
    })  # fmt: skip
    steps = batches_per_epoch(len(split), 128)
    recipe = choose(config, steps, 128, device)
    network = with_brevitas(loaded.module, given.wbits, given.abits)
    network.train().to(memory_format=torch.channels_last)

    def images(epoch: int) -> Any:
        for batch in train_batches(train, batch_size=128, epoch=epoch):
            yield normalize(batch.images, preprocessing, device), batch.labels

    weights = [p for n, p in network.named_parameters() if p.dim() > 1 and "scaling" not in n]
    known = {id(p) for p in weights}
    others = [p for p in network.parameters() if id(p) not in known]
    groups: list[dict[str, Any]] = [
        {"params": weights, "weight_decay": recipe.weight_decay},
        {"params": others},
    ]
    optimizer = torch.optim.SGD(groups, lr=recipe.lr, momentum=0.9)
    schedule = CosineLRScheduler(
        optimizer, t_initial=recipe.total_steps, warmup_t=recipe.warmup_steps,
        warmup_lr_init=recipe.lr / 100, t_in_epochs=False,
    )  # fmt: skip
    step = 0
    for epoch in range(given.epochs):
        for x, labels in images(epoch):
            schedule.step_update(step)
            with torch.autocast("cpu", torch.bfloat16, enabled=recipe.bf16):
                logits: Tensor = network(x)
            loss = F.cross_entropy(logits.float(), labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            step += 1
    renew_statistics(network, images(2**20))
    top1 = evaluate(network.eval(), val, batch_size=256, device=device).figures["top1"]
    seconds = round(time.perf_counter() - started, 1)
    record = {"top1": top1, "fp_top1": fp_top1, "seconds": seconds}
    sys.stdout.write(json.dumps(record) + "\n")


@torch.no_grad()
def renew_statistics(network: nn.Module, batches: Any) -> None:
    """As `mecq_cli.calibration.reestimate_batch_norm` does."""
    for norm in network.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.reset_running_stats()
            norm.momentum = None
    seen = 0
    for x, _ in batches:
        network(x)
        seen += len(x)
        if seen >= BN_IMAGES:
            return


if __name__ == "__main__":
    main()
