"""One network three times as ONNX: float, 8 bits by onnxruntime, and the integer export."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from mecq_cli.calibration import calibrate
from mecq_cli.data import ImageDataset, eval_batches, find_splits, normalize, open_split
from mecq_cli.errors import ArtifactError, UsageError, VerificationError
from mecq_cli.events import Listener
from mecq_cli.export import onnx as integer_onnx
from mecq_cli.export.float_onnx import float_onnx
from mecq_cli.export.ort import OrtRunner
from mecq_cli.export.static_int8 import static_int8
from mecq_cli.insertion import BitPlan, insert
from mecq_cli.integer.ir import IntegerModel
from mecq_cli.integerize import integerize
from mecq_cli.layout import FLAT
from mecq_cli.models.detector import KEY
from mecq_cli.models.loading import LoadedModel, load_model
from mecq_cli.models.preprocessing import Preprocessing
from mecq_cli.target import Target
from mecq_cli.workflow.artifacts import load_artifact, preprocessing_of
from mecq_cli.workflow.deploy_settings import MODEL_ONLY, DeployConfig
from mecq_cli.workflow.targets import require_artifact

FP32, STATIC, MECQ = "fp32", "static_int8", "mecq"
ARMS = (FP32, STATIC, MECQ)

_BATCH = 8
_TOLERANCE = 1e-3
"""Of the float file's logits against torch's, relative to the largest one."""


@dataclass(frozen=True)
class Networks:
    """What is compared.

    Attributes:
        model: name of the FP model.
        weights: "random", or the name of a file.
        images: float32 [N, C, H, W], normalised, which calibrated them.
        files: an ONNX file for each of `ARMS`.
        integer: the integer network.
    """

    model: str
    weights: str
    images: NDArray[np.float32]
    files: dict[str, Path]
    integer: IntegerModel


def build(config: DeployConfig, target: Target, folder: Path, listener: Listener) -> Networks:
    """Write the three files into ``folder``.

    Raises:
        UsageError: a setting the target has no use for, or one that is missing.
        VerificationError: the float file computes something else than the model.
        MecqError: see mecq_cli.errors.
    """
    torch.manual_seed(0)
    if target.kind == "model":
        loaded, integer = _named(config, target), None
    else:
        loaded, integer = _stored(config, target)
    size = loaded.preprocessing.input_size if integer is None else integer.input_shape
    images = _images(config, loaded.preprocessing)
    if loaded.weights == "random":
        _settle(loaded.module, images)
    files = {arm: folder / f"{arm}.onnx" for arm in ARMS}
    listener.note(f"{loaded.name}: float, with {loaded.weights} weights")
    proto = float_onnx(loaded.module, size)
    onnx.save_model(proto, files[FP32])
    _check_float(files[FP32], loaded.module, images[:_BATCH])
    listener.note("8 bits by onnxruntime")
    batches = [batch.numpy() for batch in images.split(_BATCH)]
    files[STATIC].write_bytes(static_int8(proto, batches))
    if integer is None:
        listener.note(f"integers by mecq, W{config.wbits} A{config.abits}")
        integer = _quantized(config, loaded, images)
    # What makes boxes of the outputs is in neither of the others.
    metadata = {key: value for key, value in integer.metadata.items() if key != KEY}
    integer_onnx.save(replace(integer, metadata=metadata), files[MECQ])
    return Networks(loaded.name, loaded.weights, images.numpy(), files, integer)


def _named(config: DeployConfig, target: Target) -> LoadedModel:
    if config.wbits is None or config.abits is None:
        raise UsageError(f"{target.name} is a model: which bits? give --wbits and --abits")
    return load_model(
        target.name, checkpoint=config.checkpoint, pretrained=False, img_size=config.img_size
    )


def _stored(config: DeployConfig, target: Target) -> tuple[LoadedModel, IntegerModel]:
    """The integer network, and the FP model of its name with random weights."""
    for key in MODEL_ONLY:
        if getattr(config, key) is not None:
            raise UsageError(
                f"--{key.replace('_', '-')} is for model names; {target.name} has its own"
            )
    path = target.path if target.run is None else require_artifact(target.run)
    if path is None or target.kind == "onnx":
        raise UsageError(
            f"{target.name}: give a run folder, an integer .safetensors file or a model name"
        )
    integer = load_artifact(path)
    name, preprocessing = integer.metadata.get("model"), preprocessing_of(integer.metadata, path)
    if not isinstance(name, str):
        raise ArtifactError(f"{path}: does not say which model it is of; quantize it again")
    shape = integer.output.tensors["bias"].shape if integer.output.tensors else ()
    classes = len(integer.metadata.get("classes", ())) or (shape[0] if shape else None)
    size = preprocessing.input_size[-1]
    return load_model(name, pretrained=False, num_classes=classes, img_size=size), integer


def _quantized(config: DeployConfig, loaded: LoadedModel, images: Tensor) -> IntegerModel:
    """Calibrated, not trained."""
    assert config.wbits is not None
    assert config.abits is not None
    plan = BitPlan(
        config.wbits,
        config.abits,
        first_last_bits=config.first_last_bits or 8,
        residual_bits=config.residual_bits or 8,
    )
    size = loaded.preprocessing.input_size
    network = insert(loaded.module, size, plan)
    batches = images.split(_BATCH)
    calibrate(network, batches, len(batches))
    metadata: dict[str, Any] = {
        "model": loaded.name,
        "wbits": config.wbits,
        "abits": config.abits,
        "preprocessing": loaded.preprocessing.to_json(),
    }
    return integerize(network.eval(), size, metadata)


def _images(config: DeployConfig, preprocessing: Preprocessing) -> Tensor:
    """Normalised images [N, C, H, W]: of --data, evenly from all classes, or synthetic ones."""
    count = config.calibration_images
    if config.data is None:
        pixels = [synthetic(count, preprocessing.input_size)]
    else:
        split = open_split(config.data, next(iter(find_splits(config.data)), FLAT))
        dataset = ImageDataset(split.evenly(count), preprocessing)
        pixels = [batch.images for batch in eval_batches(dataset, batch_size=_BATCH)]
    return normalize(torch.cat(pixels), preprocessing).contiguous()


def synthetic(count: int, size: tuple[int, int, int]) -> Tensor:
    """Blurred noise, uint8 [count, C, H, W]; always the same."""
    channels, height, width = size
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, channels, -(-height // 8), -(-width // 8), generator=generator)
    pixels = F.interpolate(coarse, size=(height, width), mode="bilinear") * 255
    return pixels.round().to(torch.uint8)


@torch.no_grad()
def _settle(model: nn.Module, images: Tensor) -> None:
    """Give a random network the batch norm statistics of these images.

    Without them values fade or grow from layer to layer, down to subnormal numbers, with which
    float arithmetic is slow: the comparison would flatter the integers.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    model.eval()
    for norm in norms:
        if norm.affine and not bool(norm.weight.any()):
            nn.init.ones_(norm.weight)  # zero at the start of a training
        norm.train()
        norm.momentum = 1.0
    model(images[:_BATCH])
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.eval()


@torch.no_grad()
def _check_float(path: Path, model: nn.Module, images: Tensor) -> None:
    """The baseline must be the model, not something that resembles it."""
    logits = OrtRunner(path, allow_foreign=True).run(images.numpy())
    wanted = model.eval()(images).numpy()
    largest, off = float(np.abs(wanted).max()), float(np.abs(logits - wanted).max())
    if not off <= _TOLERANCE * largest:
        raise VerificationError(
            "the float ONNX file computes something else than the model: logits differ by up to "
            f"{off:.1e}, the largest is {largest:.1e}"
        )
