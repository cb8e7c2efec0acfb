"""`mecq bench train`: what a training step costs beside one of the FP network.

All arms share the images, the batch, the compile setting and bf16, and take turns step by step,
so that whatever else the machine does meets all of them. Random weights, synthetic images.
"""

from __future__ import annotations

import contextlib
import copy
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mecq_cli.calibration import calibrate
from mecq_cli.config import QuantizeConfig
from mecq_cli.events import Listener
from mecq_cli.models.loading import LoadedModel, load_model
from mecq_cli.models.order import channels_last
from mecq_cli.tasks.base import Task
from mecq_cli.tasks.registry import task_of
from mecq_cli.training.compiling import Compiler
from mecq_cli.training.family import Family, family_of
from mecq_cli.training.integer_teacher import make_teacher
from mecq_cli.training.memory_order import InMemoryOrder
from mecq_cli.training.recipe import Recipe, can_fuse, choose, make_optimizer
from mecq_cli.training.step import TrainingStep
from mecq_cli.workflow.common import insert_quantizers, pick_device, taps_of
from mecq_cli.workflow.machine import cpu_name

Step = Callable[[], object]

WARM_STEPS = 3
"""Steps before the first that is timed: compilation, allocation, cache."""
MEMORY_STEPS = 3

ARMS: Mapping[str, str] = {
    "fp": "the FP network",
    "quantizers": "quantizers alone",
    "distillation": "quantizers and distillation",
    "recipe": "quantizers, distillation and regularizer",
}


@dataclass(frozen=True)
class Bench:
    """What is measured.

    Attributes:
        config: the settings of the quantized arms.
        batch_size: images a step.
        rounds: timed steps of each arm.
        memory: measure the peak of each arm in a process of its own.
    """

    config: QuantizeConfig
    batch_size: int
    rounds: int
    memory: bool = True


def bench_train(bench: Bench, listener: Listener) -> dict[str, Any]:
    """Times of a step of each of `ARMS`, and the peak memory of each.

    Returns:
        fp_step_ms, qat_step_ms (of the whole recipe), ratio (median over the rounds),
        regularizer_share (of that step; the FP network runs for the distillation anyway),
        fp_peak_mb, qat_peak_mb, compile, and a row for each arm.
    """
    torch.manual_seed(0)
    steps: dict[str, Step] = {}
    for name in ARMS:
        listener.note(f"{ARMS[name]}: {WARM_STEPS} steps to warm up")
        steps[name] = make_step(name, bench, listener)
        for _ in range(WARM_STEPS):
            steps[name]()
    times: dict[str, list[float]] = {name: [] for name in ARMS}
    device = pick_device(bench.config.device)
    task = "rounds"
    listener.start(task, bench.rounds)
    for i in range(bench.rounds):
        for name in steps:  # by name: the last one would outlive the table
            times[name].append(timed(steps[name], device))
        listener.advance(task, i + 1)
    listener.finish(task)
    steps.clear()
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the processes below need the memory
    threads = torch.get_num_threads()
    peaks = {
        name: in_own_process(_peak, name, bench, threads) if bench.memory else None for name in ARMS
    }
    rows = [
        {
            "arm": name,
            "what": what,
            "step_ms": 1e3 * statistics.median(times[name]),
            "ratio": ratio(times[name], times["fp"]),
            "images_per_second": bench.batch_size / statistics.median(times[name]),
            "peak_mb": peaks[name],
        }
        for name, what in ARMS.items()
    ]
    by_name = {row["arm"]: row for row in rows}
    config = bench.config
    return {
        "model": config.model,
        "wbits": config.wbits,
        "abits": config.abits,
        "batch_size": bench.batch_size,
        "compile": config.compile,
        "device": str(device),
        "machine": {
            "cpu": cpu_name(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        },
        "fp_step_ms": by_name["fp"]["step_ms"],
        "qat_step_ms": by_name["recipe"]["step_ms"],
        "ratio": by_name["recipe"]["ratio"],
        "regularizer_share": 1.0 - ratio(times["distillation"], times["recipe"]),
        "fp_peak_mb": peaks["fp"],
        "qat_peak_mb": peaks["recipe"],
        "rows": rows,
    }


def make_step(
    name: str,
    bench: Bench,
    listener: Listener,
    change: Callable[[nn.Module], nn.Module] = lambda network: network,
) -> Step:
    """A training step of one arm on images it keeps; ``change`` is for the FP network of "fp"."""
    config, device = bench.config, pick_device(bench.config.device)
    loaded = load_model(config.model, pretrained=False, img_size=config.img_size)
    shape = (bench.batch_size, *loaded.preprocessing.input_size)
    generator = torch.Generator().manual_seed(0)
    # Each of a colour of its own: pure noise would be all alike once it is averaged.
    images = torch.randn(shape, generator=generator)
    images += torch.randn((*shape[:2], 1, 1), generator=generator)
    images = images.to(device, memory_format=torch.channels_last)
    task = task_of(loaded)
    labels = task.some_labels(bench.batch_size, loaded.num_classes, shape[2:], device)
    recipe = _recipe(name, bench, device, family=family_of(loaded.module))
    if name == "fp":
        return _fp_step(change(loaded.module).to(device), task, images, labels, recipe, listener)
    return qat_step(loaded, images, labels, config, recipe, listener)


def _recipe(name: str, bench: Bench, device: torch.device, *, family: Family) -> Recipe:
    # Long enough that "auto" compiles, as it does in a training worth timing.
    config = bench.config.model_copy(update={"epochs": 10})
    recipe = choose(config, 1000, bench.batch_size, device, family=family)
    if name in ("fp", "quantizers"):
        recipe = replace(recipe, distill_weight=0.0)
    if name != "recipe":
        recipe = replace(recipe, mec_weight=0.0)
    return recipe


def _fp_step(
    network: nn.Module,
    task: Task,
    images: Tensor,
    labels: Tensor,
    recipe: Recipe,
    listener: Listener,
) -> Step:
    channels_last(network.train())
    fused = can_fuse(images.device) or None
    optimizer: torch.optim.Optimizer
    if recipe.optimizer == "adamw":
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=fused)
    else:
        optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9, fused=fused)
    order = InMemoryOrder(optimizer)
    run: Callable[[Tensor], Tensor] = network
    if recipe.compile == "model":
        run = Compiler(listener).compiled(network)

    def step() -> None:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=recipe.bf16):
            logits = run(images)
        loss = task.loss(logits.float(), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        with order:  # whatever makes an update cheaper makes it so for both
            optimizer.step()

    return step


def qat_step(
    loaded: LoadedModel,
    images: Tensor,
    labels: Tensor,
    config: QuantizeConfig,
    recipe: Recipe,
    listener: Listener,
) -> Step:
    """A step of the quantized network, which is made here, on images [N, C, H, W] and labels."""
    chosen: dict[str, Any] = {"mec_on": "+".join(recipe.mec_on)}
    if recipe.mec_weight == 0:
        chosen["mec_weight"] = 0.0
    config = config.model_copy(update=chosen)
    teacher = None
    if recipe.distill_weight or (recipe.mec_weight and recipe.mec_views == 2):
        plain = copy.deepcopy(loaded.module).to(images.device).eval().requires_grad_(False)
        channels_last(plain)
        shape = loaded.preprocessing.input_size
        teacher = make_teacher(
            plain, shape, taps_of(config), config.mec_grid, recipe, lambda: [images]
        )
    model = insert_quantizers(loaded, config).to(images.device)
    channels_last(model)
    calibrate(model, iter([images]), 1)
    model.train()
    optimizer, _ = make_optimizer(model, replace(recipe, lr=1e-4))
    task = task_of(loaded)
    train = TrainingStep(model, teacher, recipe, optimizer, listener, task=task)
    count = 0

    def step() -> None:
        nonlocal count
        train(images, labels, count)
        count += 1

    return step


def timed(step: Step, device: torch.device) -> float:
    """Seconds of one step."""
    _wait(device)
    started = time.perf_counter()
    step()
    _wait(device)
    return time.perf_counter() - started


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ratio(times: list[float], others: list[float]) -> float:
    """Of two arms that took turns, the median ratio within a round."""
    return statistics.median(a / b for a, b in zip(times, others, strict=True))


def in_own_process(function: Callable[..., float], *arguments: object) -> float:
    """``function(*arguments)``, computed in a new process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def _peak(name: str, bench: Bench, threads: int) -> float:
    torch.set_num_threads(threads)
    device = pick_device(bench.config.device)
    return peak_of(lambda: make_step(name, bench, Listener()), device)


def peak_of(make: Callable[[], Step], device: torch.device) -> float:
    """Peak memory of some steps in MB, without what the process has begun with.

    On a CPU that is resident memory, with what the libraries' allocator and the compiler keep.
    """
    before = _resident_peak()
    step = make()
    step()  # compiled
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        _forget_peak()
    for _ in range(MEMORY_STEPS):
        step()
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    return (_resident_peak() - before) * 1024 / 1e6


def memory_now(device: torch.device) -> int:
    """Bytes in use, on a CPU resident ones of this process; `memory_peak` counts from here on."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        _forget_peak()
    return memory_peak(device)


def memory_peak(device: torch.device) -> int:
    """The most bytes in use since `memory_now`; where that cannot be told, ever."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return _resident_peak() * 1024


def _forget_peak() -> None:
    """Let the peak begin anew, where the system can: compiling takes memory that steps do not."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _resident_peak() -> int:
    """Peak of the resident memory in KiB."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux lets a new process inherit the ru_maxrss of its parent
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
