"""Runs a file of the profile qonnx with the qonnx package, which defines its operators."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mecq_cli.errors import ArtifactError, EnvironmentFailure, VerificationError, first_line
from mecq_cli.export.onnx_file import check_shape, operations, read
from mecq_cli.integer.ir import IntegerModel

INSTALL = "pip install 'mecq[qonnx]'"
_MOST_VALUES = 2**25
"""Of one part of a batch: the interpreter keeps every tensor, in float32."""


def require_qonnx() -> None:
    """Raise EnvironmentFailure where the qonnx package is missing."""
    try:
        import qonnx.core.onnx_exec  # noqa: F401  # and what it needs itself
    except ImportError as error:
        raise EnvironmentFailure(
            f"the profile qonnx is checked and run by the qonnx package, which cannot be loaded "
            f"({first_line(error)}); install it with: {INSTALL}"
        ) from error


class QonnxRunner:
    """A loaded model, interpreted operator by operator: slow, and meant for checks.

    Args:
        path: a file of the profile qonnx.

    Attributes:
        metadata: what the exporter stored.
        input_shape: (channels, height, width).

    Raises:
        ArtifactError: the file cannot be read, was damaged or has no checksum.
        EnvironmentFailure: the qonnx package is missing.
    """

    def __init__(self, path: Path) -> None:
        require_qonnx()
        file = read(path)
        self.path = path
        self.metadata = file.metadata
        self._model = file.model
        self._outputs = operations(file.model)
        self._logits = file.model.graph.output[0].name
        self._wrappers: dict[int, Any] = {}
        shape = file.model.graph.input[0].type.tensor_type.shape
        self.input_shape = tuple(dimension.dim_value for dimension in shape.dim[1:])

    def run(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """Logits float32 [N, classes] of preprocessed images float32 [N, C, H, W].

        Raises:
            UsageError: the images have another shape than the model wants.
            ArtifactError: qonnx fails.
        """
        return self._run(images, {"": self._logits})[""]

    def run_all(self, images: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
        """The output of every operation by its name, as real numbers."""
        return self._run(images, self._outputs)

    def _run(
        self, images: NDArray[np.float32], wanted: Mapping[str, str]
    ) -> dict[str, NDArray[np.float32]]:
        check_shape(images, self.input_shape, self.path)
        dimensions = (info.type.tensor_type.shape.dim for info in self._model.graph.value_info)
        values = sum(int(np.prod([d.dim_value for d in dims])) for dims in dimensions)
        step = max(1, min(len(images), _MOST_VALUES // max(values, 1)))
        parts = [self._execute(images[i : i + step]) for i in range(0, len(images), step)]
        return {
            name: np.concatenate([part[tensor] for part in parts])
            for name, tensor in wanted.items()
        }

    def _execute(self, images: NDArray[np.float32]) -> dict[str, NDArray[Any]]:
        from qonnx.core.onnx_exec import execute_onnx

        feed = {self._model.graph.input[0].name: np.ascontiguousarray(images, np.float32)}
        try:
            wrapper = self._wrapper(len(images))
            values: dict[str, NDArray[Any]] = execute_onnx(
                wrapper, feed, return_full_exec_context=True
            )
        except Exception as error:  # plain ones, and those of onnxruntime
            raise ArtifactError(f"{self.path}: qonnx fails: {first_line(error)}") from error
        return values

    def _wrapper(self, batch: int) -> Any:
        """The model for batches of this size; qonnx knows fixed shapes only."""
        from qonnx.core.modelwrapper import ModelWrapper
        from qonnx.transformation.change_batchsize import ChangeBatchSize
        from qonnx.transformation.infer_shapes import InferShapes

        if batch not in self._wrappers:
            wrapper = ModelWrapper(self._model, make_deepcopy=True)
            if batch != 1:
                wrapper = wrapper.transform(ChangeBatchSize(batch))
                _resize_batches(wrapper, batch)
                wrapper = wrapper.transform(InferShapes())
            self._wrappers[batch] = wrapper
        return self._wrappers[batch]


def _resize_batches(wrapper: Any, batch: int) -> None:
    """Resizing names its whole shape, of which qonnx leaves the batch as it was."""
    for node in wrapper.get_nodes_by_op_type("Resize"):
        if len(node.input) == 4:
            sizes = wrapper.get_initializer(node.input[3]).copy()
            sizes[0] = batch
            wrapper.set_initializer(node.input[3], sizes)


def to_integers(
    model: IntegerModel, values: Mapping[str, NDArray[np.float32]], what: str
) -> dict[str, NDArray[Any]]:
    """The outputs of all operations, uint8 where they have a grid.

    Args:
        model: the integer model that was written.
        values: real numbers by the name of the operation.
        what: the file, for messages.

    Raises:
        VerificationError: a number does not lie on the grid of its operation.
    """
    integers: dict[str, NDArray[Any]] = dict(values)
    for node in model.nodes:
        grid = node.grid
        if grid is None or node.name not in values:
            continue
        scale, real = np.float32(grid.scale), values[node.name]
        steps = np.rint(real / scale)
        q = steps + grid.zero_point
        if not (np.array_equal(steps * scale, real) and q.min() >= 0 and q.max() <= 255):
            raise VerificationError(
                f"{what}: layer {node.name} puts out numbers that do not lie on its grid; the "
                "file was not kept"
            )
        integers[node.name] = q.astype(np.uint8)
    return integers
