"""`mecq eval`: the accuracy of a run, an artifact, an ONNX file or an FP model."""

from __future__ import annotations

import time
from typing import Any

from torch import nn

from mecq_cli.config import EvalConfig, QuantizeConfig
from mecq_cli.data import Split, dataset_of
from mecq_cli.errors import UsageError
from mecq_cli.evaluation import evaluate as evaluate_on
from mecq_cli.events import Listener
from mecq_cli.models.order import channels_last
from mecq_cli.target import Target, resolve_target
from mecq_cli.tasks.base import Task
from mecq_cli.tasks.figures import CLASSIFY
from mecq_cli.tasks.registry import choose, task_of
from mecq_cli.workflow.common import eval_batch_size, load_for_data, pick_device, task_for
from mecq_cli.workflow.evaluation_images import evaluation_split
from mecq_cli.workflow.machine import loader_workers
from mecq_cli.workflow.targets import (
    Opened,
    classes_of_split,
    open_artifact,
    open_onnx,
    open_simulator,
    require_artifact,
    settings_of,
)


def evaluate(config: EvalConfig, listener: Listener) -> dict[str, Any]:
    """Top-1 and top-5, or mean IoU, or mean average precision, in percent on the evaluation split.

    Raises:
        MecqError: see mecq_cli.errors.
    """
    started = time.perf_counter()
    device = pick_device(config.device)
    target = resolve_target(config.target)
    settings = settings_of(target.owner)
    _check(config, target)
    stored = None if config.simulator else _stored(target)
    task = _task(config, target, stored, settings)
    split = evaluation_split(target.owner, config.data, config.split, task)
    opened = stored or _with_weights(config, target, split)
    task = opened.task
    if opened.kind == "model":  # whose classes are known by their number alone
        classes = task.match_classes(split.classes, len(opened.classes), imagenet=opened.imagenet)
    else:
        classes = classes_of_split(
            split, task, opened.classes, target.name, imagenet=opened.imagenet
        )
    dataset = dataset_of(split, opened.preprocessing, classes.indices)
    if isinstance(opened.predict, nn.Module):
        opened.predict.to(device)
    measured = evaluate_on(
        opened.answers,
        dataset,
        batch_size=config.batch_size or eval_batch_size(opened.preprocessing),
        device=device,
        workers=loader_workers(config.workers, device),
        listener=listener,
        task=task,
        outputs=len(opened.classes),
    )
    return {
        "target": target.name,
        "kind": opened.kind,
        "task": task.name,
        "images": measured.images,
        **measured.figures,
        **measured.details,
        "num_classes": len(opened.classes),
        **({} if task.name == CLASSIFY else {"classes": list(opened.classes)}),
        "split": split.name,
        "seconds": round(time.perf_counter() - started, 1),
    }


def _check(config: EvalConfig, target: Target) -> None:
    """Refuse options that the target has no use for."""
    if config.simulator and target.run is None:
        raise UsageError(f"--simulator: {target.name} is no run folder; only a run has a simulator")
    if target.kind != "model":
        _refuse_preprocessing(config, target)


def _stored(target: Target) -> Opened | None:
    """An artifact or ONNX file, which says itself what it is for; None for a float model."""
    if target.run is not None:
        return open_artifact(require_artifact(target.run))
    if target.kind == "model":
        return None
    assert target.path is not None
    return open_artifact(target.path) if target.kind == "artifact" else open_onnx(target.path)


def _task(
    config: EvalConfig, target: Target, stored: Opened | None, settings: QuantizeConfig | None
) -> Task:
    if stored is not None:
        return choose(config.task, stored.task.name, target.name)
    return task_for(config.task, target.name if settings is None else settings.model)


def _with_weights(config: EvalConfig, target: Target, split: Split) -> Opened:
    if target.run is not None:
        return open_simulator(target.run, split.classes)
    return _fp_model(config, target.name, split)


def _refuse_preprocessing(config: EvalConfig, target: Target) -> None:
    """A quantized network is made for one input; options that would be ignored are errors."""
    for flag, value in (
        ("--img-size", config.img_size),
        ("--crop-pct", config.crop_pct),
        ("--checkpoint", config.checkpoint),
    ):
        if value is not None:
            raise UsageError(f"{flag} is for FP models; {target.name} carries its own")


def _fp_model(config: EvalConfig, name: str, split: Split) -> Opened:
    loaded, classes = load_for_data(
        name,
        split.classes,
        checkpoint=config.checkpoint,
        pretrained=config.pretrained,
        img_size=config.img_size,
        crop_pct=config.crop_pct,
        advice="give --data of the model's classes",
    )
    module: nn.Module = channels_last(loaded.module).eval()
    return Opened(
        "model", module, loaded.preprocessing, classes.names, loaded.imagenet,
        task_of(loaded),
    )  # fmt: skip
