"""`mecq export`: a file to deploy, checked against the simulator before it is called done."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mecq_cli.config import ExportConfig
from mecq_cli.data import Split, dataset_of, eval_batches, normalize
from mecq_cli.errors import UsageError
from mecq_cli.events import Listener
from mecq_cli.export import onnx
from mecq_cli.export.cpu import cpu_path
from mecq_cli.export.formats import FORMATS, require_format
from mecq_cli.export.qonnx import require_qonnx
from mecq_cli.export.snippet import MODES, snippet
from mecq_cli.integer.ir import IntegerModel
from mecq_cli.integer.saturation import saturating
from mecq_cli.runs import is_script
from mecq_cli.storage import atomic_write, require_writable
from mecq_cli.target import Target, resolve_target
from mecq_cli.workflow.artifacts import load_artifact, preprocessing_of, task_of
from mecq_cli.workflow.common import eval_batch_size
from mecq_cli.workflow.evaluation_images import evaluation_split
from mecq_cli.workflow.export_weights import export_weights
from mecq_cli.workflow.targets import require_artifact
from mecq_cli.workflow.verification import verify, verify_file

Array = NDArray[np.float32]

IMAGES = 256
"""To verify on, where nobody says how many."""
ORT_PROFILES = {"ort": "1.24.1", "portable": "1.15"}
"""The profiles that onnxruntime runs, and the oldest version that was tried."""


def export(config: ExportConfig, listener: Listener, split: Split | None = None) -> dict[str, Any]:
    """Write RUN/model.onnx (or ``output``) and verify it on real images.

    Only the integer artifact is read; the weights the run started from are not needed. With
    ``verify`` False nothing is run, and no images are needed; with True all ways of running the
    file are replayed layer by layer.

    Args:
        config: the settings.
        listener: hears of the progress.
        split: images to verify on, instead of those of ``config.data`` or of the run.

    Raises:
        VerificationError: the written file does not agree; it is not kept.
        MecqError: see mecq_cli.errors.
    """
    require_format(config.format)
    profile = _profile(config)
    if config.verify is False and (config.images is not None or config.data is not None):
        unused = "--data" if config.data is not None else "--images"
        raise UsageError(f"{unused} is what a file is verified on, and --no-verify; leave one out")
    if profile == "qonnx" and config.verify is not False:
        require_qonnx()
    target = resolve_target(config.run)
    source = _source(target)
    model = load_artifact(source)
    if config.format == "compressed-tensors":
        batches = _images(config, target, model, source, split)
        return export_weights(config, source, model, batches, listener)
    output = _output(config, target, source, profile)
    document: dict[str, Any] = {"path": str(output), "format": config.format, "verified": False}
    if profile is not None:
        document |= {"profile": profile, "opset": onnx.PROFILES[profile].opset}
    if profile in ORT_PROFILES:
        document["saturation"] = _saturation(model, listener)
    data = onnx.to_bytes(model, profile) if profile else FORMATS[config.format].to_bytes(model)
    document["bytes"] = len(data)
    if config.verify is not False:
        images = list(_images(config, target, model, source, split))
        with tempfile.TemporaryDirectory() as folder:
            # What is verified is the file, not what is in memory; and it must not be kept if wrong.
            trial, deep = Path(folder) / output.name, config.verify is True
            atomic_write(trial, data, force=True)
            if profile is None:
                read = FORMATS[config.format].read
                document |= verify_file(
                    trial, read, output.name, model, images, listener, deep=deep
                )
            else:
                document |= verify(trial, output.name, profile, model, images, listener, deep=deep)
    if profile in ORT_PROFILES and model.input_shape[0] in MODES:
        script = output.with_suffix(".py")
        code = _script(model, source, output.name, ORT_PROFILES[profile]).encode()
        # The model last: whoever finds it finds its script too.
        atomic_write(script, code, force=True)
        document["snippet"] = str(script)
    atomic_write(output, data, force=config.force)
    return document


def _script(model: IntegerModel, source: Path, file: str, version: str) -> str:
    """What goes beside the file, to run it."""
    preprocessing, task = preprocessing_of(model.metadata, source), task_of(model.metadata, source)
    return snippet(file, preprocessing, _classes(model), version, task.name)


def _classes(model: IntegerModel) -> list[str]:
    return list(model.metadata.get("classes", ()))


def _profile(config: ExportConfig) -> str | None:
    """Of an ONNX file; None for other formats."""
    if config.format == "onnx":
        return config.profile or "ort"
    if config.profile is not None:
        raise UsageError(
            f"--profile {config.profile}: is a form of ONNX files, not of --format "
            f"{config.format}; leave one of the two out"
        )
    return None


def _saturation(model: IntegerModel, listener: Listener) -> dict[str, Any]:
    """Which layers a CPU without VNNI may get wrong, and whether this is one."""
    cpu, layers = cpu_path(), saturating(model)
    if layers and cpu.name == "no-vnni":
        listener.warn(
            f"{cpu.text}, and {len(layers)} layers have weights that can do that "
            f"({', '.join(layers[:3])}{', ...' if len(layers) > 3 else ''}); quantize with "
            "--reduce-range, or set onnxruntime's session.x64quantprecision to 1"
        )
    return {"cpu": cpu.name, "cpu_text": cpu.text, "layers": layers}


def _source(target: Target) -> Path:
    if target.run is not None:
        return require_artifact(target.run)
    if target.kind == "artifact" and target.path is not None:
        return target.path
    if target.kind == "model":
        raise UsageError(
            f"{target.name}: no such run or file; what can be exported is a run folder or an "
            "integer .safetensors file"
        )
    raise UsageError(
        f"{target.name}: only a run folder or an integer .safetensors file can be exported"
    )


def _output(config: ExportConfig, target: Target, source: Path, profile: str | None) -> Path:
    if config.output is not None:
        output = config.output
    elif profile == "ort":
        output = source.with_suffix(".onnx")
    elif profile is not None:
        output = source.with_name(f"{source.stem}-{profile}.onnx")
    else:
        output = source.with_name(f"{source.stem}-export{FORMATS[config.format].suffix}")
    suffix = ".onnx" if profile is not None else FORMATS[config.format].suffix
    if output.suffix.lower() != suffix:
        raise UsageError(
            f"--output {output}: a file of the format {config.format} ends in {suffix}; give such "
            "a name, or another --format"
        )
    if output.resolve() == source.resolve():
        raise UsageError(f"--output {output}: is the artifact itself; give another name")
    require_writable(output)
    script = output.with_suffix(".py")
    for path in (output, script) if profile in ORT_PROFILES else (output,):
        if path.exists() and not config.force:
            raise UsageError(f"{path} exists; --force overwrites it, --output gives another name")
    if profile in ORT_PROFILES and script.exists() and not is_script(script):
        raise UsageError(
            f"{script} was not written by mecq export, whose script goes there; --output gives "
            "another name"
        )
    return output


def _images(
    config: ExportConfig,
    target: Target,
    model: IntegerModel,
    source: Path,
    split: Split | None,
) -> Iterator[Array]:
    """Some evaluation images, evenly from all classes."""
    task = task_of(model.metadata, source)
    split = split or evaluation_split(target.owner, config.data, task=task)
    preprocessing = preprocessing_of(model.metadata, source)
    dataset = dataset_of(split.evenly(config.images or IMAGES), preprocessing)
    batch = min(eval_batch_size(preprocessing), 64)
    for images in eval_batches(dataset, batch_size=batch):
        yield normalize(images.images, preprocessing).contiguous().numpy()
