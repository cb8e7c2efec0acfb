"""Integer artifacts, read, and what they say of themselves checked before anything relies on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mecq_cli.errors import ArtifactError
from mecq_cli.export import safetensors
from mecq_cli.integer.geometry import shapes
from mecq_cli.integer.ir import IntegerModel
from mecq_cli.models.detector import COORDINATES, detector_in
from mecq_cli.models.preprocessing import Preprocessing
from mecq_cli.tasks.base import Task
from mecq_cli.tasks.figures import CLASSIFY, DETECT, FIGURES, SEGMENT
from mecq_cli.tasks.registry import task_named

_AXES = {CLASSIFY: 1, DETECT: 2, SEGMENT: 3}
"""Of the outputs of one image, by task."""


def load_artifact(path: Path) -> IntegerModel:
    """An integer .safetensors file.

    Raises:
        ArtifactError: missing, damaged, or what it says of itself does not fit its graph.
    """
    model = safetensors.load(path)
    metadata = model.metadata
    name = metadata.get("model", "model")
    if not isinstance(name, str) or not name or not name.isprintable():
        raise ArtifactError(f"{path}: the name of its model is none; export it again")
    if type(metadata.get("fp32_bytes", 0)) is not int:
        raise ArtifactError(f"{path}: its fp32_bytes are no number of bytes; export it again")
    if "preprocessing" in metadata:
        size = preprocessing_of(metadata, path).input_size
        if size != model.input_shape:
            raise ArtifactError(
                f"{path}: prepares images of the size {list(size)} for a network that takes "
                f"{list(model.input_shape)}; export it again"
            )
    if "task" in metadata:
        _require_task(model, task_of(metadata, path), path)
    return model


def _require_task(model: IntegerModel, task: Task, path: Path) -> None:
    outputs = shapes(model)[model.output.name]
    if len(outputs) != _AXES[task.name]:
        raise ArtifactError(
            f"{path}: is for the task {task.name}, which outputs [N, "
            f"{', '.join(map(str, outputs))}] are not of; export it again"
        )
    detector = detector_in(model.metadata)
    anchors = None if detector is None else sum(level.count for level in detector.levels)
    if task.name == DETECT and anchors != outputs[1]:
        raise ArtifactError(
            f"{path}: describes {anchors} boxes for {outputs[1]} outputs; export it again"
        )


def classes_of(metadata: Any, outputs: int | None, path: Path) -> tuple[str, ...]:
    """The names of the classes; their numbers where the file has none.

    Args:
        metadata: of an artifact or ONNX file.
        outputs: along the axis of the classes; None where that is not known.
        path: of the file.

    Raises:
        ArtifactError: they are no names, or not as many as there are outputs.
    """
    count = outputs
    if count is not None and metadata.get("task") == DETECT:
        count -= COORDINATES
    names = metadata.get("classes")
    if names is None:
        return tuple(map(str, range(count or 0)))
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise ArtifactError(f"{path}: the names of its classes are none; export it again")
    if count is not None and len(names) != count:
        raise ArtifactError(f"{path}: has {len(names)} names for {count} classes; export it again")
    return tuple(names)


def preprocessing_of(metadata: Any, path: Path) -> Preprocessing:
    """The preprocessing an artifact or ONNX file carries."""
    try:
        return Preprocessing.from_json(dict(metadata["preprocessing"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(
            f"{path}: does not say how images are prepared for it ({error}); export it again"
        ) from error


def task_of(metadata: Any, path: Path) -> Task:
    """What the model in a file is for; those that do not say it classify."""
    name = metadata.get("task", CLASSIFY)
    if not isinstance(name, str) or name not in FIGURES:
        raise ArtifactError(
            f"{path}: is for the task {str(name)[:40]!r}, which this version does not know; known "
            f"are {', '.join(FIGURES)}"
        )
    if name != DETECT:
        return task_named(name)
    from mecq_cli.tasks.detection import Detection

    detector = detector_in(metadata)
    if detector is None:
        raise ArtifactError(f"{path}: says nothing of its boxes; export it again")
    return Detection(detector)
