"""Bilinear resizing as an ONNX Resize, of floats on either side.

Without ``align_corners`` torch finds its places as ONNX's ``half_pixel`` does. Sizes are given, not
scales: a scale that is rounded may miss a size by one.
"""

from __future__ import annotations

import numpy as np

from mecq_cli.export.onnx_builder import Builder, GraphBuilder
from mecq_cli.export.onnx_tokens import batch_size
from mecq_cli.integer.ir import Node


def emit_resize(builder: Builder, node: Node) -> None:
    """For any number of images, which is looked up.

    Opset 18 could name two axes instead. But behind some graphs onnxruntime 1.32 refuses such a
    Resize once it has optimized them, and finds no sizes.
    """
    shape = np.array(builder.shapes[node.name], np.int64)
    rest = builder.constant(shape, f"{node.name}::shape")
    sizes = builder.emit("Concat", [batch_size(builder), rest], f"{node.name}::sizes", axis=0)
    _emit(builder, node, sizes)


def emit_resize_of_one(builder: GraphBuilder, node: Node) -> None:
    """For a batch of one image."""
    shape = np.array([1, *builder.shapes[node.name]], np.int64)
    _emit(builder, node, builder.constant(shape, f"{node.name}::sizes"))


def _emit(builder: GraphBuilder, node: Node, sizes: str) -> None:
    places = "align_corners" if node.attributes["align_corners"] else "half_pixel"
    builder.emit(
        "Resize",
        [node.inputs[0], "", "", sizes],
        node.name,
        mode="linear",
        coordinate_transformation_mode=places,
    )
