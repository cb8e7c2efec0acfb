"""`mecq_cli.quantize`: what ``mecq quantize`` does, for a model and images of a program."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import nan
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack

import torch
from torch import nn
from torch.utils.data import DataLoader

from mecq_cli.config import (
    TARGETS,
    ExportConfig,
    LayerOverride,
    QuantizeConfig,
    from_flags,
    resolve,
)
from mecq_cli.data import Split, masked_split_of, split_of
from mecq_cli.data.items import float_shape, items_of
from mecq_cli.data.sources import find_splits
from mecq_cli.errors import UsageError
from mecq_cli.events import Listener
from mecq_cli.models.loading import LoadedModel
from mecq_cli.models.preprocessing import Preprocessing
from mecq_cli.settings import OWN
from mecq_cli.storage import atomic_write
from mecq_cli.tasks.figures import DETECT, SEGMENT
from mecq_cli.workflow.common import task_for
from mecq_cli.workflow.export import export
from mecq_cli.workflow.load import Classifier, load
from mecq_cli.workflow.own_module import IMAGENET, default_preprocessing, load_module
from mecq_cli.workflow.quantize import quantize as run_quantize

Source = Any
"""A torch Dataset in map style, or a DataLoader of one."""
Profile = Literal["ort", "portable", "qonnx"]


class Settings(TypedDict, total=False):
    """The settings of ``mecq quantize`` beside model, bits and data; see `QuantizeConfig`."""

    task: Literal["auto", "classify", "segment", "detect"]
    checkpoint: str | Path
    pretrained: bool
    reset_classifier: bool
    fit_classifier: bool
    target_avg_bits: float
    target_size: str
    sensitivity: Literal["coding", "hessian", "loss"]
    first_last_bits: int
    residual_bits: int
    reduce_range: bool
    quantizer: str
    val_split: float
    img_size: int
    crop_pct: float
    recipe: Literal["quick", "standard", "best"]
    epochs: int
    max_steps: int
    batch_size: int
    accumulate: int
    lr: float
    optimizer: Literal["sgd", "adamw"]
    weight_decay: float
    scale_lr: float
    warmup_epochs: float
    seed: int
    workers: int
    device: str
    amp: Literal["auto", "bf16", "off"]
    compile: Literal["auto", "model", "quantizers", "off"]
    distill: bool
    distill_weight: float
    distill_temperature: float
    teacher: Literal["auto", "float"]
    mec_weight: float
    mec_distortion: float
    mec_warmup: float
    mec_on: str | None
    mec_views: Literal["quantized", "fp+quantized"]
    mec_align: float
    mec_grid: int
    mec_estimator: str
    mec_experts: str
    mec_order: int
    mec_term: Literal["entropy", "divergence", "target", "alignment", "centring"]
    ema: float
    freeze_oscillations: float
    lower_from: int
    eval_every: int
    log: Literal["none", "tensorboard"]
    output: str | Path
    checkpoint_every: int
    keep_checkpoints: int
    calibration_images: int
    bn_images: int
    resume: bool
    force: bool
    layers: Sequence[LayerOverride | Mapping[str, Any]]


@dataclass(frozen=True)
class Quantized:
    """A quantized model, as `mecq_cli.quantize` returns it.

    Calling it is calling ``module``: normalised images, float32 [N, C, H, W], to logits
    [N, classes], by the integer operations that the exported file holds.

    Attributes:
        module: the integer model as a torch module.
        float_top1: of the float model, in percent, on the evaluation images; NaN of a model
            that segments or detects, which has ``float_miou`` or ``float_map`` instead.
        top1: of the integer model, read back from its file; NaN, ``miou`` and ``map``, likewise.
        images: how many those were.
        run: the run folder, for ``mecq eval``, ``mecq export``, ``resume=True`` ...
        summary: all figures, as in the summary.json of the run.
    """

    module: Classifier
    float_top1: float
    top1: float
    images: int
    run: Path
    summary: Mapping[str, Any] = field(repr=False)
    val: Split = field(repr=False)

    @property
    def float_miou(self) -> float | None:
        """Mean IoU of the float model in percent; None of one that classifies."""
        return self.summary.get("fp_miou")

    @property
    def miou(self) -> float | None:
        """Mean IoU of the integer model in percent; None of one that classifies."""
        return self.summary.get("miou")

    @property
    def float_map(self) -> float | None:
        """Mean average precision of the float model in percent; None unless it detects."""
        return self.summary.get("fp_map")

    @property
    def map(self) -> float | None:
        """Mean average precision of the integer model in percent; None unless it detects."""
        return self.summary.get("map")

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return self.module(images)  # type: ignore[no-any-return]

    def save(self, path: str | os.PathLike[str], *, force: bool = False) -> Path:
        """Write the integer artifact, which `mecq_cli.load` reads, to a .safetensors file.

        Raises:
            UsageError: the file exists, and ``force`` is False; or it has another ending.
        """
        path = Path(path)
        if path.suffix != ".safetensors":
            raise UsageError(f"{path}: an artifact is a .safetensors file; for ONNX use .export()")
        atomic_write(path, (self.run / "model.safetensors").read_bytes(), force=force)
        return path

    def export(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        profile: Profile = "ort",
        images: int = 256,
        verify: bool | None = None,
        force: bool = False,
        listener: Listener | None = None,
    ) -> Path:
        """Write ONNX and verify it, as ``mecq export`` does; returns the file.

        Args:
            path: of the file; None: model.onnx in the run folder.
            profile: form of the file (docs/export.md).
            images: how many of the evaluation images to verify on.
            verify: True also layer by layer, False not at all.
            force: replace a file that exists.
            listener: hears of the progress.

        Raises:
            VerificationError: the file does not compute what this model does; it is not kept.
            UsageError: the file exists, and ``force`` is False.
        """
        config = from_flags(
            ExportConfig,
            {
                "run": str(self.run), "profile": profile, "images": images, "verify": verify,
                "force": force, "output": None if path is None else Path(path),
            },
        )  # fmt: skip
        return Path(export(config, listener or Listener(), self.val)["path"])


def quantize(
    model: nn.Module | str,
    data: str | os.PathLike[str] | tuple[Source, Source],
    wbits: int | None = None,
    abits: int = 4,
    *,
    preprocessing: Preprocessing | None = None,
    classes: Sequence[str] | None = None,
    listener: Listener | None = None,
    **settings: Unpack[Settings],
) -> Quantized:
    """Train a model with quantized weights and activations, down to integers.

    Args:
        model: a trained classifier [N, C, H, W] -> [N, classes], or a network that segments, ->
            [N, classes, H, W] (or a dict with that as "out"), any forward that torch.export
            reads; or an SSD or RetinaNet of torchvision's, with any backbone and heads. It stays as
            it is. Or a name, as ``mecq quantize`` takes it.
        data: what ``--data`` takes, as a folder; or (train, val): two data sets in map style, or
            DataLoaders of such, that give (image, label), or (image, mask) to a network that
            segments. An image is a Pillow image or a uint8 tensor [3, H, W], which mecq resizes,
            augments and normalises; or a float tensor [C, H, W] as the model takes it, augmented
            by the data set. A mask has the size of its image, and the index of a class in each
            pixel (255: ignored): integers [H, W], or a Pillow image of 8 bits.
        wbits, abits: bits of weights and activations, 1 to 8, or 32 for float. Of the weights 4,
            if no ``target_avg_bits`` or ``target_size`` gives each layer its own.
        preprocessing: of a module's images. By default 224 pixels, cropped from 256, with mean and
            standard deviation of ImageNet; of an SSD or RetinaNet what its transform says; for
            float tensors their own size, mean 0 and standard deviation 1. With float tensors it
            only tells the files how to read images.
        classes: names of the classes; by default those of the data, or numbers.
        listener: hears of the progress; `mecq_cli.progress` makes one that shows it.
        settings: of ``mecq quantize``, as ``epochs=10``.

    Raises:
        MecqError: see mecq_cli.errors; each message is one line.
    """
    given: dict[str, Any] = {**settings, "abits": abits}
    if wbits is not None or not any(given.get(key) is not None for key in TARGETS):
        given["wbits"] = 4 if wbits is None else wbits
    config, origins = resolve(None, _flags(model, data, given))
    if isinstance(data, (str, os.PathLike)):
        if classes is not None or (isinstance(model, str) and preprocessing is not None):
            raise UsageError(
                "classes of a folder are its class folders, and a model that is named has a "
                "preprocessing of its own (img_size and crop_pct change it); leave them out"
            )
        loaded = None
        if not isinstance(model, str):
            find_splits(config.data)  # a folder that is not there is no fault of the module
            loaded = load_module(model, preprocessing or default_preprocessing(model), config)
        task = task_for(config.task, config.model, loaded)
        splits = task.open_training(config.data, config.val_split, config.seed)
    elif isinstance(model, str):
        raise UsageError(f"model {model!r}: a name takes a folder of images; give the module")
    else:
        loaded, splits = _with_items(model, data, preprocessing, classes, config)
    summary = run_quantize(config, origins, listener or Listener(), splits, loaded)
    run = Path(summary["run"])
    module = load(run / "model.safetensors")
    figures = (summary.get("fp_top1", nan), summary.get("top1", nan), summary["images"])
    return Quantized(module, *figures, run, summary, splits[1])


def _flags(model: Any, data: Any, given: dict[str, Any]) -> dict[str, Any]:
    """The settings as the flags of a command."""
    if "dry_run" in given:
        raise UsageError("dry_run is of the command: mecq quantize --dry-run, or quantize_config")
    for key in ("checkpoint", "output"):
        if given.get(key) is not None:
            given[key] = Path(given[key])
    if isinstance(given.get("layers"), list):
        given["layers"] = tuple(given["layers"])
    if isinstance(model, str):
        given["model"] = model
    elif isinstance(model, nn.Module):
        for key in ("checkpoint", "pretrained", "reset_classifier", "fit_classifier"):
            if key in given:
                raise UsageError(f"{key}: a module brings its own weights; leave it out")
        given["model"] = f"{OWN}{type(model).__name__}"
    else:
        raise UsageError(f"model: got {type(model).__name__}; give a torch module, or a name")
    if isinstance(data, (str, os.PathLike)):
        given["data"] = os.fspath(data)
    elif isinstance(data, (tuple, list)) and len(data) == 2:
        given["data"] = f"{OWN}datasets"
        if isinstance(data[0], DataLoader) and data[0].batch_size:
            given.setdefault("batch_size", data[0].batch_size)
    else:
        raise UsageError(
            f"data: got {type(data).__name__}; give a folder, or (train, val) as two data sets"
        )
    return given


def _with_items(
    model: nn.Module,
    data: tuple[Source, Source],
    preprocessing: Preprocessing | None,
    classes: Sequence[str] | None,
    config: QuantizeConfig,
) -> tuple[LoadedModel, tuple[Split, Split]]:
    """Model and splits, where the images are data sets of the program."""
    shape, other = float_shape(data[0]), float_shape(data[1])
    if shape is not None and other is not None and other != shape:
        raise UsageError(
            f"data: train has float tensors {list(shape)} and val {list(other)}; give both as the "
            "model takes them"
        )
    if shape is None:
        preprocessing = preprocessing or IMAGENET
    else:
        if config.img_size is not None:
            raise UsageError("img_size: float tensors have the size they have; leave it out")
        plain = Preprocessing(shape, (0.0,) * shape[0], (1.0,) * shape[0], "bilinear", crop_pct=1.0)
        preprocessing = replace(preprocessing or plain, input_size=shape)
    loaded = load_module(model, preprocessing, config)
    if loaded.task == DETECT:
        raise UsageError(
            f"data: {loaded.name} detects, and data sets of a program give one label an image, or "
            "a mask; give a folder with annotations/ as COCO has them (docs/detection.md)"
        )
    names = tuple(classes if classes is not None else _names(data[0]) or ())
    names = names or tuple(map(str, range(loaded.num_classes)))
    if len(names) != loaded.num_classes:
        raise UsageError(
            f"classes: got {len(names)} names; the model has {loaded.num_classes} outputs"
        )
    made = masked_split_of if loaded.task == SEGMENT else split_of
    return loaded, (made(data[0], "train", names), made(data[1], "val", names))


def _names(data: Source) -> Sequence[str] | None:
    """The classes, where a data set says them as torchvision's do."""
    names: Any = getattr(items_of(data), "classes", None)
    return [str(name) for name in names] if isinstance(names, (list, tuple)) else None
