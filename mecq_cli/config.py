"""Settings: validated, frozen, and each one knows where it came from.

A quantization run takes its settings from four places, the later ones winning:

    default  ->  checkpoint (the config.toml of the run that --resume continues)
             ->  file (--config FILE)  ->  flag

`resolve` puts them together, `to_toml` writes them down so that the same file makes the same
run again. Keys are the names of the fields below; per-layer overrides are ``[[layers]]`` tables:

    model = "resnet18"
    wbits = 2
    abits = 4
    data = "imagenet"

    [[layers]]
    pattern = "layer4.*"
    wbits = 4
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from pathlib import Path
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
    SettingsModel,
    Share,
    Sites,
    Size,
    TaskName,
    UserPath,
    absolute_data,
    label_of,
    near_match,
    validated,
)

FLAG_ONLY = frozenset({"resume", "dry_run", "force"})
"""They say what to do now, not what a run is: never read from nor written to a file."""

CHANGEABLE_ON_RESUME = frozenset(
    {
        "data",
        "checkpoint",
        "output",
        "workers",
        "device",
        "checkpoint_every",
        "keep_checkpoints",
        "log",
        "accumulate",
    }
)
"""What a continued run may do otherwise than before without becoming another run: where its images
and weights are (they must be the same ones), and how it is carried out."""


_CHANGEABLE = ", ".join(label_of(key, "flag") for key in sorted(CHANGEABLE_ON_RESUME - {"output"}))


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


TARGETS = ("target_avg_bits", "target_size")
_SETTLED_BY_TARGET = ("wbits", "allotted", *TARGETS)


class QuantizeConfig(Settings):
    """What ``mecq quantize`` does.

    None means "chosen by the program" wherever it is the default; the config.toml of a run holds
    what was chosen.

    Attributes:
        model: timm name, "torchvision/NAME" or one of our CIFAR ResNets.
        wbits, abits: bits of weights and activations, 1 to 8, or 32 for float. With a target,
            ``wbits`` is the whole number next to the average, which the weight decay goes by.
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
        mec_on: what is coded: penultimate, stages, layers, weights, joined by "+".
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
    mec_on: Sites = "stages"
    mec_views: Literal["quantized", "fp+quantized"] = "fp+quantized"
    mec_align: PositiveOrZero | None = None
    mec_grid: Count = 1
    mec_estimator: Name = "moe"
    mec_experts: Experts = "all"
    mec_order: Count = 4
    mec_term: Literal["entropy", "divergence", "target", "alignment", "centring"] | None = None
    output: UserPath | None = None
    checkpoint_every: Count | None = None
    keep_checkpoints: Count = 2
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

    @property
    def target(self) -> str | None:
        """The target as it was given, for people; None without one."""
        if self.target_avg_bits is not None:
            return f"--target-avg-bits {self.target_avg_bits:g}"
        return None if self.target_size is None else f"--target-size {self.target_size}"

    @model_validator(mode="after")
    def _has_both_views(self) -> QuantizeConfig:
        if self.mec_term in ("divergence", "target", "alignment") and self.mec_views == "quantized":
            raise ValueError(f"mec_term {self.mec_term!r} needs mec_views 'fp+quantized'")
        return self


class EvalConfig(Settings):
    """What ``mecq eval`` does. ``target`` None is the latest run, ``data`` None its data."""

    target: str | None = None
    data: DataName | None = None
    task: TaskName = "auto"
    checkpoint: UserPath | None = None
    pretrained: bool = True
    split: Name | None = None
    simulator: bool = False
    img_size: Count | None = None
    crop_pct: CropPct | None = None
    batch_size: Count | None = None
    workers: CountOrZero | None = None
    device: Name = "auto"


class ExportConfig(Settings):
    """What ``mecq export`` does.

    Attributes:
        run: run folder or artifact; None is the latest run.
        format: onnx, compressed-tensors, or a name of mecq_cli.export.formats, checked there.
        profile: form of an ONNX file (see mecq_cli.export.onnx); None is "ort".
        verify: False writes the file unverified, True also replays it layer by layer; None
            compares the logits, and the layers of graphs that compute in float.
        output: the file; None names it after the artifact.
        data: images to verify on; None are those of the run.
        images: how many.
        force: replace a file that exists.
    """

    run: str | None = None
    format: Name = "onnx"
    profile: Literal["ort", "portable", "qonnx"] | None = None
    verify: bool | None = None
    output: UserPath | None = None
    data: DataName | None = None
    images: Count = 256
    force: bool = False


class PredictConfig(Settings):
    """What ``mecq predict`` does.

    Attributes:
        target: run, artifact or ONNX file.
        images: to look at.
        output: folder for the files of a network that segments or detects; None is the current
            one.
        force: replace masks that exist.
    """

    target: Name
    images: Annotated[tuple[UserPath, ...], Field(strict=False)]
    output: UserPath | None = None
    force: bool = False


class InspectConfig(Settings):
    """What ``mecq inspect`` does. ``target`` None is the latest run."""

    target: str | None = None


class ReportConfig(Settings):
    """What ``mecq report`` does.

    Attributes:
        run: run folder; None is the latest run.
        output: the page; None is report.html in the run.
        data: images; None are those of the run.
        images: how many at most, evenly from all classes.
        force: replace a file that is no report.
    """

    run: str | None = None
    output: UserPath | None = None
    data: DataName | None = None
    images: Count = 5000
    force: bool = False


class CompareConfig(Settings):
    """What ``mecq compare`` does.

    Attributes:
        runs: run folders, two or more.
        html: a page to write, with curves over each other.
        force: replace a file that is no page of ours.
    """

    runs: Annotated[tuple[Name, ...], Field(strict=False)]
    html: UserPath | None = None
    force: bool = False


class DemoConfig(Settings):
    """What ``mecq demo`` does. ``output`` None is runs/demo."""

    output: UserPath | None = None
    force: bool = False


def from_flags(kind: type[SettingsModel], flags: Mapping[str, Any]) -> SettingsModel:
    """Settings of a small command. None stands for a flag that was not given.

    Raises:
        UsageError: a value out of its range.
    """
    given = {key: value for key, value in flags.items() if value is not None}
    return validated(kind, given, dict.fromkeys(given, "flag"))


def resolve(
    file: Path | None, flags: Mapping[str, Any], *, restarts: bool = False
) -> tuple[QuantizeConfig, dict[str, Origin]]:
    """The settings of a run, and the origin of each.

    Args:
        file: the TOML file named by --config.
        flags: by field name; None stands for a flag that was not given.
        restarts: a launcher repeats this very command when a process fails, so it continues what
            it finds in the output folder.

    Raises:
        UsageError: an unknown or missing key, a value out of its range, flags that contradict
            each other, or a resumed run that is asked to become another one.
    """
    values, origins = _gathered({"file": {} if file is None else read_toml(file), "flag": flags})
    if restarts and not values.get("dry_run"):
        _check_repeatable(values)
        values["resume"] = True
    if values.get("resume") and values.get("force"):
        raise UsageError("--resume and --force: one continues a run, the other starts it over")
    output = values.get("output")
    if values.get("resume") and output is None:
        raise UsageError("--resume: which run? give --output RUN; runs/latest names the latest")
    if values.get("resume") and isinstance(output, (str, Path)):
        _continue_stored(Path(output).expanduser() / "config.toml", values, origins)
    _settle_wbits(values, origins)
    return validated(QuantizeConfig, values, origins, file), origins


def _gathered(
    sources: Mapping[Origin, Mapping[str, Any]],
) -> tuple[dict[str, Any], dict[str, Origin]]:
    """The values of all sources, of which later ones win, and where each is from."""
    values: dict[str, Any] = {}
    origins: dict[str, Origin] = dict.fromkeys(QuantizeConfig.model_fields, "default")
    for origin, source in sources.items():
        given = {key: value for key, value in source.items() if value is not None}
        if given.keys() & {"wbits", *TARGETS}:
            # Another answer to the same question, which takes the place of an earlier one.
            for key in _SETTLED_BY_TARGET:
                values.pop(key, None)
                origins[key] = "default"
        elif "sensitivity" in given and values.pop("allotted", None):
            values.pop("wbits", None)
        values |= given
        origins |= dict.fromkeys(given, origin)
    return values, origins


def _settle_wbits(values: dict[str, Any], origins: Mapping[str, Origin]) -> None:
    """Where a target allots the bits, ``wbits`` follows from it; what does not go together.

    Raises:
        UsageError: two targets, or a target and wbits.
    """
    given = [key for key in TARGETS if values.get(key) is not None]
    if not given:
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


def explain(file: Path | None, flags: Mapping[str, Any], run: Path | None) -> dict[str, Any]:
    """Every setting with its value and origin; those that must be given may be missing.

    Args:
        file: the TOML file named by --config.
        flags: by field name; None stands for a flag that was not given.
        run: the config.toml of a run to start from, whose values have the origin "run" where they
            are not the default.

    Raises:
        UsageError: as `resolve`.
    """
    stored = {} if run is None else read_toml(run)
    defaults = {key: field.default for key, field in QuantizeConfig.model_fields.items()}
    own = {key: value for key, value in stored.items() if value not in (defaults[key], [])}
    read = {} if file is None else read_toml(file)
    values, origins = _gathered({"run": own, "file": read, "flag": flags})
    _settle_wbits(values, origins)
    required = [key for key, field in QuantizeConfig.model_fields.items() if field.is_required()]
    missing = [key for key in required if key not in values]
    # Any value of the type will do for the check.
    filled = {key: {"wbits": 8, "abits": 8}.get(key, key) for key in missing}
    config = validated(QuantizeConfig, values | filled, origins, file or run)
    shown = config.model_dump(mode="json", exclude=set(FLAG_ONLY))
    return {
        "settings": {
            key: {"value": None, "origin": "missing"}
            if key in missing
            else {"value": value, "origin": origins[key]}
            for key, value in shown.items()
        }
    }


def _check_repeatable(values: Mapping[str, Any]) -> None:
    """Whether the same command, given again, goes on with the run it began."""
    if values.get("output") is None:
        raise UsageError(
            "--output is missing: the launcher may restart this command (--max-restarts), which "
            "then has to find its run; give --output DIR"
        )
    if values.get("force"):
        raise UsageError(
            "--force: the launcher may restart this command (--max-restarts), which would start "
            "over each time; leave it out and give another --output"
        )


def _continue_stored(stored_file: Path, values: dict[str, Any], origins: dict[str, Origin]) -> None:
    """Fill ``values`` up with what the run was started with; refuse what would change it."""
    if not stored_file.is_file():
        if not {"model", "wbits", "abits", "data"} <= values.keys():
            raise UsageError(
                f"--resume: {stored_file.parent} holds no run to continue; name another --output, "
                "or give MODEL, --wbits, --abits and --data to start one there"
            )
        return
    stored = from_toml(stored_file)
    for key in QuantizeConfig.model_fields.keys() - FLAG_ONLY:
        before = getattr(stored, key)
        if key not in values or values[key] == "auto":  # what "auto" chose then holds
            values[key] = before
            origins[key] = "checkpoint"
        elif key not in CHANGEABLE_ON_RESUME:
            asked = _comparable(values[key])
            if asked != _comparable(before):
                raise UsageError(
                    f"{label_of(key, origins[key])}: got {asked!r}, but {stored_file.parent} was "
                    f"started with {_comparable(before)!r}; leave it out to continue (--resume may "
                    f"change {_CHANGEABLE}), or give another --output"
                )


def _comparable(value: Any) -> Any:
    """Per-layer overrides as dictionaries, however they were given."""
    if isinstance(value, (list, tuple)):
        return [
            item.model_dump(exclude_none=True) if isinstance(item, Settings) else item
            for item in value
        ]
    return value


def read_toml(path: Path) -> dict[str, Any]:
    """The keys of a settings file; their values are not looked at yet.

    Raises:
        UsageError: the file cannot be read or parsed, or has a key that is unknown.
    """
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"settings file {path}: {error.strerror or error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"settings file {path}: not valid TOML: {error}") from error
    for key in document:
        if key in FLAG_ONLY:
            raise UsageError(
                f"settings file {path}: '{key}' is a flag only: {label_of(key, 'flag')}"
            )
        _check_key(key, set(QuantizeConfig.model_fields) - FLAG_ONLY, str(path))
    for name, kind in (("layers", LayerOverride), ("allotted", Allotted)):
        tables = document.get(name, [])
        for table in tables if isinstance(tables, list) else []:
            for key in table if isinstance(table, dict) else {}:
                _check_key(key, set(kind.model_fields), f"{path}, [[{name}]]")
    return document


def from_toml(path: Path) -> QuantizeConfig:
    """Complete settings from one file, such as the config.toml of a run.

    Raises:
        UsageError: as `read_toml`, or a value is missing or out of its range.
    """
    values = read_toml(path)
    origins: dict[str, Origin] = dict.fromkeys(values, "file")
    _settle_wbits(values, origins)
    return validated(QuantizeConfig, values, origins, path)


def to_toml(config: QuantizeConfig) -> str:
    """All settings as a TOML document that `from_toml` reads and that makes the same run again.

    Left out are ``output``, so that the file can be used for a second run, and the flags that say
    what to do now. Paths are absolute, so that it does not matter where it is read.
    """
    import tomli_w

    values = config.model_dump(exclude={"output", *FLAG_ONLY}, exclude_none=True)
    for key, value in values.items():
        if isinstance(value, Path):
            values[key] = str(value.absolute())
    values["data"] = absolute_data(config.data)
    if config.target and not config.allotted:
        del values["wbits"]  # a guess, until the bits are allotted
    # TOML wants tables after the plain keys, and these are the last fields.
    return tomli_w.dumps(values)


def _check_key(key: str, known: set[str], where: str) -> None:
    if key not in known:
        raise UsageError(f"settings file {where}: unknown key {near_match(key, known)}")
