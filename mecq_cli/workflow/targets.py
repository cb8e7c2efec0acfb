"""A target on the command line, opened: something that turns images into logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mecq_cli.config import QuantizeConfig, from_toml
from mecq_cli.data import Split
from mecq_cli.errors import ArtifactError, DataError, UsageError
from mecq_cli.export.onnx_detection import detections_of
from mecq_cli.export.onnx_file import read
from mecq_cli.export.ort import OrtRunner
from mecq_cli.export.qonnx import QonnxRunner
from mecq_cli.insertion import QuantizedModel
from mecq_cli.integer.geometry import shapes
from mecq_cli.integerize import IntegerModule
from mecq_cli.models.classes import ClassMap
from mecq_cli.models.preprocessing import Preprocessing
from mecq_cli.runs import RunFolder
from mecq_cli.tasks import registry
from mecq_cli.tasks.base import Task
from mecq_cli.tasks.figures import DETECT
from mecq_cli.tasks.registry import CLASSIFICATION
from mecq_cli.training import state
from mecq_cli.workflow.artifacts import classes_of, load_artifact, preprocessing_of, task_of
from mecq_cli.workflow.common import insert_quantizers
from mecq_cli.workflow.float_model import load_float


@dataclass
class Opened:
    """A model ready to run.

    Attributes:
        kind: artifact, simulator, onnx or model.
        predict: normalised images [N, C, H, W] -> logits [N, classes].
        preprocessing: of its images.
        classes: a name for each output.
        imagenet: whether the outputs are ImageNet-1k's.
        task: what it does.
        found: normalised images -> what the metric of the task takes, where a file makes that
            itself; None where the task does.
    """

    kind: str
    predict: Callable[[Tensor], Tensor]
    preprocessing: Preprocessing
    classes: tuple[str, ...]
    imagenet: bool
    task: Task = CLASSIFICATION
    found: Callable[[Tensor], Tensor] | None = None

    def answers(self, images: Tensor) -> Tensor:
        """What the metric of the task takes."""
        return self.task.answers(self.predict(images)) if self.found is None else self.found(images)


def open_artifact(path: Path) -> Opened:
    """An integer .safetensors file."""
    model = load_artifact(path)
    outputs = shapes(model)[model.output.name]
    return _described("artifact", IntegerModule(model), model.metadata, outputs[0], path)


def open_onnx(path: Path) -> Opened:
    """An .onnx file of ours, in onnxruntime; one of the profile qonnx in the qonnx package."""
    by_qonnx = read(path).metadata.get("profile") == "qonnx"
    runner = QonnxRunner(path) if by_qonnx else OrtRunner(path)

    def predict(images: Tensor) -> Tensor:
        return torch.from_numpy(runner.run(np.ascontiguousarray(images.cpu().numpy())))

    outputs = runner.outputs if isinstance(runner, OrtRunner) else None
    opened = _described("onnx", predict, runner.metadata, outputs, path)
    if opened.task.name == DETECT and isinstance(runner, OrtRunner):
        opened.found = partial(_detected, runner)
    return opened


def _detected(runner: OrtRunner, images: Tensor) -> Tensor:
    """The boxes that an ONNX file makes itself."""
    return torch.from_numpy(detections_of(runner, np.ascontiguousarray(images.cpu().numpy())))


def open_simulator(run: RunFolder, folders: tuple[str, ...]) -> Opened:
    """The network of a run's last checkpoint, in evaluation mode."""
    config = run_config(run)
    if config.lower_from and not run.summary.is_file():
        raise UsageError(
            f"{run.path}: its bits are lowered step by step (--lower-from), and may not be those "
            "of the result yet; finish it by mecq quantize --resume first"
        )
    loaded, classes = load_float(config, folders)
    model: QuantizedModel = insert_quantizers(loaded, config)
    state.load_model(run.checkpoints, model)
    model.eval()
    return Opened(
        "simulator", model, loaded.preprocessing, classes.names, loaded.imagenet,
        registry.task_of(loaded),
    )  # fmt: skip


def run_config(run: RunFolder) -> QuantizeConfig:
    """The settings a run was started with."""
    if not run.config.exists():
        raise UsageError(f"{run.path}: is no run folder, it has no config.toml")
    return from_toml(run.config)


def settings_of(run: RunFolder | None) -> QuantizeConfig | None:
    """The settings of a run; None for other targets, and a folder that only holds an artifact."""
    return run_config(run) if run is not None and run.config.exists() else None


def require_artifact(run: RunFolder) -> Path:
    """The integer artifact of a run."""
    if not run.artifact.exists():
        raise ArtifactError(
            f"{run.path}: has no {run.artifact.name} yet; finish it with "
            f"mecq quantize --resume --output {run.path}"
        )
    return run.artifact


_ADVICE = "give the --data it was made for"


def classes_of_split(
    split: Split,
    task: Task,
    known: tuple[str, ...],
    name: str,
    *,
    imagenet: bool,
) -> ClassMap:
    """Which output of a stored model belongs to which class of a data set.

    Args:
        split: of the data set.
        task: of the model.
        known: names of the model's classes.
        name: of the model, for messages.
        imagenet: whether they are ImageNet's, by whose ids folders are matched.

    Raises:
        DataError: the data set has others.
    """
    classes = task.match_classes(split.classes, len(known), imagenet=imagenet, advice=_ADVICE)
    if not imagenet and not task.same_classes(classes, known):
        raise DataError(
            f"the classes of {split.root} ({', '.join(classes.names[:3])}, ...) are not those of "
            f"{name} ({', '.join(known[:3])}, ...); {_ADVICE}"
        )
    return classes


def _described(
    kind: str,
    predict: Callable[[Tensor], Tensor],
    metadata: Any,
    outputs: int | None,
    path: Path,
) -> Opened:
    preprocessing = preprocessing_of(metadata, path)
    classes = classes_of(metadata, outputs, path)
    imagenet = bool(metadata.get("imagenet", False))
    return Opened(kind, predict, preprocessing, classes, imagenet, task_of(metadata, path))
