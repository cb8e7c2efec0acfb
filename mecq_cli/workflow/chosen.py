"""What was chosen for a run, in its settings and in words."""

from __future__ import annotations

from mecq_cli.config import QuantizeConfig
from mecq_cli.insertion import QuantizedModel
from mecq_cli.precision.choices import CANDIDATES
from mecq_cli.tasks.base import Task
from mecq_cli.training.family import Family, family_of
from mecq_cli.training.lowering import fewest_bits, stages
from mecq_cli.training.recipe import FEW_BITS, Recipe
from mecq_cli.workflow import allot
from mecq_cli.workflow.job import Job


def is_balanced(config: QuantizeConfig, recipe: Recipe, task: Task) -> bool:
    """Whether the weight of the entropy term is found for the network before its training."""
    open_ = config.mec_weight is None and task.balance is not None
    return open_ and recipe.total_steps > 0 and recipe.mec_weight > 0


def resolved(job: Job) -> QuantizeConfig:
    """The settings of a run: filled in, and with a list of what was open."""
    filled = filled_in(job.config, job.recipe, job.task)
    chosen = dict(job.asked.chosen)
    for key, field in QuantizeConfig.model_fields.items():
        asked, value = getattr(job.asked, key), getattr(filled, key)
        if isinstance(value, (bool, int, float, str)) and asked == field.default != value:
            chosen[key] = value
    return filled.model_copy(update={"chosen": chosen})


def filled_in(config: QuantizeConfig, recipe: Recipe, task: Task) -> QuantizeConfig:
    """The settings with every "chosen by the program" filled in."""
    return config.model_copy(
        update={
            "task": task.name,
            "epochs": recipe.epochs,
            "batch_size": recipe.batch_size,
            "optimizer": recipe.optimizer,
            "lr": recipe.lr,
            "weight_decay": recipe.weight_decay,
            "warmup_epochs": recipe.warmup_steps / recipe.steps_per_epoch
            if config.warmup_epochs is None
            else config.warmup_epochs,
            "mec_weight": None if is_balanced(config, recipe, task) else recipe.mec_weight,
            "mec_align": recipe.mec.align,
            "mec_term": recipe.mec.term,
            "amp": "bf16" if recipe.bf16 else "off",
            "compile": recipe.compile,
            "freeze_oscillations": recipe.freeze_oscillations,
        }
    )


def describe(job: Job, model: QuantizedModel) -> None:
    """Tell the listener which recipe it is, and why."""
    recipe, config = job.recipe, job.config
    bits = f"W{allot.shown_wbits(config, model)} A{config.abits}"
    how = (
        f"{recipe.epochs} epoch{'s' * (recipe.epochs != 1)}, {recipe.total_steps} steps of "
        f"{recipe.batch_size} images, "
        f"{recipe.optimizer} at lr {recipe.lr:g}"
        if recipe.total_steps
        else "post-training quantization, no training"
    )
    first = stages(recipe, fewest_bits(model))[0]
    extras = [
        "distillation" if recipe.distill_weight else "",
        _weighed(job),
        "bf16" if recipe.bf16 else "",
        f"average of {recipe.ema:g}" if recipe.ema else "",
        "oscillations frozen" if recipe.freeze_oscillations else "",
        f"bits lowered from {first.bits}" if first.bits else "",
        {"model": "compiled", "quantizers": "compiled quantizers"}.get(recipe.compile, ""),
        f"{job.processes.count} processes" if job.processes.count > 1 else "",
        f"{recipe.accumulate} micro-batches" if recipe.accumulate > 1 else "",
    ]
    parts = ", ".join(e for e in extras if e and recipe.total_steps)
    if recipe.total_steps and recipe.reasons:
        job.listener.note("; ".join(recipe.reasons))
    if recipe.total_steps and _gains_by_a_target(job):
        job.listener.note(
            f"--target-avg-bits {config.wbits} in the place of --wbits {config.wbits} takes as "
            "much room, and gives each layer bits of its own: EfficientNet-Lite0 gained 9 points "
            "by it"
        )
    job.listener.note(
        f"{config.model} {bits} on {job.device}, task {job.task.name}: {how}"
        f"{'; ' + parts if parts else ''}"
    )


def _gains_by_a_target(job: Job) -> bool:
    """Depthwise layers hold few weights, so that more bits for them take little from others."""
    config = job.config
    own = config.target is not None or any(rule.wbits is not None for rule in config.layers)
    few = min(CANDIDATES) < config.wbits <= FEW_BITS and not own
    return few and family_of(job.loaded.module) is Family.DEPTHWISE


def _weighed(job: Job) -> str:
    """The entropy term and its weight."""
    if not job.recipe.mec_weight:
        return ""
    if is_balanced(job.config, job.recipe, job.task):
        return f"{job.recipe.mec.term}, balanced"
    return f"{job.recipe.mec.term} weight {job.recipe.mec_weight:g}"
