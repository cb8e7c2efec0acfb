"""Writes what makes boxes of the outputs of a network as ONNX operators, NonMaxSuppression among
them: what `mecq_cli.tasks.decoding` does, for all images of a batch at once, in opset 13.

Candidates that are below the threshold stay among the K that go on: NonMaxSuppression leaves them
out. It works class by class, so it gets a row of scores for each class, zero where a candidate is
of another one. What it chose goes back to the places of the candidates, and the best are taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from mecq_cli.export.onnx_builder import LOGITS
from mecq_cli.export.ort import OrtRunner
from mecq_cli.models.detector import COORDINATES, Detector

BOXES, SCORES, LABELS = "boxes", "scores", "labels"
"""Outputs beside the logits: float32 [batch, D, 4] in pixels of the input, left, top, right,
bottom; float32 [batch, D], descending, 0 where there is no answer; int64 [batch, D]."""
_PREFIX = "detection::"
_TO_END = 2**62


def detections_of(runner: OrtRunner, images: NDArray[np.float32]) -> NDArray[np.float32]:
    """What a file makes of images: float32 [N, D, 6], as `mecq_cli.tasks.decoding` has it.

    Raises:
        UsageError, ArtifactError: as `OrtRunner.run_named`.
    """
    boxes, scores, labels = runner.run_named(images, (BOXES, SCORES, LABELS))
    columns = (boxes, scores[..., None], labels[..., None])
    return np.concatenate(columns, -1, dtype=np.float32)


def add_detections(graph: onnx.GraphProto, detector: Detector) -> None:
    """Add the boxes to a graph whose output "logits" is [batch, C + 4, A]."""
    shape = graph.output[0].type.tensor_type.shape.dim
    writer = _Writer(graph)
    _write(writer, detector, shape[1].dim_value - COORDINATES)
    count = min(detector.detections, writer.candidates)
    for name, kind, size in (
        (BOXES, TensorProto.FLOAT, [COORDINATES]),
        (SCORES, TensorProto.FLOAT, []),
        (LABELS, TensorProto.INT64, []),
    ):
        batch = shape[0].dim_param
        graph.output.append(helper.make_tensor_value_info(name, kind, [batch, count, *size]))


class _Writer:
    """Appends nodes to a graph, with names that no operation of the integer model has."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.graph = graph
        self.candidates = 0
        self._count = 0

    def emit(
        self, op: str, inputs: Sequence[str], outputs: int = 1, name: str = "", **rest: Any
    ) -> Any:
        """Add a node; returns the name of its output, or the names of several."""
        self._count += 1
        own = f"{_PREFIX}{op}_{self._count}"
        made = [name] if name else [f"{own}_{i}" for i in range(outputs)]
        self.graph.node.append(helper.make_node(op, inputs, made, name=own, **rest))
        return made[0] if outputs == 1 else made

    def constant(self, value: NDArray[Any] | np.generic) -> str:
        """Store a tensor."""
        self._count += 1
        name = f"{_PREFIX}constant_{self._count}"
        self.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def integers(self, *values: int) -> str:
        """Store a vector of int64."""
        return self.constant(np.array(values, np.int64))

    def sliced(self, value: str, axis: int, start: int, end: int) -> str:
        """Places of an axis."""
        places = [self.integers(n) for n in (start, end, axis)]
        found: str = self.emit("Slice", [value, *places])
        return found

    def top(self, value: str, count: int, axis: int) -> tuple[str, str]:
        """The largest values along an axis, and where they are; the first of equal ones first."""
        values, places = self.emit("TopK", [value, self.integers(count)], 2, axis=axis)
        return values, places

    def each(self, index: str) -> str:
        """An index [N, K] for each of four coordinates, [N, K, 4]."""
        wide = self.emit("Unsqueeze", [index, self.integers(2)])
        found: str = self.emit("Expand", [wide, self.integers(1, 1, COORDINATES)])
        return found


def _write(w: _Writer, detector: Detector, classes: int) -> None:
    logits = w.sliced(LOGITS, 1, 0, classes)
    moves = w.emit("Transpose", [w.sliced(LOGITS, 1, classes, _TO_END)], perm=[0, 2, 1])
    if detector.kind == "ssd":
        scores, labels, anchors = _of_classes(w, logits, detector, classes)
    else:
        scores, labels, anchors = _of_levels(w, logits, detector, classes)
    moves = w.emit("GatherElements", [moves, w.each(anchors)], axis=1)
    boxes = _boxes(w, moves, anchors, detector)
    kept = _kept(w, boxes, scores, labels, detector, classes)
    count = min(detector.detections, w.candidates)
    best, places = w.top(kept, count, 1)
    w.emit("Identity", [best], name=SCORES)
    w.emit("GatherElements", [labels, places], name=LABELS, axis=1)
    found = w.emit("GatherElements", [boxes, w.each(places)], axis=1)
    there = w.emit("Greater", [best, w.constant(np.float32(0))])
    there = w.emit("Unsqueeze", [there, w.integers(2)])
    w.emit("Where", [there, found, w.constant(np.float32(0))], name=BOXES)


def _of_classes(w: _Writer, logits: str, detector: Detector, classes: int) -> tuple[str, str, str]:
    """The best anchors of each class: scores, classes, anchors, each [N, K]."""
    shares = w.emit("Softmax", [logits], axis=1)
    real = w.sliced(shares, 1, 1, classes)
    count = min(detector.candidates, len(detector.anchors))
    best, anchors = w.top(real, count, 2)
    w.candidates = (classes - 1) * count
    flat = w.integers(0, w.candidates)
    labels = np.repeat(np.arange(1, classes, dtype=np.int64), count)[None]
    anchors = w.emit("Reshape", [anchors, flat])
    # The same in each image: the shape of an index of any batch.
    same = w.emit("Expand", [w.constant(labels), w.emit("Shape", [anchors])])
    return w.emit("Reshape", [best, flat]), same, anchors


def _of_levels(w: _Writer, logits: str, detector: Detector, classes: int) -> tuple[str, str, str]:
    """The best pairs of anchor and class of each level: scores, classes, anchors, each [N, K]."""
    shares = w.emit("Transpose", [w.emit("Sigmoid", [logits])], perm=[0, 2, 1])
    values, places, start = [], [], 0
    for level in detector.levels:
        own = w.sliced(shares, 1, start, start + level.count)
        own = w.emit("Reshape", [own, w.integers(0, level.count * classes)])
        count = min(detector.candidates, level.count * classes)
        best, place = w.top(own, count, 1)
        values.append(best)
        places.append(w.emit("Add", [place, w.constant(np.int64(start * classes))]))
        start += level.count
        w.candidates += count
    scores = w.emit("Concat", values, axis=1)
    place, count_of = w.emit("Concat", places, axis=1), w.constant(np.int64(classes))
    return scores, w.emit("Mod", [place, count_of]), w.emit("Div", [place, count_of])


def _boxes(w: _Writer, moves: str, anchors: str, detector: Detector) -> str:
    """Left, top, right, bottom [N, K, 4], each operation as torchvision's BoxCoder has it."""
    corners = detector.anchors
    sizes = corners[:, 2:] - corners[:, :2]
    centres = corners[:, :2] + np.float32(0.5) * sizes
    table = w.emit("Gather", [w.constant(np.concatenate([centres, sizes], 1)), anchors], axis=0)
    halves = w.integers(2, 2)
    centre, size = w.emit("Split", [table, halves], 2, axis=2)
    weights = np.array(detector.weights, np.float32)
    move, growth = w.emit("Split", [w.emit("Div", [moves, w.constant(weights)]), halves], 2, axis=2)
    most = w.constant(np.float32(detector.largest_growth))
    size_now = w.emit("Mul", [w.emit("Exp", [w.emit("Min", [growth, most])]), size])
    centre_now = w.emit("Add", [w.emit("Mul", [move, size]), centre])
    half = w.emit("Mul", [size_now, w.constant(np.float32(0.5))])
    both = [w.emit(op, [centre_now, half]) for op in ("Sub", "Add")]
    height, width = detector.size
    ends = w.constant(np.array([width, height, width, height], np.float32))
    inside = w.emit("Max", [w.emit("Concat", both, axis=2), w.constant(np.float32(0))])
    found: str = w.emit("Min", [inside, ends])
    return found


def _kept(
    w: _Writer, boxes: str, scores: str, labels: str, detector: Detector, classes: int
) -> str:
    """The scores of the candidates, zero where one was suppressed, [N, K]."""
    first = detector.background
    every = w.constant(np.arange(first, classes, dtype=np.int64)[None, :, None])
    rows = w.integers(1)
    mine = w.emit("Equal", [w.emit("Unsqueeze", [labels, rows]), every])
    by_class = w.emit(
        "Where", [mine, w.emit("Unsqueeze", [scores, rows]), w.constant(np.float32(0))]
    )
    limits = [
        w.integers(detector.detections),
        *(
            w.constant(np.array([value], np.float32))
            for value in (detector.iou_threshold, detector.score_threshold)
        ),
    ]
    chosen = w.emit("NonMaxSuppression", [boxes, by_class, *limits])
    place = w.emit("Gather", [chosen, w.integers(0, 2)], axis=1)  # image and candidate
    nothing = w.emit(
        "ConstantOfShape",
        [w.emit("Shape", [scores])],
        value=numpy_helper.from_array(np.zeros(1, np.float32)),
    )
    values = w.emit("GatherND", [scores, place])
    found: str = w.emit("ScatterND", [nothing, place, values])
    return found
