"""The ONNX file of a run in onnxruntime: does it compute the same, how large and how fast is it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mecq_cli.errors import MecqError
from mecq_cli.events import Listener
from mecq_cli.export import onnx as integer_onnx
from mecq_cli.export.float_onnx import float_onnx
from mecq_cli.export.ort import OrtRunner
from mecq_cli.integer.ir import IntegerModel
from mecq_cli.integerize import IntegerModule
from mecq_cli.runs import RunFolder
from mecq_cli.verify import compare
from mecq_cli.workflow.interleave import interleave, is_busy, ratio, summary

SECONDS = 1.5
"""Of each batch size."""

BATCHES = (1, 8)
_COMPARED = 32
Array = NDArray[np.float32]


def look_at_runtime(
    run: RunFolder,
    model: IntegerModel,
    fp: nn.Module | None,
    images: Tensor | None,
    listener: Listener,
) -> dict[str, Any]:
    """Sizes, verification and latency.

    Args:
        run: its model.onnx is used, or one made for this.
        model: the integer network.
        fp: the FP network; None leaves it out.
        images: normalised [N, C, H, W] to compare on; None: nothing is compared.
        listener: hears of the progress.

    Returns:
        "file", "onnx_bytes" and "fp32_onnx_bytes"; "verified" with images, top1_agreement,
        largest_difference and equal; "latency": a row a batch size with medians in ms; "error"
        instead, where the file cannot be run; "fp32_error", where the float network has none.
    """
    listener.note("onnxruntime: comparing and timing")
    with tempfile.TemporaryDirectory() as folder:
        exported = run.onnx.exists()
        path = run.onnx if exported else Path(folder) / "model.onnx"
        document: dict[str, Any] = {"file": str(path) if exported else None}
        try:
            if not exported:
                integer_onnx.save(model, path)
            files = {"integer": path}
            document["onnx_bytes"] = path.stat().st_size
            try:
                if fp is not None:
                    plain = float_onnx(fp, model.input_shape)
                    files["fp32"] = Path(folder) / "float.onnx"
                    onnx.save_model(plain, files["fp32"])
                    document["fp32_onnx_bytes"] = files["fp32"].stat().st_size
            except MecqError as error:  # which says nothing of the integer one
                document["fp32_error"] = str(error)
            runners = {
                name: OrtRunner(file, threads=1, allow_foreign=name == "fp32")
                for name, file in files.items()
            }
            document["verified"] = None if images is None else _verified(model, runners, images)
            document["latency"] = _latency(runners, model.input_shape, images)
        except MecqError as error:
            document["error"] = str(error)
    document["threads"] = 1
    document["onnxruntime"] = onnxruntime.__version__
    return document


def _verified(model: IntegerModel, runners: dict[str, OrtRunner], images: Tensor) -> dict[str, Any]:
    module = IntegerModule(model)

    def simulated(batch: Array) -> Array:
        logits: Array = module(torch.from_numpy(batch)).numpy()
        return logits

    batches = [part.contiguous().numpy() for part in images.split(_COMPARED)]
    found = compare(simulated, runners["integer"].run, batches)
    return {
        "images": found.images,
        "top1_agreement": 100.0 * found.agree / found.answers,
        "largest_difference": found.largest_difference,
        "equal": found.largest_difference == 0.0,
    }


def _latency(
    runners: dict[str, OrtRunner], shape: tuple[int, int, int], images: Tensor | None
) -> list[dict[str, Any]]:
    if images is None:  # how long it takes does not depend on what is in them
        images = torch.randn(8, *shape, generator=torch.Generator().manual_seed(0))
    rows = []
    with _one_thread():
        for size in BATCHES:
            batch = np.resize(images.numpy(), (size, *shape))

            def call(runner: OrtRunner, batch: Array = batch) -> Callable[[], object]:
                return lambda: runner.run(batch)

            arms = {name: call(runner) for name, runner in runners.items()}
            times = interleave(arms, seconds=SECONDS)
            row: dict[str, Any] = {"batch": size, "rounds": len(times["integer"].wall)}
            row["busy"] = is_busy(times["integer"])
            row |= {name: summary(measured, size) for name, measured in times.items()}
            if "fp32" in times:
                row["speedup"] = ratio(times["fp32"].wall, times["integer"].wall)
            rows.append(row)
    return rows


@contextmanager
def _one_thread() -> Iterator[None]:
    """Torch's own threads stay out of the way."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
