"""What a run is: the settings of ``mecq quantize``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from mecq_cli.errors import UsageError
from mecq_cli.settings import (
    AverageBits,
    Bits,
    Count,
    CountOrZero,
    CropPct,
    DataName,
    Decay,
    Experts,
    Fraction,
    LowerFrom,
    Name,
    Origin,
    Positive,
    PositiveOrZero,
    ResidualBits,
    Settings,
    Share,
    Sites,
    Size,
    TaskName,
    UserPath,
    label_of,
)

FLAG_ONLY = frozenset({"resume", "dry_run", "force"})
"""They say what to do now, not what a run is: never read from nor written to a file."""


class LayerOverride(Settings):
    """Bits of the layers whose module path matches ``pattern``; of several, the last one wins.

    Attributes:
        pattern: shell-style (fnmatch), such as "layer4.*".
        wbits, abits: None keeps what the run says.
    """

    pattern: Name
    wbits: Bits | None = None
    abits: Bits | None = None

    @model_validator(mode="after")
    def _says_something(self) -> LayerOverride:
        if self.wbits is None and self.abits is None:
            raise ValueError("wbits, abits or both")
        return self


class Allotted(Settings):
    """Bits that a target gave the weights of a layer.

    Attributes:
        layer: its name.
        wbits: bits of its weights.
        sensitivity: what rounding it alone to those bits costs, as it was measured.
    """

    layer: Name
    wbits: Bits
    sensitivity: float


class Allotment(Settings):
    """How `QuantizeConfig.allotted` came about.

    Attributes:
        asked: what it is the answer to, see `mecq_cli.config.question`.
        images: that were measured on.
        seconds: that it took.
        optimal, gap: as of `mecq_cli.precision.Allotment`.
    """

    asked: str
    images: int
    seconds: float
    optimal: bool
    gap: float | None = None


OF_BOTH_VIEWS = ("divergence", "target", "alignment")
"""Values of ``mec_term`` that need the features of the float model, too."""

ORDER = 4
"""Of the series of the estimator taylor."""

TARGETS = ("target_avg_bits", "target_size")


class QuantizeConfig(Settings):
    """What ``mecq quantize`` does.

    None means "chosen by the program" wherever it is the default; the config.toml of a run holds
    what was chosen.

    Attributes:
        model: timm name, "torchvision/NAME" or one of our CIFAR ResNets.
        wbits, abits: bits of weights and activations, 1 to 8, or 32 for float. With a target,
            ``wbits`` is the whole number next to the average, which the weight decay goes by, and
            the learning rate of some families.
        target_avg_bits: bits of a weight, on average over the layers that ``wbits`` would govern.
        target_size: bytes of all packed weights, with their scales and biases, such as "300kB".
        sensitivity: what a target is met by: what rounding a layer costs, see mecq_cli.precision.
        allotted: the bits of each layer that a target led to; empty until they are measured.
        data: images with a training and an evaluation split: a folder, tar files, wds/PATH or
            hfds/NAME (see mecq_cli.data.sources).
        checkpoint: weights to start from; else the library's pretrained ones.
        pretrained: False starts from random weights.
        reset_classifier: replace a classifier whose size does not fit the data.
        fit_classifier: fit such a one to the float model's features before anything is quantized.
        first_last_bits, residual_bits: bits of the first and the last layer, and of the
            stream that residual additions work on.
        reduce_range: weights of 8 bits are limited to 7 (-64 to 63), so that sums of two products
            fit 16 bits on CPUs without VNNI.
        quantizer: how values are rounded and what is learned of it; its name is one of
            mecq_cli.quantizers.QUANTIZERS (checked there: this module needs no torch).
        val_split: share of the training images to hold out where there is no evaluation split.
        img_size, crop_pct: override the preprocessing of the model.
        task: classify, segment or detect; auto is what the model is made for.
        recipe: how long the training is where ``epochs`` does not say it (training/recipe.py).
        epochs, max_steps: length of training; 0 epochs is post-training quantization.
        batch_size, lr, optimizer, weight_decay, warmup_epochs: the recipe; the batch is that of
            all processes together.
        accumulate: micro-batches that a batch is computed in, for less memory.
        scale_lr: learning rate of the quantizer scales, as a multiple of ``lr``.
        seed: of initialisation and of the order of the images.
        workers: loader processes; 0 loads in the main one. None: by the device and the cores.
        device: "auto", "cpu", "cuda", "cuda:1", ...
        amp, compile: of the training step only.
        distill, distill_weight, distill_temperature: learn from the float model's logits.
        teacher: how the float model is computed for that: auto takes integers of 8 bits where the
            training step is compiled and they say the same; float.
        mec_weight: weight of the entropy regularizer; 0 switches it off. None: that of its term,
            or what suits the network (training/balance.py).
        mec_on: what is coded: penultimate, stages, layers, weights, joined by "+". None: by the
            family of the network.
        mec_views: "quantized" features alone, or jointly with those of the float model.
        mec_align: with two views, weight of their agreement beside the joint coding length.
        mec_grid: feature maps are averaged within this many cells along each side.
        mec_estimator: of the coding length: a name of mecq_cli.entropy.ESTIMATORS, checked there.
        mec_experts: those the mixture may use, joined by "+".
        mec_order: of the series of the estimator taylor.
        mec_distortion: eps_d^2 = eps^2 / d of the coding length (MEC, arXiv 2210.11464).
        mec_warmup: share of the steps over which 1/lambda falls to its final value.
        mec_term: "divergence", "entropy", or a control (see EntropySettings).
        output: the run folder itself.
        checkpoint_every: steps between two checkpoints.
        keep_checkpoints: how many are kept, the last ones; with 1 there is none to fall back to
            where it is damaged.
        eval_every: epochs between two evaluations of the network in training; 0: only at the end.
        log: where the metrics go beside metrics.jsonl: none, or tensorboard (RUN/tensorboard).
        calibration_images: seen for the first activation scales.
        bn_images: seen to re-estimate the batch norm statistics; 0 keeps the trained ones.
        ema: decay of the moving average of what is learned, which is kept; 0 keeps the last.
        freeze_oscillations: frequency above which a weight that jumps between two levels is
            frozen, such as 0.02; 0 freezes none; None: by the family of the network.
        lower_from: bits that the training begins with, to lower them step by step; 0 begins with
            those asked for.
        resume: continue the run in ``output``.
        dry_run: show what would be quantized, write nothing.
        force: start over in an output folder that is in use.
        layers: per-layer overrides.
        allotment: how the allotted bits came about.
        chosen: which of the values above the program chose, and what it chose; in the file of a
            run, so that another run from that file chooses anew (see `resolve`).
    """

    model: Name
    wbits: Bits
    abits: Bits
    data: DataName
    task: TaskName = "auto"
    checkpoint: UserPath | None = None
    pretrained: bool = True
    reset_classifier: bool = False
    fit_classifier: bool = True
    target_avg_bits: AverageBits | None = None
    target_size: Size | None = None
    sensitivity: Literal["coding", "hessian", "loss"] = "coding"
    first_last_bits: Bits = 8
    residual_bits: ResidualBits = 8
    reduce_range: bool = False
    quantizer: Name = "auto"
    val_split: Share | None = None
    img_size: Count | None = None
    crop_pct: CropPct | None = None
    recipe: Literal["quick", "standard", "best"] = "standard"
    epochs: CountOrZero | None = None
    max_steps: CountOrZero | None = None
    batch_size: Count | None = None
    accumulate: Count = 1
    lr: Positive | None = None
    optimizer: Literal["sgd", "adamw"] | None = None
    weight_decay: PositiveOrZero | None = None
    scale_lr: PositiveOrZero = 1.0
    warmup_epochs: PositiveOrZero | None = None
    seed: CountOrZero = 0
    workers: CountOrZero | None = None
    device: Name = "auto"
    amp: Literal["auto", "bf16", "off"] = "auto"
    compile: Literal["auto", "model", "quantizers", "off"] = "auto"
    distill: bool = True
    distill_weight: Fraction = 0.5
    distill_temperature: Positive = 1.0
    teacher: Literal["auto", "float"] = "auto"
    mec_weight: PositiveOrZero | None = None
    mec_distortion: Positive = 0.06
    mec_warmup: Fraction = 0.1
    mec_on: Sites | None = None
    mec_views: Literal["quantized", "fp+quantized"] = "fp+quantized"
    mec_align: PositiveOrZero | None = None
    mec_grid: Count = 1
    mec_estimator: Name = "moe"
    mec_experts: Experts = "all"
    mec_order: Count = ORDER
    mec_term: Literal["entropy", "divergence", "target", "alignment", "centring"] | None = None
    output: UserPath | None = None
    checkpoint_every: Count | None = None
    keep_checkpoints: Count = 2
    eval_every: CountOrZero = 0
    log: Literal["none", "tensorboard"] = "none"
    calibration_images: Count = 512
    bn_images: CountOrZero = 2048
    ema: Decay = 0.0
    freeze_oscillations: Fraction | None = None
    lower_from: LowerFrom = 0
    resume: bool = False
    dry_run: bool = False
    force: bool = False
    layers: Annotated[tuple[LayerOverride, ...], Field(strict=False)] = ()
    allotted: Annotated[tuple[Allotted, ...], Field(strict=False)] = ()
    allotment: Allotment | None = None
    chosen: dict[str, bool | int | float | str] = Field(default_factory=dict)

    @property
    def target(self) -> str | None:
        """The target as it was given, for people; None without one."""
        if self.target_avg_bits is not None:
            return f"--target-avg-bits {self.target_avg_bits:g}"
        return None if self.target_size is None else f"--target-size {self.target_size}"

    @model_validator(mode="after")
    def _views_fit_the_term(self) -> QuantizeConfig:
        if self.mec_term in OF_BOTH_VIEWS and self.mec_views == "quantized":
            raise ValueError(
                f"--mec-term {self.mec_term} compares with the float model: it needs --mec-views "
                "fp+quantized"
            )
        if self.mec_term == "centring" and self.mec_views != "quantized":
            raise ValueError("--mec-term centring is of one view: it needs --mec-views quantized")
        if self.mec_term in OF_BOTH_VIEWS and self.mec_on == "weights":
            raise ValueError(
                f"--mec-term {self.mec_term} compares with the float model: it needs features, "
                "such as --mec-on stages, beside weights or instead of them"
            )
        return self

    @model_validator(mode="after")
    def _estimator_has_it(self) -> QuantizeConfig:
        if self.mec_experts != "all" and self.mec_estimator != "moe":
            raise ValueError(
                f"--mec-experts are those of --mec-estimator moe, not of {self.mec_estimator}"
            )
        if self.mec_order != ORDER and self.mec_estimator != "taylor":
            raise ValueError(
                f"--mec-order is that of --mec-estimator taylor, not of {self.mec_estimator}"
            )
        return self

    @model_validator(mode="after")
    def _statistics_are_of_the_average(self) -> QuantizeConfig:
        if self.ema and not self.bn_images:
            raise ValueError(
                "--ema needs --bn-images above 0: the batch norm statistics that training leaves "
                "are not those of averaged weights"
            )
        return self


def settle_wbits(values: dict[str, Any], origins: Mapping[str, Origin]) -> None:
    """Where a target allots the bits, ``wbits`` follows from it; what does not go together.

    Raises:
        UsageError: two targets, or a target and wbits.
    """
    given = [key for key in TARGETS if values.get(key) is not None]
    if not given:
        if origins.get("sensitivity") == "flag":
            raise UsageError(
                "--sensitivity: it is what a target is met by; give --target-avg-bits or "
                "--target-size too"
            )
        return
    labels = [label_of(key, origins.get(key, "default")) for key in given]
    if len(given) == 2:
        raise UsageError(f"{labels[0]} and {labels[1]}: both say how small; give one of them")
    if values.get("allotted"):
        return
    if "wbits" in values and origins.get("wbits") != "checkpoint":
        raise UsageError(
            f"{label_of('wbits', origins.get('wbits', 'default'))} and {labels[0]}: the target "
            "allots the bits of the weights; leave one of them out"
        )
    average = values.get("target_avg_bits")
    known = isinstance(average, (int, float)) and 1 <= average <= 8
    values["wbits"] = whole_bits(float(average)) if known and average is not None else 4


def whole_bits(average: float) -> int:
    """The whole number next to an average of bits; of two, the lower."""
    return min(max(math.ceil(average - 0.5), 1), 8)
