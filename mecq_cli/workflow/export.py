"""`mecq export`: a file to deploy, checked against the simulator before it is called done."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mecq_cli.config import ExportConfig
from mecq_cli.data import (
    ImageDataset,
    eval_batches,
    normalize,
)
from mecq_cli.errors import UsageError
from mecq_cli.events import Listener
from mecq_cli.export import onnx, safetensors
from mecq_cli.export.ort import OrtRunner
from mecq_cli.export.snippet import snippet
from mecq_cli.integer.ir import IntegerModel
from mecq_cli.integerize import IntegerModule
from mecq_cli.runs import RunFolder, Target, resolve_target
from mecq_cli.storage import atomic_write
from mecq_cli.verify import Comparison, Predict, compare, count_steps
from mecq_cli.workflow.common import eval_batch_size
from mecq_cli.workflow.export_weights import export_weights
from mecq_cli.workflow.targets import (
    evaluation_split,
    preprocessing_of,
    require_artifact,
    settings_of,
)

Array = NDArray[np.float32]
UNFUSED_IMAGES = 8
"""Images for the check of the graph as written; every integer of every layer is compared."""


def export(config: ExportConfig, listener: Listener) -> dict[str, Any]:
    """Write RUN/model.onnx (or ``output``) and verify it on real images.

    Only the integer artifact is read; the weights the run started from are not needed.

    Raises:
        VerificationError: the written file does not agree; it is not kept.
        MecqError: see mecq_cli.errors.
    """
    target = resolve_target(config.run)
    source = _source(target)
    model = safetensors.load(source)
    if config.format == "compressed-tensors":
        batches = _images(config, target.run, model, source)
        return export_weights(config, source, model, batches, listener)
    output = _output(config, target, source)
    data = onnx.to_bytes(model) if config.format == "onnx" else safetensors.to_bytes(model)
    images = _images(config, target.run, model, source)
    with tempfile.TemporaryDirectory() as folder:
        # What is verified is the file, not what is in memory; and it must not be kept if wrong.
        trial = Path(folder) / output.name
        atomic_write(trial, data, force=True)
        comparison = _verify(trial, output.name, config.format, model, images, listener)
    atomic_write(output, data, force=config.force)
    document: dict[str, Any] = {
        "path": str(output),
        "format": config.format,
        "bytes": len(data),
        "verified": True,
        "images": comparison.images,
        "top1_agreement": 100.0 * comparison.agree / max(comparison.images, 1),
        "largest_difference": comparison.largest_difference,
    }
    if config.format == "onnx":
        code = output.with_suffix(".py")
        preprocessing = preprocessing_of(model.metadata, source)
        text = snippet(output.name, preprocessing, list(model.metadata.get("classes", ())))
        atomic_write(code, text.encode(), force=True)
        document["snippet"] = str(code)
    return document


def _source(target: Target) -> Path:
    if target.run is not None:
        return require_artifact(target.run)
    if target.kind == "artifact" and target.path is not None:
        return target.path
    raise UsageError(
        f"{target.name}: only a run folder or an integer .safetensors file can be exported"
    )


def _output(config: ExportConfig, target: Target, source: Path) -> Path:
    if config.output is not None:
        output = config.output
    elif config.format == "onnx":
        output = source.with_suffix(".onnx")
    else:
        output = source.with_name(f"{source.stem}-export.safetensors")
    if output.resolve() == source.resolve():
        raise UsageError(f"--output {output}: is the artifact itself; give another name")
    if output.exists() and not config.force:
        raise UsageError(f"{output} exists; --force overwrites it, --output gives another name")
    return output


def _images(
    config: ExportConfig, run: RunFolder | None, model: IntegerModel, source: Path
) -> Iterator[Array]:
    """Some evaluation images, evenly from all classes."""
    split = evaluation_split(settings_of(run), config.data)
    count = min(config.images, len(split))
    chosen = split.take(np.linspace(0, len(split) - 1, count).astype(int).tolist())
    preprocessing = preprocessing_of(model.metadata, source)
    dataset = ImageDataset(chosen, preprocessing)
    batch = min(eval_batch_size(preprocessing), 64)
    for images in eval_batches(dataset, batch_size=batch):
        yield normalize(images.images, preprocessing).contiguous().numpy()


def _is_integer(model: IntegerModel) -> bool:
    """Whether every operation from the first to the last layer works on integers."""
    inner = model.nodes[:-1]
    return all(node.grid is not None for node in inner if node.op != "flatten")


def _verify(
    path: Path,
    name: str,
    kind: str,
    model: IntegerModel,
    batches: Iterator[Array],
    listener: Listener,
) -> Comparison:
    """Run the written file and the simulator's operations on the same images."""
    reference = _torch(IntegerModule(model))
    images = list(batches)
    if kind == "onnx":
        other: Predict = OrtRunner(path).run
    else:
        other = _torch(IntegerModule(safetensors.load(path)))
    listener.note("verifying: against the simulator")
    comparison = compare(reference, other, images)
    comparison.require(name, exact=_is_integer(model))
    if kind == "onnx" and images:
        listener.note("verifying: each operation, without onnxruntime's optimizations")
        few = images[0][:UNFUSED_IMAGES]
        outputs = OrtRunner(path, optimize=False).run_all(few)
        what = f"{name} (without optimizations)"
        count_steps(model, outputs, few, what).require(what)
    return comparison


def _torch(module: IntegerModule) -> Predict:
    def run(images: Array) -> Array:
        logits: Array = module(torch.from_numpy(images)).numpy()
        return logits

    return run
