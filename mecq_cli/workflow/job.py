"""What is open while a model is quantized: images, model, settings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import islice

import torch
from torch import Tensor, nn

from mecq_cli import launch
from mecq_cli.config import OF_BOTH_VIEWS, QuantizeConfig
from mecq_cli.data import (
    ImageDataset,
    Part,
    Split,
    batches_per_epoch,
    dataset_of,
    normalize,
    train_batches,
)
from mecq_cli.distributed import Processes, check_divides
from mecq_cli.errors import UsageError
from mecq_cli.evaluation import evaluate
from mecq_cli.events import Listener
from mecq_cli.models.classes import ClassMap
from mecq_cli.models.loading import LoadedModel
from mecq_cli.tasks.base import Measured, Task
from mecq_cli.tasks.figures import DETECT
from mecq_cli.tasks.registry import CLASSIFICATION, task_of
from mecq_cli.training.family import family_of
from mecq_cli.training.recipe import Recipe, choose, default_batch_size
from mecq_cli.workflow.common import (
    eval_batch_size,
    evaluation_data,
    pick_device,
    task_for,
)
from mecq_cli.workflow.float_model import knows_classes, load_float
from mecq_cli.workflow.machine import loader_workers
from mecq_cli.workflow.phases import Phases

CALIBRATION_EPOCH = 2**20
BN_EPOCH = 2**20 + 1
"""Epoch numbers that training never reaches: their order and augmentation are their own."""


@dataclass
class Job:
    """Everything that is open while a run works.

    Attributes:
        asked: the settings as they were given.
        config: the same, with what was chosen since.
        again: as of `mecq_cli.workflow.quantize.quantize`.
    """

    asked: QuantizeConfig
    config: QuantizeConfig
    device: torch.device
    loaded: LoadedModel
    classes: ClassMap
    train: ImageDataset
    val: ImageDataset
    recipe: Recipe
    listener: Listener
    processes: Processes
    task: Task
    workers: int = 0
    phases: Phases = field(default_factory=Phases)
    again: str | None = None

    @property
    def asks_to_freeze(self) -> bool:
        """Whether oscillations are frozen because somebody says so."""
        key = "freeze_oscillations"
        return key not in self.asked.chosen and bool(self.asked.freeze_oscillations)

    def batches(self, epoch: int, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Training batches on the device; of several processes, the part of this one."""
        part = partial(self.processes.part, parts=self.recipe.accumulate)
        return self._batches(self.train, epoch, first, part)

    def _batches(
        self, dataset: ImageDataset, epoch: int, first: int = 0, part: Part | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in train_batches(
            dataset,
            batch_size=self.recipe.batch_size,
            epoch=epoch,
            start_batch=first,
            workers=self.workers,
            part=part,
        ):
            images = normalize(batch.images, self.train.preprocessing, self.device)
            yield images, batch.labels.to(self.device, non_blocking=True)

    def some_images(
        self, epoch: int, images: int, part: Part | None = None, *, whole: bool = True
    ) -> tuple[Iterator[Tensor], int]:
        """About so many training images for statistics, and how many batches they come in.

        Large images without augmentation: statistics of random crops are not those of whole
        images. Small ones with it: padding and shifting is part of what their networks know
        (ResNet-20 W4A4 without training, 1,000 images: 89.9 % with, 87.8 % without). With it also
        where they need not be ``whole``.
        """
        available = batches_per_epoch(len(self.train), self.recipe.batch_size)
        count = min(max(-(-images // self.recipe.batch_size), 1), available)
        dataset = self.train
        if whole and not dataset.small:
            dataset = dataset_of(
                dataset.split, dataset.preprocessing, self.classes.indices, seed=dataset.seed
            )
        batches = islice(self._batches(dataset, epoch, part=part), count)
        # In parts as small as those of a step, which there is memory for, of two images or more;
        # not in several processes, whose parts would have to be equal in number.
        parts = 1
        if self.processes.count == 1:
            parts = max(min(self.recipe.accumulate, self.recipe.batch_size // 2), 1)
        return (part for x, _ in batches for part in x.chunk(parts)), count * parts

    def told(self, task: str, batches: Iterator[Tensor], count: int) -> Iterator[Tensor]:
        """The same batches; the listener hears how many of ``count`` have been used."""
        self.listener.start(task, count)
        for number, images in enumerate(batches, 1):
            yield images
            self.listener.advance(task, number)
        self.listener.finish(task)

    def measured(self, model: nn.Module) -> Measured:
        """The figures of a model on the evaluation images, in float32."""
        return evaluate(
            lambda images: self.task.answers(model(images)),
            self.val,
            batch_size=eval_batch_size(self.loaded.preprocessing),
            device=self.device,
            workers=self.workers,
            listener=self.listener,
            processes=self.processes,
            task=self.task,
            outputs=self.loaded.num_classes,
        )


def open_job(
    config: QuantizeConfig,
    origins: Mapping[str, str],
    listener: Listener,
    splits: tuple[Split, Split] | None,
    model: LoadedModel | None,
    processes: Processes,
) -> Job:
    """Read the images and the model, and fill in the settings that depend on them.

    Args:
        config, origins, listener, splits, model: as of `mecq_cli.workflow.quantize.quantize`.
        processes: which work on the run.

    Raises:
        MecqError: one of them cannot be read, or they do not fit together.
    """
    asked = config
    device = processes.device or pick_device(config.device)
    task = task_for(config.task, config.model, model)
    train_split, val_split = splits or task.open_training(
        config.data, config.val_split, config.seed
    )
    if model is not None:
        task = task_of(model)
        loaded, classes = model, task.match_classes(train_split.classes, model.num_classes)
    else:
        loaded, classes = load_float(config, train_split.classes)
        task = task_of(loaded)
    if (
        not knows_classes(loaded, config)
        and config.distill
        and origins.get("distill", "default") == "default"
    ):
        listener.note("the float classifier is random: nothing to distil from it")
        config = config.model_copy(update={"distill": False})
    if loaded.weights == "random" and origins.get("mec_views", "default") == "default":
        # Features of a random network are no example to follow.
        if config.mec_term in OF_BOTH_VIEWS:
            raise UsageError(
                f"--mec-term {config.mec_term} compares with the float model, whose weights are "
                "random; leave it out, or give --mec-views fp+quantized too"
            )
        sites = config.mec_on or "penultimate"
        config = config.model_copy(update={"mec_views": "quantized", "mec_on": sites})
    config = _regularized(config, origins, task, listener)
    config = _measurable(config, origins, task)
    preprocessing = loaded.preprocessing
    batch_size = config.batch_size or default_batch_size(
        len(train_split), max(preprocessing.input_size[1:])
    )
    train = dataset_of(train_split, preprocessing, classes.indices, train=True, seed=config.seed)
    val = evaluation_data(val_split, preprocessing, classes)
    # A last batch of one image has no variance: batch norm cannot train on it.
    batch_size = min(batch_size, len(train_split))
    if config.batch_size != batch_size:  # ours to choose: one that can be divided
        shares = processes.count * config.accumulate
        batch_size = max(batch_size // shares, 1) * shares
    check_divides(batch_size, processes.count, config.accumulate)
    if batch_size < 2 and config.epochs != 0:
        raise UsageError(
            f"training needs batches of at least 2 images, got --batch-size {batch_size} with "
            f"{len(train_split)} training images; use more, or --epochs 0 to calibrate only"
        )
    steps = batches_per_epoch(len(train_split), batch_size)
    recipe = recipe_for(config, loaded, task, steps, batch_size, device)
    config = config.model_copy(update={"mec_on": "+".join(recipe.mec_on)})
    workers = loader_workers(config.workers, device, launch.local_processes())
    return Job(
        asked,
        config,
        device,
        loaded,
        classes,
        train,
        val,
        recipe,
        listener,
        processes,
        task,
        workers,
    )


def recipe_for(
    config: QuantizeConfig,
    loaded: LoadedModel,
    task: Task,
    steps_per_epoch: int,
    batch_size: int,
    device: torch.device,
) -> Recipe:
    """How this network is trained for this task."""
    return choose(
        config, steps_per_epoch, batch_size, device,
        family=family_of(loaded.module), classifies=task is CLASSIFICATION,
    )  # fmt: skip


def _measurable(config: QuantizeConfig, origins: Mapping[str, str], task: Task) -> QuantizeConfig:
    """With a sensitivity that sees all layers: of a detector neither its features nor its classes
    say anything of the boxes."""
    if config.target is None or task.name != DETECT or config.sensitivity == "loss":
        return config
    if origins.get("sensitivity", "default") != "default":
        raise UsageError(
            f"--sensitivity {config.sensitivity} does not see what makes boxes; of networks that "
            "detect it is loss"
        )
    return config.model_copy(update={"sensitivity": "loss"})


def _regularized(
    config: QuantizeConfig, origins: Mapping[str, str], task: Task, listener: Listener
) -> QuantizeConfig:
    """Without the entropy term where its default weight is another task's."""
    if task.regularized or origins.get("mec_weight", "default") != "default":
        return config
    if config.epochs != 0:
        listener.note(
            f"the entropy regularizer is off: its weight is not tuned for the task {task.name}; "
            "--mec-weight turns it on"
        )
    return config.model_copy(update={"mec_weight": 0.0})
