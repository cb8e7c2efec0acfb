"""What a training step costs: the FP network, mecq, a plain LSQ and Brevitas, in one run.

    python -m tests.studies.training_step [MODEL:BATCH[:SIZE] ...] [--rounds N] [--json FILE]

All arms have random weights, the same synthetic images, SGD and bf16 autocast where mecq's step
has it, and take turns step by step. Peak memory is that of a process of its own for each arm.
Brevitas is measured where it is installed (`pip install brevitas dependencies==2.0.1`).

* fp, eager and compiled: the yardsticks.
* mecq: the whole default step at W2 A2, with distillation, regularizer and 8-bit residual stream;
  with the model compiled, with the quantizers compiled, and without a compiler.
* quantizers: of mecq alone, model compiled.
* LSQ: each Conv2d and Linear replaced by one that rounds weight and input, written as in the
  pseudocode of arXiv 1902.08153 with PyTorch's own operations. No residual stream.
* Brevitas: `layerwise_quantize` with its 2-bit per-channel weights and per-tensor activations
  whose scale is a parameter. No residual stream either.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mecq_cli.config import QuantizeConfig
from mecq_cli.events import Listener
from mecq_cli.workflow import bench_train
from mecq_cli.workflow.bench_train import Bench, Step, make_step
from mecq_cli.workflow.common import pick_device
from mecq_cli.workflow.machine import cpu_name

DEFAULT = ["resnet20_cifar:128", "resnet18:8", "mobilenetv2_100:8", "resnet50:4"]
OURS = {
    "fp, eager": ("fp", "off"),
    "fp, compiled": ("fp", "model"),
    "quantizers, compiled": ("quantizers", "model"),
    "mecq, model compiled": ("recipe", "model"),
    "mecq, quantizers compiled": ("recipe", "quantizers"),
    "mecq, eager": ("recipe", "off"),
}
BITS = 2


class PlainLsq(nn.Module):
    """A learned step for one tensor: detach tricks and all, as everybody writes it first."""

    def __init__(self, first: Tensor, *, signed: bool, channels: int = 1) -> None:
        super().__init__()
        self.low = -(2 ** (BITS - 1)) if signed else 0
        self.high = 2 ** (BITS - 1) - 1 if signed else 2**BITS - 1
        start = 2 * first.abs().mean() / math.sqrt(self.high)
        self.step = nn.Parameter(start.detach().float().expand(channels).clone())

    def forward(self, x: Tensor) -> Tensor:
        g = 1.0 / math.sqrt(x.numel() / len(x) * self.high)
        step = self.step if len(self.step) == 1 else self.step.view(-1, *[1] * (x.dim() - 1))
        step = (step - step * g).detach() + step * g
        v = torch.clamp(x / step, self.low, self.high)
        return ((v.round() - v).detach() + v) * step


class LsqLayer(nn.Module):
    """A Conv2d or Linear between two of them."""

    def __init__(self, layer: nn.Conv2d | nn.Linear) -> None:
        super().__init__()
        self.layer = layer
        self.of_weight = PlainLsq(layer.weight, signed=True, channels=len(layer.weight))
        self.of_input = PlainLsq(torch.ones(1), signed=False)

    def forward(self, x: Tensor) -> Tensor:
        weight, x = self.of_weight(self.layer.weight), self.of_input(x)
        if isinstance(self.layer, nn.Linear):
            return F.linear(x, weight, self.layer.bias)
        out: Tensor = self.layer._conv_forward(x, weight, self.layer.bias)
        return out


def with_lsq(network: nn.Module) -> nn.Module:
    for name, child in network.named_children():
        if isinstance(child, (nn.Conv2d, nn.Linear)):
            setattr(network, name, LsqLayer(child))
        else:
            with_lsq(child)
    return network


def with_brevitas(network: nn.Module) -> nn.Module:
    import brevitas.nn as qnn  # type: ignore[import-not-found,unused-ignore]
    from brevitas.graph.quantize import (  # type: ignore[import-not-found,unused-ignore]
        layerwise_quantize,
    )
    from brevitas.quant import (  # type: ignore[import-not-found,unused-ignore]
        Int8WeightPerChannelFloat,
        Uint8ActPerTensorFloat,
    )

    settings = {
        "weight_quant": Int8WeightPerChannelFloat,
        "weight_bit_width": BITS,
        "input_quant": Uint8ActPerTensorFloat,
        "input_bit_width": BITS,
        # Its default gathers a percentile during the first 300 steps, which costs more.
        "input_scaling_impl_type": "parameter",
        "input_scaling_init": 1.0,
        "return_quant_tensor": False,
    }
    layers = {
        nn.Conv2d: (qnn.QuantConv2d, settings),
        nn.Linear: (qnn.QuantLinear, settings),
    }
    quantized: nn.Module = layerwise_quantize(network, compute_layer_map=layers)
    return quantized


PEERS: dict[str, Callable[[nn.Module], nn.Module]] = {"LSQ": with_lsq, "Brevitas": with_brevitas}


def bench_of(case: str, compiling: str) -> Bench:
    name, batch, *size = case.split(":")
    config = QuantizeConfig.model_validate({
        "model": name, "wbits": BITS, "abits": BITS, "data": "none", "pretrained": False,
        "compile": compiling, "img_size": int(size[0]) if size else None,
    })  # fmt: skip
    return Bench(config, int(batch), 1)


def step_of(arm: str, case: str) -> Step:
    if arm in OURS:
        name, compiling = OURS[arm]
        return make_step(name, bench_of(case, compiling), Listener())
    return make_step("fp", bench_of(case, "off"), Listener(), PEERS[arm])


def peak(arm: str, case: str, threads: int) -> float:
    torch.set_num_threads(threads)
    return bench_train.peak_of(lambda: step_of(arm, case), pick_device("auto"))


def measure(case: str, arms: list[str], rounds: int) -> list[dict[str, Any]]:
    device = pick_device("auto")
    steps = {}
    for arm in arms:
        torch.manual_seed(0)
        steps[arm] = step_of(arm, case)
        for _ in range(bench_train.WARM_STEPS):
            steps[arm]()
    times: dict[str, list[float]] = {arm: [] for arm in arms}
    for _ in range(rounds):
        for arm, step in steps.items():
            times[arm].append(bench_train.timed(step, device))
    steps.clear()
    rows = []
    for arm in arms:
        row: dict[str, Any] = {"model": case, "arm": arm}
        row["step_ms"] = 1e3 * statistics.median(times[arm])
        row["images_per_second"] = 1e3 * int(case.split(":")[1]) / row["step_ms"]
        for yardstick in ("fp, eager", "fp, compiled"):
            row[f"of {yardstick}"] = bench_train.ratio(times[arm], times[yardstick])
        row["peak_mb"] = bench_train.in_own_process(peak, arm, case, torch.get_num_threads())
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("cases", nargs="*", default=DEFAULT, metavar="MODEL:BATCH[:SIZE]")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    arms = [*OURS, "LSQ"]
    try:
        import brevitas  # noqa: F401

        arms.append("Brevitas")
    except ImportError:
        print("Brevitas is not installed: not measured")  # noqa: T201
    machine = {"cpu": cpu_name(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    print(machine)  # noqa: T201
    rows: list[dict[str, Any]] = []
    for case in given.cases:
        rows += measure(case, arms, given.rounds)
        print("| model:batch | arm | step, ms | images/s | of fp eager | compiled | peak, MB |")  # noqa: T201
        print("|---|---|---|---|---|---|---|")  # noqa: T201
        for row in rows:
            if row["model"] == case:
                cells = [case, row["arm"], f"{row['step_ms']:.0f}"]
                cells.append(f"{row['images_per_second']:.0f}")
                cells += [f"{row['of fp, eager']:.2f}", f"{row['of fp, compiled']:.2f}"]
                print("| " + " | ".join([*cells, f"{row['peak_mb']:.0f}"]) + " |", flush=True)  # noqa: T201
        if given.json:
            given.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
