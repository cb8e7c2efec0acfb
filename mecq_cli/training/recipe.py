"""How a network is trained: every choice the settings leave open, made here and in one place."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler.cosine_lr import CosineLRScheduler
from torch import nn

from mecq_cli.config import QuantizeConfig
from mecq_cli.entropy import EntropySettings
from mecq_cli.insertion import QuantizedModel
from mecq_cli.quantizers import Quantizer, quantizers_named
from mecq_cli.training.family import Family
from mecq_cli.training.oscillation import MOST_BITS, can_freeze

WEIGHT_DECAY = {1: 0.0, 2: 2.5e-5, 3: 5e-5}
"""By weight bits; 1e-4 from 4 bits on. The fewer bits, the less the weights should shrink."""

BASE_LR = {"sgd": 0.02, "adamw": 1e-3}
"""At a batch of 128; scaled linearly (sgd) or with the square root (adamw) to other batches."""

TOKEN_LR = 2e-4
"""The same for transformers and other networks of layer norms, which AdamW trains."""

CLASSIFIER_LR = {(Family.TOKENS, "adamw"): (2e-4, 5e-4), (Family.DEPTHWISE, "sgd"): (0.08, 0.2)}
"""For networks that classify, as docs/method.md found; the second at 1 and 2 bits."""

TOKEN_WEIGHT_DECAY = 1e-2
"""For those: AdamW multiplies it by the learning rate, which is a hundredth of SGD's."""

FEW_BITS = 2
"""The second learning rate of a family is for so many and fewer, of weights or activations."""

FREEZE_OSCILLATIONS = {Family.DEPTHWISE: 0.02}
"""By family, where it is not 0. An output of a depthwise layer depends on few weights."""

MEC_DEFAULTS = {
    "divergence": (300.0, 0.1),
    "alignment": (30.0, 1.0),  # as strong as it is in the former
    "one view": (0.1, 0.0),
}
"""Weight of the regularizer and of the alignment in it, by its term (docs/method.md)."""

COMPILE_MODEL_FROM = 600
COMPILE_QUANTIZERS_FROM = 100
"""Steps from which compiling pays for itself on a CPU: it takes about a minute for the model, and
some seconds for the quantizers alone."""

COMPILE_TOKENS_FROM = 3000
"""The same for transformers, of which each layer has operations of its own to compile: two blocks
of a ViT-Tiny take 51 s of one core, and each step of 8 images of 64 px then 22 ms, not 39."""


@dataclass(frozen=True)
class Recipe:
    """Everything the training loop needs to know.

    Attributes:
        epochs: passes over the images.
        batch_size: images a step, of all processes together.
        accumulate: micro-batches a step.
        steps_per_epoch, total_steps: after ``max_steps``.
        optimizer, lr, weight_decay: of the weights.
        scale_lr: learning rate of the quantizer steps, as a multiple of ``lr``.
        warmup_steps: linear warm-up of the learning rate.
        distill_weight: share of the distillation in the task loss; 0 without a teacher.
        distill_temperature: of both softmaxes.
        mec_weight: of the entropy regularizer; it has no influence where that is 0.
        mec_on: what it codes (penultimate, stages, layers, weights).
        mec_views: 1, or 2 for the quantized and the FP features jointly.
        mec: what it computes.
        bf16: autocast of the training step.
        compile: what is compiled: model, quantizers, off.
        teacher: how the FP network is followed: auto, or float.
        ema: decay of the average of what is learned (averaging.py); 0 without one.
        freeze_oscillations: final threshold (oscillation.py); 0 freezes nothing.
        lower_from: bits the training begins with (lowering.py); 0 begins with those asked for.
        reasons: what was chosen here, and why, for people.
    """

    epochs: int
    batch_size: int
    accumulate: int
    steps_per_epoch: int
    total_steps: int
    optimizer: str
    lr: float
    weight_decay: float
    scale_lr: float
    warmup_steps: int
    distill_weight: float
    distill_temperature: float
    mec_weight: float
    mec_on: tuple[str, ...]
    mec_views: int
    mec: EntropySettings
    bf16: bool
    compile: str
    teacher: str
    ema: float
    freeze_oscillations: float
    lower_from: int
    reasons: tuple[str, ...]

    @property
    def has_two_views(self) -> bool:
        """Whether the entropy term reads the float model's features."""
        return self.mec_weight > 0 and self.mec_views == 2

    @property
    def has_teacher(self) -> bool:
        """Whether the float model is computed in each step."""
        return self.distill_weight > 0 or self.has_two_views


def default_batch_size(images: int, input_size: int) -> int:
    """128 for small images, 32 for large ones, and never so many that an epoch has no steps."""
    wanted = 128 if input_size <= 64 else 32
    while wanted > 8 and images < 8 * wanted:
        wanted //= 2
    return wanted


@dataclass(frozen=True)
class Length:
    """How long a training by name is: about so many steps, within bounds of epochs."""

    steps: int
    fewest_epochs: int
    most_epochs: int


LENGTHS = {
    "quick": Length(600, 1, 10),
    "standard": Length(4000, 5, 60),
    "best": Length(20_000, 30, 300),
}
"""By the name of the recipe: minutes, an hour, as long as it takes. Few images are seen more often,
but not so often that the network learns them by heart; of a million, one pass is many steps."""


def default_epochs(steps_per_epoch: int, recipe: str = "standard") -> int:
    """By the recipe's name and the size of the data."""
    length = LENGTHS[recipe]
    wanted = math.ceil(length.steps / max(steps_per_epoch, 1))
    return min(max(wanted, length.fewest_epochs), length.most_epochs)


def choose(
    config: QuantizeConfig,
    steps_per_epoch: int,
    batch_size: int,
    device: torch.device,
    family: Family = Family.CONVOLUTIONS,
    *,
    classifies: bool = True,
) -> Recipe:
    """Fill in what the settings leave open.

    Args:
        config: the settings.
        steps_per_epoch, batch_size, device: of the training.
        family: as `family_of` says of the model.
        classifies: or what else the network does; some learning rates are for that alone.
    """
    tokens = family is Family.TOKENS
    epochs = (
        config.epochs
        if config.epochs is not None
        else default_epochs(steps_per_epoch, config.recipe)
    )
    total = epochs * steps_per_epoch
    if config.max_steps is not None:
        total = min(total, config.max_steps)
    optimizer = config.optimizer or ("adamw" if tokens else "sgd")
    base, lr = _base_lr(config, optimizer, family, classifies=classifies), config.lr
    if lr is None:
        ratio = batch_size / 128
        lr = base * (ratio if optimizer == "sgd" else ratio**0.5)
    decay = config.weight_decay
    if decay is None and tokens and optimizer == "adamw":
        decay = TOKEN_WEIGHT_DECAY
    elif decay is None:
        decay = WEIGHT_DECAY.get(config.wbits, 1e-4)
    warmup_epochs = config.warmup_epochs
    warmup = total // 20 if warmup_epochs is None else round(warmup_epochs * steps_per_epoch)
    mec_weight, mec = choose_entropy(config)
    freezes = (
        config.freeze_oscillations is None
        and config.wbits <= MOST_BITS
        and family in FREEZE_OSCILLATIONS
        and can_freeze(quantizers_named(config.quantizer))
    )
    freezing = FREEZE_OSCILLATIONS[family] if freezes else config.freeze_oscillations or 0.0
    return Recipe(
        epochs=epochs,
        batch_size=batch_size,
        accumulate=config.accumulate,
        steps_per_epoch=steps_per_epoch,
        total_steps=total,
        optimizer=optimizer,
        lr=lr,
        weight_decay=decay,
        scale_lr=config.scale_lr,
        warmup_steps=min(warmup, total),
        distill_weight=config.distill_weight if config.distill else 0.0,
        distill_temperature=config.distill_temperature,
        mec_weight=mec_weight,
        mec_on=tuple((config.mec_on or _sites_coded(family, classifies=classifies)).split("+")),
        mec_views=2 if _has_two_views(config) else 1,
        mec=mec,
        bf16=use_bf16(config.amp, device),
        compile=_choose_compile(config, total, tokens=tokens),
        teacher=config.teacher,
        ema=config.ema,
        freeze_oscillations=freezing,
        lower_from=config.lower_from,
        reasons=tuple(
            _reasons(
                config,
                epochs,
                steps_per_epoch,
                decay,
                family,
                base / BASE_LR[optimizer],
                freezes=freezes,
            )
        ),
    )


def _base_lr(config: QuantizeConfig, optimizer: str, family: Family, *, classifies: bool) -> float:
    """At a batch of 128."""
    kind = family, optimizer
    if classifies and kind in CLASSIFIER_LR:
        return CLASSIFIER_LR[kind][min(config.wbits, config.abits) <= FEW_BITS]
    return TOKEN_LR if kind == (Family.TOKENS, "adamw") else BASE_LR[optimizer]


def _reasons(
    config: QuantizeConfig,
    epochs: int,
    steps_per_epoch: int,
    decay: float,
    family: Family,
    times: float,
    *,
    freezes: bool,
) -> Iterator[str]:
    length = LENGTHS[config.recipe]
    if config.epochs is None:
        bound = {
            length.fewest_epochs: ", the least",
            length.most_epochs: ", the most: the images are few",
        }.get(epochs, "")
        yield (
            f"recipe {config.recipe} (of {', '.join(LENGTHS)}): "
            f"{epochs} epochs of {steps_per_epoch} steps{bound} (about {length.steps:,} steps in "
            f"all are the aim)"
        )
    if config.weight_decay is None:
        by_bits = not (family is Family.TOKENS and config.optimizer in (None, "adamw"))
        yield f"weight decay {decay:g}{' (less with fewer bits)' if by_bits else ''}"
    if family is Family.TOKENS and config.optimizer is None:
        yield f"adamw, since the network has {family.value}"
    if config.lr is None and family is Family.DEPTHWISE and times != 1:
        yield f"{times:g} times the learning rate of others, since the network has {family.value}"
    if freezes:
        yield f"oscillating weights are frozen, since the network has {family.value}"


def _choose_compile(config: QuantizeConfig, steps: int, *, tokens: bool) -> str:
    if config.compile != "auto":
        return config.compile
    if steps >= (COMPILE_TOKENS_FROM if tokens else COMPILE_MODEL_FROM):
        return "model"
    return "quantizers" if steps >= COMPILE_QUANTIZERS_FROM else "off"


def _sites_coded(family: Family, *, classifies: bool) -> str:
    """What the regularizer codes, where nobody says: of tokens what the last layer reads.

    Their mean after a block is not what that makes its logits of (docs/method.md).
    """
    return "penultimate" if family is Family.TOKENS and classifies else "stages"


def _has_two_views(config: QuantizeConfig) -> bool:
    """Of weights alone there is one, whatever is asked for."""
    return config.mec_views == "fp+quantized" and config.mec_on != "weights"


def choose_entropy(config: QuantizeConfig) -> tuple[float, EntropySettings]:
    """Weight and settings of the regularizer."""
    two_views = _has_two_views(config)
    term = config.mec_term or ("divergence" if two_views else "entropy")
    of_one_view, _ = MEC_DEFAULTS["one view"]
    weight, align = MEC_DEFAULTS.get(term if two_views else "one view", (1.0, 1.0))
    settings = EntropySettings(
        distortion=config.mec_distortion,
        warmup=config.mec_warmup,
        estimator=config.mec_estimator,
        experts=() if config.mec_experts == "all" else tuple(config.mec_experts.split("+")),
        order=config.mec_order,
        align=align if config.mec_align is None else config.mec_align,
        term=term,
        # What has one view beside those of two is as strong as it would be alone.
        lone=of_one_view / weight if two_views else 1.0,
    )
    return weight if config.mec_weight is None else config.mec_weight, settings


def use_bf16(amp: str, device: torch.device) -> bool:
    """Whether the training step runs under bf16 autocast; "auto": where the hardware has it."""
    if amp != "auto":
        return amp == "bf16"
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and _cpu_multiplies_bf16()


def _cpu_multiplies_bf16() -> bool:
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        probe = getattr(torch.cpu, name, None)
        if probe is not None and probe():
            return True
    return False


def make_optimizer(
    model: QuantizedModel, recipe: Recipe
) -> tuple[torch.optim.Optimizer, CosineLRScheduler]:
    """Groups: weights with decay; norms and biases without; what quantizers learn, at its own rate.

    The last group is in two parts where some of that decays with the weights.
    """
    learned: dict[bool, list[nn.Parameter]] = {False: [], True: []}
    for module in model.modules():
        if isinstance(module, Quantizer):
            learned[module.decays] += _unique(module)
    known = {id(p) for p in learned[False] + learned[True]}
    weights = [p for p in _unique(model) if id(p) not in known and p.dim() > 1]
    others = [p for p in _unique(model) if id(p) not in known and p.dim() <= 1]
    groups: list[dict[str, Any]] = [
        {"params": weights, "weight_decay": recipe.weight_decay},
        {"params": others, "weight_decay": 0.0},
        *(
            {
                "params": parameters,
                "weight_decay": recipe.weight_decay if decays else 0.0,
                "lr": recipe.lr * recipe.scale_lr,
            }
            for decays, parameters in learned.items()
        ),
    ]
    # The warm-up would move what is not to be learned.
    groups = [group for group in groups if group["params"] and group.get("lr", recipe.lr) > 0]
    optimizer = create_optimizer_v2(
        groups,
        opt=recipe.optimizer,
        lr=recipe.lr,
        weight_decay=0.0,
        momentum=0.9,
        fused=can_fuse(groups[0]["params"][0].device) or None,
    )
    schedule = CosineLRScheduler(
        optimizer,
        t_initial=max(recipe.total_steps, 2),  # of one step timm says that it is none
        warmup_t=recipe.warmup_steps,
        # One number for all groups: none may begin above what it is to reach.
        warmup_lr_init=min(group.get("lr", recipe.lr) for group in groups) / 100
        if recipe.warmup_steps
        else 0.0,
        t_in_epochs=False,
        warmup_prefix=False,
    )
    return optimizer, schedule


def can_fuse(device: torch.device) -> bool:
    """Whether PyTorch updates a parameter in one pass there; the result is the same."""
    return device.type in ("cpu", "cuda")


def _unique(model: nn.Module) -> Iterator[nn.Parameter]:
    return (p for p in model.parameters() if p.requires_grad)
