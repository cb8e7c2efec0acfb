"""`mecq eval`: the accuracy of a run, an artifact, an ONNX file or an FP model."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import nn

from mecq_cli.config import EvalConfig
from mecq_cli.data import Split, dataset_of
from mecq_cli.errors import DataError, UsageError
from mecq_cli.evaluation import evaluate as evaluate_on
from mecq_cli.events import Listener
from mecq_cli.models.classes import match_classes
from mecq_cli.models.order import channels_last
from mecq_cli.runs import RunFolder, Target, resolve_target
from mecq_cli.workflow.common import eval_batch_size, load_for_data, pick_device
from mecq_cli.workflow.machine import loader_workers
from mecq_cli.workflow.targets import (
    Opened,
    evaluation_split,
    open_artifact,
    open_onnx,
    open_simulator,
    require_artifact,
    settings_of,
)

_ADVICE = "give the --data it was made for"


def evaluate(config: EvalConfig, listener: Listener) -> dict[str, Any]:
    """Top-1 and top-5 in percent on the evaluation split.

    Raises:
        MecqError: see mecq_cli.errors.
    """
    started = time.perf_counter()
    device = pick_device(config.device)
    target = resolve_target(config.target)
    settings = settings_of(_run_of(target))
    split = evaluation_split(settings, config.data, config.split)
    opened = _open(config, target, split, device)
    classes = match_classes(
        split.classes, len(opened.classes), imagenet=opened.imagenet, advice=_ADVICE
    )
    if opened.kind != "model" and not opened.imagenet and classes.names != opened.classes:
        raise DataError(
            f"the classes of {split.root} ({', '.join(classes.names[:3])}, ...) are not those of "
            f"{target.name} ({', '.join(opened.classes[:3])}, ...); give the --data it was made for"
        )
    dataset = dataset_of(split, opened.preprocessing, classes.indices)
    accuracy = evaluate_on(
        opened.predict,
        dataset,
        batch_size=config.batch_size or eval_batch_size(opened.preprocessing),
        device=device,
        workers=loader_workers(config.workers, device),
        listener=listener,
    )
    return {
        "target": target.name,
        "kind": opened.kind,
        "images": accuracy.images,
        "top1": accuracy.top1,
        "top5": accuracy.top5,
        "classes": len(opened.classes),
        "split": split.name,
        "seconds": round(time.perf_counter() - started, 1),
    }


def _run_of(target: Target) -> RunFolder | None:
    """The run that a target is, or whose artifact or ONNX file it is."""
    if target.run is not None or target.path is None:
        return target.run
    run = RunFolder(target.path.parent)
    return run if run.summary.is_file() else None


def _open(config: EvalConfig, target: Target, split: Split, device: torch.device) -> Opened:
    run = target.run
    if config.simulator and run is None:
        raise UsageError(f"--simulator: {target.name} is no run folder; only a run has a simulator")
    if target.kind != "model":
        _refuse_preprocessing(config, target)
    if run is not None:
        if config.simulator:
            return open_simulator(run, split.classes, device)
        return open_artifact(require_artifact(run))
    if target.kind == "model":
        return _fp_model(config, target.name, split, device)
    assert target.path is not None
    return open_artifact(target.path) if target.kind == "artifact" else open_onnx(target.path)


def _refuse_preprocessing(config: EvalConfig, target: Target) -> None:
    """A quantized network is made for one input; options that would be ignored are errors."""
    for flag, value in (
        ("--img-size", config.img_size),
        ("--crop-pct", config.crop_pct),
        ("--checkpoint", config.checkpoint),
    ):
        if value is not None:
            raise UsageError(f"{flag} is for FP models; {target.name} carries its own")


def _fp_model(config: EvalConfig, name: str, split: Split, device: torch.device) -> Opened:
    loaded, classes = load_for_data(
        name,
        split.classes,
        checkpoint=config.checkpoint,
        pretrained=config.pretrained,
        img_size=config.img_size,
        crop_pct=config.crop_pct,
    )
    module: nn.Module = channels_last(loaded.module.to(device)).eval()
    return Opened("model", module, loaded.preprocessing, classes.names, loaded.imagenet)
