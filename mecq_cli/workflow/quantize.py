"""`mecq quantize`: from an FP model and a folder of images to an integer artifact."""

from __future__ import annotations

import copy
import shlex
import time
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import nn

from mecq_cli.calibration import calibrate
from mecq_cli.config import QuantizeConfig, to_toml
from mecq_cli.data import Split
from mecq_cli.distributed import Processes, joined
from mecq_cli.entropy import require_estimator
from mecq_cli.events import Listener
from mecq_cli.memory import advising
from mecq_cli.models.loading import LoadedModel
from mecq_cli.models.order import channels_last
from mecq_cli.quantizers import quantizers_named
from mecq_cli.runs import RunFolder, create_run, make_latest, read_summary, require_output
from mecq_cli.settings import OWN
from mecq_cli.storage import atomic_write
from mecq_cli.training import tracking
from mecq_cli.training.integer_teacher import IntegerTeacher, make_teacher
from mecq_cli.training.loop import Trainer
from mecq_cli.training.lowering import require_lowering
from mecq_cli.training.oscillation import require_freezing
from mecq_cli.training.signals import deferring, stopping
from mecq_cli.workflow import allot
from mecq_cli.workflow.chosen import describe, is_balanced, resolved
from mecq_cli.workflow.common import insert_quantizers, taps_of
from mecq_cli.workflow.disk import disk_need
from mecq_cli.workflow.dry_run import dry_run
from mecq_cli.workflow.faithful import require_exportable, require_faithful
from mecq_cli.workflow.float_model import fits_classifier
from mecq_cli.workflow.identity import digest_of_images, digest_of_weights, require_same
from mecq_cli.workflow.job import CALIBRATION_EPOCH, Job, open_job, recipe_for
from mecq_cli.workflow.new_classifier import prepare_classifier
from mecq_cli.workflow.outcome import finish
from mecq_cli.workflow.statistics import renew_statistics

TEACHER_IMAGES = 128


def quantize(
    config: QuantizeConfig,
    origins: Mapping[str, str],
    listener: Listener,
    splits: tuple[Split, Split] | None = None,
    model: LoadedModel | None = None,
    again: str | None = None,
) -> dict[str, Any]:
    """Quantize a model; returns the content of summary.json (or the site table, if a dry run).

    Where a launcher started several processes, each of them calls this, and they work on one run.

    Args:
        config: the settings.
        origins: where each came from.
        listener: hears of the progress.
        splits: (train, val) to use instead of those of ``config.data``.
        model: to use instead of the one that ``config`` names.
        again: what a person does to go on with the run, where ``mecq quantize --resume`` would
            train on other images.

    Raises:
        MecqError: see mecq_cli.errors; each message is one line.
    """
    with joined(config.device) as processes:
        config = processes.broadcast(config)  # of a run to continue, only the first may see it
        return _quantize(
            config,
            origins,
            listener if processes.first else Listener(),
            splits,
            model,
            processes,
            again,
        )


def _quantize(
    config: QuantizeConfig,
    origins: Mapping[str, str],
    listener: Listener,
    splits: tuple[Split, Split] | None,
    model: LoadedModel | None,
    processes: Processes,
    again: str | None,
) -> dict[str, Any]:
    started = time.perf_counter()
    torch.manual_seed(config.seed)
    quantizers_named(config.quantizer)  # before anything is read
    require_estimator(config.mec_estimator)
    if config.log == "tensorboard":
        tracking.require()
    job = open_job(config, origins, listener, splits, model, processes)
    job.again = again
    if config.dry_run:
        require_output(config)
        if job.config.target:
            if fits_classifier(job.loaded, job.config):
                listener.note("a run fits the new last layer first, and may find other bits")
            _allot(job)
        return dry_run(job)
    config = job.config
    with ExitStack() as folder:
        run = processes.from_first(lambda: folder.enter_context(create_run(config)))
        finished = processes.from_first(lambda: _finished(run) if config.resume else None)
        if finished is not None:
            listener.note(f"{run.path}: this run is finished; nothing to do")
            return finished
        command = again or _command(config, run)
        with (
            stopping(f"stopped between two steps; continue with: {command}"),
            # Calibration, evaluation and statistics may run out of memory as well as a step.
            advising(job.recipe.batch_size, lambda: command if run.has_begun else None),
        ):
            pending = allot.is_pending(config)
            if pending:
                _continue_allotment(job, run)
            begun = processes.from_first(lambda: config.resume and run.has_begun)
            if not begun:
                _store_settings(job, run)  # it can be continued already, if it is stopped here
            prepare_classifier(job, run)
            if pending:
                _allot(job)
            job.config = resolved(job)
            if not begun:
                _store_settings(job, run)
            return _work(job, run, command, started)


def _command(config: QuantizeConfig, run: RunFolder) -> str:
    """What goes on with a run: of objects of a program only that program."""
    if config.model.startswith(OWN) or config.data.startswith(OWN):
        return f"mecq_cli.quantize(..., output={str(run.path)!r}, resume=True)"
    return shlex.join(["mecq", "quantize", "--resume", "--output", str(run.path)])


def _store_settings(job: Job, run: RunFolder) -> None:
    if job.processes.first:
        atomic_write(run.config, to_toml(job.config).encode(), force=True)


def _continue_allotment(job: Job, run: RunFolder) -> None:
    """Take the bits that a run to continue has, where a program gives its settings anew."""
    if job.config.resume:
        known = partial(allot.as_stored, job.config, run.config)
        job.config = job.processes.from_first(known)


def _allot(job: Job) -> None:
    """Find the bits of the layers, where a target asks for it; the recipe depends on them."""
    config = job.config
    if allot.is_pending(config):
        with job.phases("sensitivity"):
            found = allot.with_bits(
                config, job.loaded, job.task, job.device,
                lambda images: job.some_images(CALIBRATION_EPOCH, images)[0], job.listener,
            )  # fmt: skip
            job.config = job.processes.broadcast(found)
    job.recipe = recipe_for(
        job.config, job.loaded, job.task, job.recipe.steps_per_epoch, job.recipe.batch_size,
        job.device,
    )  # fmt: skip


def _finished(run: RunFolder) -> dict[str, Any] | None:
    """The summary of a run that is over."""
    if not run.summary.exists():
        return None
    make_latest(run)
    return {**read_summary(run), "run": str(run.path)}  # which may have been moved


def _work(job: Job, run: RunFolder, command: str, started: float) -> dict[str, Any]:
    config, listener, recipe = job.config, job.listener, job.recipe
    plain = copy.deepcopy(job.loaded.module).to(job.device).eval().requires_grad_(False)
    channels_last(plain)
    teacher, shape = None, job.loaded.preprocessing.input_size
    with deferring():
        model = insert_quantizers(job.loaded, config).to(job.device)
        channels_last(model)
        if not run.has_begun:
            require_faithful(model, plain, shape)
        if recipe.total_steps and recipe.has_teacher:
            teacher = make_teacher(
                plain, shape, taps_of(config), config.mec_grid, recipe,
                lambda: job.some_images(CALIBRATION_EPOCH, TEACHER_IMAGES)[0],
            )  # fmt: skip
            if isinstance(teacher, IntegerTeacher):
                listener.note("the float model teaches by its integers of 8 bits")
    require_lowering(model, recipe)
    if job.asks_to_freeze:
        require_freezing(model)
    if config.allotted and not run.has_begun:
        allot.tell(config, model, listener)
    describe(job, model)
    trainer = Trainer(
        model,
        teacher,
        recipe,
        job.batches,
        checkpoints=run.checkpoints,
        metrics=run.metrics,
        checkpoint_every=config.checkpoint_every,
        listener=listener,
        keep_checkpoints=config.keep_checkpoints,
        events=run.tensorboard if config.log == "tensorboard" else None,
        processes=job.processes,
        calibration=lambda: job.some_images(CALIBRATION_EPOCH, config.calibration_images),
        task=job.task,
        evaluation=lambda: job.measured(model).figures[job.task.figures.key],
        eval_every=config.eval_every,
    )
    need = disk_need(config, recipe, model, trainer.optimizer, run)
    listener.note(job.processes.from_first(lambda: need.require(run.path)))
    resumed_at = _begin(job, run, trainer, plain)
    job.processes.from_first(lambda: make_latest(run))
    with job.phases("training"):
        trainer.train(command)
    if config.bn_images > 0:
        with job.phases("batch norm"):
            renew_statistics(job, model, plain)
    model.eval()
    return finish(job, run, trainer, model, resumed_at, started)


def _begin(job: Job, run: RunFolder, trainer: Trainer, plain: nn.Module) -> int | None:
    """Resume, or evaluate FP and calibrate; returns the step resumed at."""
    listener = job.listener
    same = {"images": digest_of_images(job.train.split, job.val.split)}
    if job.loaded.weights != "random":
        same["weights"] = digest_of_weights(plain)
    if job.config.resume and trainer.resume():
        require_same(trainer.progress.facts, same)
        _store_settings(job, run)  # of a run that is refused they stay as they were
        listener.note(f"resumed at step {trainer.progress.step}")
        return trainer.progress.step
    if job.recipe.total_steps:
        with job.phases("reading images"):
            job.train.preload(job.workers, listener)
    listener.note("the float model is evaluated first")
    with job.phases("float evaluation"):
        measured = job.measured(plain)
    of, value = job.task.figures, measured.figures[job.task.figures.key]
    listener.note(f"float {of.label} {value:.2f} % on {measured.images} images")
    trainer.progress.facts = {f"fp_{of.key}": value, **same}
    listener.note("calibration: first activation scales")
    batches, count = job.some_images(CALIBRATION_EPOCH, job.config.calibration_images)
    trains = bool(job.recipe.total_steps)
    with job.phases("calibration"):
        calibrate(trainer.model, job.told("calibrate", batches, count), count, to_be_trained=trains)
    trainer.share_state()
    require_exportable(trainer.model, job.loaded.preprocessing.input_size)
    if is_balanced(job.config, job.recipe, job.task):
        assert job.task.balance is not None
        with job.phases("calibration"):
            weight = trainer.balance(job.batches(CALIBRATION_EPOCH), job.task.balance)
        listener.note(
            f"entropy term: weight {weight:g}, so that its gradient is {job.task.balance:g} times "
            "that of the task, or less"
        )
    if job.processes.first:
        atomic_write(run.metrics, b"", force=True)
    trainer.save()
    return None
