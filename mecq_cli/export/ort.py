"""Runs an ONNX file with onnxruntime on the CPU."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from mecq_cli.errors import ArtifactError, first_line
from mecq_cli.export.onnx_file import check_shape, operations, read

_SILENT = 4
"""Log severity: fatal errors only; all others reach us as exceptions."""


class OrtRunner:
    """A loaded model.

    Args:
        path: an ONNX file with one input [N, C, H, W] and, as its first output, logits.
        optimize: with onnxruntime's default graph optimizations, or with none.
        threads: within an operation; onnxruntime's choice if not given.
        allow_foreign: accept files that this program did not write, which carry no checksum.

    Attributes:
        verified: whether the file is ours, its checksum found right.
        metadata: what the exporter stored: model, wbits, abits, classes, preprocessing; empty
            for other files.
        input_shape: (channels, height, width); None where any will do.
        outputs: along axis 1 of the first output; None where that is not said.

    Raises:
        ArtifactError: the file cannot be read, was damaged, has no checksum, keeps data in
            other files, or onnxruntime does not accept it.
    """

    def __init__(
        self,
        path: Path,
        *,
        optimize: bool = True,
        threads: int | None = None,
        allow_foreign: bool = False,
    ) -> None:
        file = read(path, allow_foreign=allow_foreign)
        self.path = path
        self._optimize = optimize
        self._threads = threads
        self.verified = file.verified
        self.metadata = file.metadata
        self._model = file.model
        self._session = self._load(file.data)
        self._all: tuple[onnxruntime.InferenceSession, dict[str, str]] | None = None
        inputs = self._session.get_inputs()
        if len(inputs) != 1 or len(inputs[0].shape) != 4 or inputs[0].type != "tensor(float)":
            found = ", ".join(f"{i.name} {i.type} {i.shape}" for i in inputs) or "none"
            raise ArtifactError(f"{path}: needs one float input [N, C, H, W], has {found}")
        self._input: str = inputs[0].name
        self.input_shape = tuple(n if isinstance(n, int) else None for n in inputs[0].shape[1:])
        sizes = self._session.get_outputs()[0].shape[1:2]
        self.outputs: int | None = next((n for n in sizes if isinstance(n, int)), None)

    def run(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """Logits float32 [N, classes] of preprocessed images float32 [N, C, H, W].

        Raises:
            UsageError: the images have another shape than the model wants.
            ArtifactError: onnxruntime fails.
        """
        logits: NDArray[np.float32] = self._run(self._session, images)[0]
        return logits

    def run_named(self, images: NDArray[np.float32], names: Sequence[str]) -> list[NDArray[Any]]:
        """Outputs by name.

        Raises:
            UsageError: the images have another shape than the model wants.
            ArtifactError: it has no such output, or onnxruntime fails.
        """
        known = [output.name for output in self._session.get_outputs()]
        missing = [name for name in names if name not in known]
        if missing:
            raise ArtifactError(f"{self.path}: has no output {missing[0]!r}; export it again")
        values = dict(zip(known, self._run(self._session, images), strict=True))
        return [values[name] for name in names]

    def run_all(self, images: NDArray[np.float32]) -> dict[str, NDArray[Any]]:
        """The output of every operation by its name, from a session that has them all as outputs.

        In files of ours the names are those of the integer model.
        """
        session, outputs = self._with_all_outputs()
        known = [output.name for output in session.get_outputs()]
        values = dict(zip(known, self._run(session, images), strict=True))
        return {operation: values[tensor] for operation, tensor in outputs.items()}

    def optimized(self) -> onnx.GraphProto:
        """The (optimized) graph that really runs."""
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder) / "optimized.onnx"
            self._load(self._model.SerializeToString(), optimized=target)
            return onnx.load_model(target).graph

    def kernels(self) -> Counter[str]:
        """How many nodes of each type that graph has."""
        return Counter(node.op_type for node in self.optimized().node)

    def _with_all_outputs(self) -> tuple[onnxruntime.InferenceSession, dict[str, str]]:
        """A second session, and the tensor of each operation."""
        if self._all is None:
            model = onnx.ModelProto()
            model.CopyFrom(self._model)
            outputs = operations(model)
            present = {output.name for output in model.graph.output}
            for name in dict.fromkeys(outputs.values()):
                if name not in present:
                    model.graph.output.add(name=name)
            self._all = self._load(model.SerializeToString()), outputs
        return self._all

    def _load(self, data: bytes, optimized: Path | None = None) -> onnxruntime.InferenceSession:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = _SILENT
        levels = onnxruntime.GraphOptimizationLevel
        options.graph_optimization_level = (
            levels.ORT_ENABLE_ALL if self._optimize else levels.ORT_DISABLE_ALL
        )
        # Threads that wait for the next run take the time of whoever works meanwhile.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if self._threads is not None:
            options.intra_op_num_threads = self._threads
        if optimized is not None:
            options.optimized_model_filepath = str(optimized)
        try:
            return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime has no common base class for its errors
            raise ArtifactError(
                f"{self.path}: onnxruntime {onnxruntime.__version__} does not accept the file: "
                f"{first_line(error)}"
            ) from error

    def _run(self, session: Any, images: NDArray[np.float32]) -> list[NDArray[Any]]:
        check_shape(images, self.input_shape, self.path)
        feed = {self._input: np.ascontiguousarray(images, np.float32)}
        try:
            values: list[NDArray[Any]] = session.run(None, feed)
        except Exception as error:
            raise ArtifactError(
                f"{self.path}: onnxruntime fails to run it: {first_line(error)}"
            ) from error
        return values
