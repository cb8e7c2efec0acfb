"""What of a run can be opened for a report; what is gone is noted, and left out."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from mecq_cli.config import QuantizeConfig, ReportConfig
from mecq_cli.data import Split
from mecq_cli.errors import ArtifactError, MecqError
from mecq_cli.insertion import QuantizedModel
from mecq_cli.integer.ir import IntegerModel
from mecq_cli.models.classes import ClassMap
from mecq_cli.models.loading import LoadedModel, load_model
from mecq_cli.models.preprocessing import Preprocessing
from mecq_cli.runs import RunFolder, read_summary
from mecq_cli.tasks.base import Task
from mecq_cli.tasks.registry import CLASSIFICATION
from mecq_cli.training import state
from mecq_cli.workflow.artifacts import classes_of, load_artifact, preprocessing_of, task_of
from mecq_cli.workflow.common import insert_quantizers
from mecq_cli.workflow.evaluation_images import evaluation_split
from mecq_cli.workflow.float_model import load_float, restore_classifier
from mecq_cli.workflow.targets import classes_of_split, settings_of


@dataclass
class Material:
    """What of a run could be opened.

    Attributes:
        run: its folder.
        config: its settings; None where only an artifact was put there.
        summary: summary.json; {} of a run that is not finished.
        model: the integer network; None of a run that has none yet.
        preprocessing: of its images.
        task: what it is for.
        split: evaluation images; None where they are gone.
        classes: of the outputs.
        fp: the FP network; None where its weights are gone.
        simulator: the trained network; None where its checkpoint is gone.
        left_out: what cannot be shown, and why.
    """

    run: RunFolder
    config: QuantizeConfig | None
    summary: dict[str, Any]
    model: IntegerModel | None = None
    preprocessing: Preprocessing | None = None
    task: Task = CLASSIFICATION
    split: Split | None = None
    classes: ClassMap | None = None
    fp: nn.Module | None = None
    simulator: QuantizedModel | None = None
    left_out: list[str] = field(default_factory=list)

    def attempt(self, what: str, call: Callable[[], Any]) -> Any:
        """What ``call`` returns; None, and a remark, where it cannot."""
        try:
            return call()
        except MecqError as error:
            self.left_out.append(f"{what}: {error}")
            return None


def open_material(run: RunFolder, asked: ReportConfig) -> Material:
    """Everything that is there.

    Raises:
        MecqError: the artifact cannot be used, or the images that were asked for.
    """
    config = settings_of(run)
    material = Material(run, config, read_summary(run))
    if not run.artifact.exists():
        material.left_out.append(
            "Layers, answers and sizes: the run has no integer artifact yet; it is written at the "
            "end of the training."
        )
        return material
    model = material.model = load_artifact(run.artifact)
    preprocessing = material.preprocessing = preprocessing_of(model.metadata, run.artifact)
    task = material.task = task_of(model.metadata, run.artifact)
    names = classes_of(model.metadata, None, run.artifact)
    imagenet = bool(model.metadata.get("imagenet", False))

    def images() -> tuple[Split, ClassMap]:
        split = evaluation_split(run, asked.data, task=task)
        return split, classes_of_split(split, task, names, str(run.path), imagenet=imagenet)

    needed = "Answers, activations and verification need the images"
    # Named, they have to be there.
    found = images() if asked.data is not None else material.attempt(needed, images)
    material.split, material.classes = found or (None, ClassMap(names, tuple(range(len(names)))))
    if config is None:
        material.left_out.append("The float network: the folder holds an artifact and no settings.")
        return material
    settings = config
    loaded = material.attempt(
        "What quantization changed needs the float network", lambda: _float(settings, material, run)
    )
    if loaded is not None:
        if loaded.preprocessing != preprocessing:
            raise ArtifactError(
                f"{run.artifact}: its preprocessing is not the one that {run.config} asks for; "
                "give the folder of one run"
            )
        material.fp = copy.deepcopy(loaded.module).eval().requires_grad_(False)
        material.simulator = material.attempt(
            "Clipped weights need the last checkpoint", lambda: _simulator(loaded, settings, run)
        )
    return material


def _float(config: QuantizeConfig, material: Material, run: RunFolder) -> LoadedModel:
    """The network that the run began with; a random one is made anew from the run's seed."""
    torch.manual_seed(config.seed)
    if material.split is not None:
        return load_float(config, material.split.classes, run)[0]
    assert material.classes is not None
    loaded = load_model(
        config.model,
        checkpoint=config.checkpoint,
        pretrained=config.pretrained,
        num_classes=len(material.classes.names) or None,
        reset_classifier=config.reset_classifier,
        img_size=config.img_size,
        crop_pct=config.crop_pct,
    )
    restore_classifier(loaded, config, run)
    return loaded


def _simulator(loaded: LoadedModel, config: QuantizeConfig, run: RunFolder) -> QuantizedModel:
    model = insert_quantizers(loaded, config)
    state.load_model(run.checkpoints, model)
    return model.eval()
