"""The site table, and how many bytes the bits really take."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from torch import nn

from mecq_cli.integer.ir import Grid, IntegerModel, Node, shared_weights
from mecq_cli.integer.packing import layer_bytes

_LISTED = (
    "quantize",
    "requantize",
    "threshold",
    "lookup",
    "add",
    "mul",
    "global_avg_pool",
    "avg_pool2d",
    "adaptive_avg_pool2d",
)

FLOATS = {
    "layer_norm": "float: the mean and deviation of each token",
    "group_norm": "float: the mean and deviation of each image",
    "resize": "float: means of neighbouring pixels",
    "softmax": "float: exponentials; its result is quantized",
    "log_softmax": "float: logarithms",
    "l2_normalize": "float: the length of each row",
    "rms_norm": "float: the size of each token",
}
"""What stays in float whatever the bits, and why."""


def fp32_bytes(model: nn.Module) -> int:
    """Parameters and statistics of the FP model at four bytes each."""
    tensors = [t for t in model.state_dict().values() if t.is_floating_point()]
    return sum(4 * t.numel() for t in tensors)


def site_rows(model: IntegerModel) -> list[dict[str, Any]]:
    """One row for each layer that computes something, in the order of execution."""
    grids: dict[str, Grid | None] = {"input": None}
    shared = shared_weights(model)
    rows = []
    for node in model.nodes:
        source = grids[node.inputs[0]]
        grids[node.name] = node.grid
        if node.op in ("conv2d", "linear"):
            rows.append(_product_row(node, source, shared=node.name in shared))
        elif node.op in FLOATS:
            rows.append(_row(node, None) | {"note": FLOATS[node.op]})
        elif node.op == "add" and node.grid is None:
            rows.append(_row(node, None) | {"note": "float: a sum that only floats read"})
        elif node.op == "matmul":
            rows.append(_row(node, source) | {"note": _matmul_note(source, node.grid)})
        elif node.op in _LISTED and (node.grid is not None or "pool" in node.op):
            rows.append(_row(node, node.grid))
        if node.op == "threshold":
            rows[-1]["thresholds"] = list(node.attributes["thresholds"])
    return rows


def totals(model: IntegerModel, fp32: int, packed: int) -> dict[str, Any]:
    """fp32, packed (the artifact's) and ideal bytes, and fp32 / packed."""
    shared = shared_weights(model)
    ideal = sum(ideal_bytes(node, shared=node.name in shared) for node in model.nodes)
    return {
        "fp32_bytes": fp32,
        "packed_bytes": packed,
        "ideal_bytes": ideal,
        "ratio": fp32 / packed if packed else None,
    }


def ideal_bytes(node: Node, *, shared: bool = False) -> int:
    """Weights at exactly their bits, and a float32 scale and an int32 bias per channel.

    Args:
        node: any.
        shared: whether the weights are those of a node before, which counts them.
    """
    if node.weight_bits is None:
        return 0
    shape = node.tensors["weight"].shape
    return layer_bytes(0 if shared else math.prod(shape), int(shape[0]), node.weight_bits)


def _product_row(node: Node, source: Grid | None, *, shared: bool) -> dict[str, Any]:
    scale = np.abs(node.tensors["weight_scale"])
    integer = node.weight_bits != 32
    if source is not None and node.weight_bits is not None:
        scale = scale * node.multiplier  # of the weights as they are stored
    note = ""
    if not integer:
        note = "weight left in float"
    elif source is None:
        note = "input left in float"
    return {
        "layer": node.name,
        "type": node.op,
        "shape": list(node.tensors["weight"].shape),
        "wbits": node.weight_bits,
        "abits": 32 if source is None else source.bits,
        "weight_scale_min": float(scale.min()) if integer else None,
        "weight_scale_max": float(scale.max()) if integer else None,
        "activation_scale": None if source is None else source.scale,
        "packed_bytes": ideal_bytes(node, shared=shared),
        "note": note,
    }


def _matmul_note(source: Grid | None, target: Grid | None) -> str:
    """The bits of its row are those of its inputs."""
    if source is None:
        return "inputs left in float"
    return "of two values" if target is not None else "of two values, float output"


def _row(node: Node, grid: Grid | None) -> dict[str, Any]:
    return {
        "layer": node.name,
        "type": node.op,
        "shape": [],
        "wbits": None,
        "abits": None if grid is None else grid.bits,
        "weight_scale_min": None,
        "weight_scale_max": None,
        "activation_scale": None if grid is None else grid.scale,
        "packed_bytes": 0,
        "note": "" if grid is not None else "float output",
    }
