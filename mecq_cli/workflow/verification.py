"""How `mecq export` checks a file before it is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mecq_cli.data import evenly
from mecq_cli.events import Listener
from mecq_cli.export.onnx_detection import detections_of
from mecq_cli.export.ort import OrtRunner
from mecq_cli.export.qonnx import QonnxRunner, to_integers
from mecq_cli.insertion.needs import PRODUCTS
from mecq_cli.integer.ir import IntegerModel
from mecq_cli.integerize import IntegerModule
from mecq_cli.kernels import run_all
from mecq_cli.models.detector import detector_in
from mecq_cli.replay import Values, Way, replay
from mecq_cli.tasks.decoding import decoded
from mecq_cli.verify import BoxComparison, Comparison, Predict, compare

Array = NDArray[np.float32]
QUICK_IMAGES = 8
"""For the layers of a graph that computes in float; every integer of every layer is compared."""
DEEP_IMAGES = 32
"""For the layers of every way there is."""


def verify(
    path: Path,
    name: str,
    profile: str,
    model: IntegerModel,
    batches: Sequence[Array],
    listener: Listener,
    *,
    deep: bool,
) -> dict[str, Any]:
    """Run a written ONNX file and the simulator on the same images; returns what was found.

    Args:
        path: the file.
        name: what to call it.
        profile: of the file.
        model: what was written.
        batches: preprocessed images [N, C, H, W] each.
        listener: hears of the progress.
        deep: replay all ways layer by layer, not only the graphs that compute in float.

    Raises:
        VerificationError: the file does not compute what it should.
        EnvironmentFailure: what runs it is missing.
    """
    listener.note("verifying: against the simulator")
    comparison = compare(_torch(model), _runner(path, profile), batches, _classes(model))
    if profile == "qonnx":
        # Floats round a few integers the other way: the layers are what can be relied on.
        comparison.require_images(name)
    else:
        comparison.require(name, exact=_is_integer(model))
    document = _verified(comparison)
    if profile != "qonnx":
        document |= _same_boxes(path, name, model, batches)
    ways = list(_ways(path, name, profile, model, deep=deep))
    listener.note(f"verifying: layer by layer, by {', '.join(way.name for way in ways)}")
    return document | _replayed(ways, name, model, batches, deep=deep)


def verify_file(
    path: Path,
    read: Callable[[Path], IntegerModel | Predict],
    name: str,
    model: IntegerModel,
    batches: Sequence[Array],
    listener: Listener,
    *,
    deep: bool,
) -> dict[str, Any]:
    """The same for a file of another format, which ``read`` reads or runs.

    Raises:
        VerificationError: the file does not compute what it should.
    """
    listener.note("verifying: against the simulator")
    stored = read(path)
    if isinstance(stored, IntegerModel):
        return verify_artifact(stored, name, model, batches, deep=deep)
    comparison = compare(_torch(model), stored, batches, _classes(model))
    comparison.require(name, exact=_is_integer(model))
    return _verified(comparison)


def verify_artifact(
    stored: IntegerModel,
    name: str,
    model: IntegerModel,
    batches: Sequence[Array],
    *,
    deep: bool,
) -> dict[str, Any]:
    """The same for a file that holds the integer model, or its weights.

    Args:
        stored: the model as it was read back.
        name: what to call the file.
        model: what was written.
        batches: preprocessed images [N, C, H, W] each.
        deep: replay it layer by layer.

    Raises:
        VerificationError: the file does not compute what it should.
    """
    comparison = compare(_torch(model), _torch(stored), batches, _classes(model))
    comparison.require(name, exact=True)
    ways = [_by_torch(stored)] if deep else []
    return _verified(comparison) | _replayed(ways, name, model, batches, deep=deep)


def _verified(comparison: Comparison) -> dict[str, Any]:
    dense = comparison.answers > comparison.images
    return {
        "verified": True,
        "images": comparison.images,
        **({comparison.unit: comparison.answers} if dense else {}),
        "top1_agreement": 100.0 * comparison.agree / comparison.answers,
        "largest_difference": comparison.largest_difference,
    }


def _classes(model: IntegerModel) -> int | None:
    """How many of the outputs are logits, where not all of them are."""
    return None if detector_in(model.metadata) is None else len(model.metadata["classes"])


def _same_boxes(
    path: Path, name: str, model: IntegerModel, batches: Sequence[Array]
) -> dict[str, Any]:
    """Compare the boxes that the file makes with those that torchvision makes of the simulator."""
    detector = detector_in(model.metadata)
    if detector is None:
        return {}
    run, runner, found = _torch(model), OrtRunner(path), BoxComparison()
    for images in batches:
        expected = decoded(torch.from_numpy(run(images)), detector).numpy()
        found.add(expected, detections_of(runner, images), max(detector.size))
    found.require(name)
    share = 100.0 * found.agree / max(found.boxes, 1)
    return {"boxes": found.boxes, "box_agreement": share if found.boxes else 100.0}


def _replayed(
    ways: Sequence[Way], name: str, model: IntegerModel, batches: Sequence[Array], *, deep: bool
) -> dict[str, Any]:
    if not ways:
        return {}
    found = replay(model, ways, [_some(batches, DEEP_IMAGES if deep else QUICK_IMAGES)])
    found.require(name)
    return {"replay": found.to_json(layers=deep)}


def _ways(path: Path, name: str, profile: str, model: IntegerModel, *, deep: bool) -> Iterator[Way]:
    """What is compared with the NumPy reference."""
    if deep:
        yield _by_torch(model)
    if profile == "qonnx":
        runner = QonnxRunner(path)
        yield Way("qonnx", lambda x: to_integers(model, runner.run_all(x), name), exact=False)
        return
    if deep:
        yield Way("onnxruntime", OrtRunner(path).run_all, exact=True)
    plain = OrtRunner(path, optimize=False)
    yield Way("onnxruntime without optimizations", plain.run_all, exact=False)


def _runner(path: Path, profile: str) -> Predict:
    return QonnxRunner(path).run if profile == "qonnx" else OrtRunner(path).run


def _torch(model: IntegerModel) -> Predict:
    module = IntegerModule(model)

    def run(images: Array) -> Array:
        logits: Array = module(torch.from_numpy(images)).numpy()
        return logits

    return run


def _by_torch(model: IntegerModel) -> Way:
    @torch.no_grad()
    def run(images: Array) -> Values:
        return {k: v.numpy() for k, v in run_all(model, torch.from_numpy(images)).items()}

    return Way("torch", run, exact=True)


def _some(batches: Sequence[Array], count: int) -> Array:
    """``count`` images, or all, evenly over all batches: neighbours are often of one class."""
    joined: Array = np.concatenate(batches)
    picked: Array = joined[evenly(len(joined), count)]
    return picked


_MOVING = ("concat", "flatten", "reshape", "transpose")
"""Operations that move the logits, where several heads make them."""


def _is_integer(model: IntegerModel) -> bool:
    """Whether every operation from the first to the last layers works on integers."""
    floats = {node.name for node in model.nodes if node.grid is None}
    made = {node.name for node in model.nodes if node.name in floats and node.op in PRODUCTS}
    moved = {node.name for node in model.nodes if node.name in floats and node.op in _MOVING}
    reads = all(node.name in moved or not floats & set(node.inputs) for node in model.nodes)
    return reads and floats <= made | moved | {model.output.name}
