"""What several commands need: a device, the data of a model, the metadata of an artifact."""

from __future__ import annotations

import glob
from pathlib import Path
from typing import Any, get_args

import torch

from mecq_cli.config import QuantizeConfig
from mecq_cli.data import ImageDataset, Split, dataset_of
from mecq_cli.errors import EnvironmentFailure, UsageError, first_line
from mecq_cli.insertion import BitPlan, QuantizedModel, Tap, insert
from mecq_cli.models import libraries
from mecq_cli.models.classes import ClassMap
from mecq_cli.models.detector import KEY
from mecq_cli.models.loading import LoadedModel, load_model
from mecq_cli.models.preprocessing import Preprocessing
from mecq_cli.settings import OWN
from mecq_cli.tasks.base import ADVICE, Task
from mecq_cli.tasks.figures import CLASSIFY
from mecq_cli.tasks.registry import choose, task_named, task_of


def pick_device(name: str) -> torch.device:
    """The device ``name``; "auto" is a GPU where there is one.

    Of several GPUs it becomes the current one, which what asks for no other works on.

    Raises:
        UsageError: no such kind of device.
        EnvironmentFailure: it is not here, or PyTorch cannot compute on it.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise RuntimeError("a meta tensor holds no values")
    except RuntimeError as error:
        raise UsageError(f"--device {name}: not a device; try auto, cpu, cuda or cuda:1") from error
    try:
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)
        compute_on(device)
    except Exception as error:
        raise EnvironmentFailure(
            f"--device {name}: not usable here ({first_line(error).split('. ')[0][:160]}); try "
            "--device cpu"
        ) from error
    return device


def compute_on(device: torch.device) -> None:
    """Add two numbers: a GPU may be there without code for it in this build of PyTorch.

    Raises:
        RuntimeError: it cannot.
    """
    (torch.ones(1, device=device) + 1).item()


def task_for(asked: str, name: str, model: LoadedModel | None = None) -> Task:
    """The task of the model of such a name, or of one that is here already.

    Raises:
        UsageError: another one was asked for, or there is no such model.
    """
    if model is None and name.startswith(OWN):  # which is not here: what its run says
        return task_named(CLASSIFY if asked == "auto" else asked)
    return choose(asked, libraries.find(name).task if model is None else model.task, name)


def load_for_data(
    name: str,
    folders: tuple[str, ...],
    *,
    checkpoint: Path | None,
    pretrained: bool,
    reset_classifier: bool = False,
    img_size: int | None = None,
    crop_pct: float | None = None,
    advice: str = ADVICE,
) -> tuple[LoadedModel, ClassMap]:
    """The FP model, and which output belongs to which class folder.

    A new classifier, or a model with random weights, gets the outputs that these classes need;
    ``advice`` is what to do where another model does not fit.
    """
    wanted = None
    if reset_classifier or (checkpoint is None and not pretrained):
        wanted = task_named(libraries.find(name).task).outputs_for(folders)
    loaded = load_model(
        name,
        checkpoint=checkpoint,
        pretrained=pretrained,
        num_classes=wanted,
        reset_classifier=reset_classifier,
        img_size=img_size,
        crop_pct=crop_pct,
    )
    task = task_of(loaded)
    return loaded, task.match_classes(
        folders, loaded.num_classes, imagenet=loaded.imagenet, advice=advice
    )


def evaluation_data(split: Split, preprocessing: Preprocessing, classes: ClassMap) -> ImageDataset:
    """A split as the model sees it, without augmentation."""
    return dataset_of(split, preprocessing, classes.indices)


def taps_of(config: QuantizeConfig) -> tuple[Tap, ...]:
    """The values the network returns beside its logits, for the regularizer."""
    if config.mec_weight == 0:
        return ()
    assert config.mec_on is not None  # chosen where it was open
    wanted = config.mec_on.split("+")
    return tuple(kind for kind in get_args(Tap) if kind in wanted)


def insert_quantizers(loaded: LoadedModel, config: QuantizeConfig) -> QuantizedModel:
    """The quantized network of a run; shares the parameters of ``loaded.module``."""
    plan = BitPlan(
        wbits=config.wbits,
        abits=config.abits,
        first_last_bits=config.first_last_bits,
        residual_bits=config.residual_bits,
        reduce_range=config.reduce_range,
        overrides=_rules(config),
        quantizer=config.quantizer,
    )
    return insert(
        loaded.module, loaded.preprocessing.input_size, plan, taps_of(config), config.mec_grid
    )


def _rules(config: QuantizeConfig) -> list[tuple[str, int | None, int | None]]:
    """Bits of single layers: what a target allotted, then what the settings say."""
    allotted = [(glob.escape(row.layer), row.wbits, None) for row in config.allotted]
    return [*allotted, *((rule.pattern, rule.wbits, rule.abits) for rule in config.layers)]


def artifact_metadata(
    loaded: LoadedModel, classes: ClassMap, config: QuantizeConfig, wbits: float
) -> dict[str, Any]:
    """What an artifact says about itself; no path and no time, so that its bytes repeat.

    Args:
        loaded: the float model.
        classes: of the outputs.
        config: of the run.
        wbits: bits of a weight, the average where a target allotted them.
    """
    # "lsq" is what an artifact has that names none.
    named: dict[str, Any] = {} if config.quantizer == "lsq" else {"quantizer": config.quantizer}
    if config.allotted:
        keys = ("target_avg_bits", "target_size", "sensitivity")
        named["allotment"] = {key: getattr(config, key) for key in keys}
    if loaded.task != CLASSIFY:
        named["task"] = loaded.task
    if loaded.detector is not None:
        named[KEY] = loaded.detector.to_json()
    return {
        **named,
        "model": loaded.name,
        "wbits": wbits,
        "abits": config.abits,
        "reduce_range": config.reduce_range,
        "classes": list(classes.names),
        "imagenet": loaded.imagenet,
        "preprocessing": loaded.preprocessing.to_json(),
    }


def eval_batch_size(preprocessing: Preprocessing) -> int:
    """Images at a time in evaluation: about 6 million input values."""
    channels, height, width = preprocessing.input_size
    return max(min(256, 6_000_000 // (channels * height * width)), 1)
