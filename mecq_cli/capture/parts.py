"""A linear layer whose output is cut into parts, as one layer for each part.

Queries, keys and values come from one matrix in most models, but each of them deserves a grid of
its own. A row of a weight knows nothing of the other rows, so the parts are the same function.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from mecq_cli.layers import Layer, Users

_NAMES = {3: ("q", "k", "v")}


def split_linears(layers: list[Layer]) -> list[Layer]:
    """Linear layers that nobody reads as a whole are replaced by their parts."""
    found = list(layers)
    for layer in layers:
        if layer.kind == "linear" and layer.ceiling is None and layer.gain is None:
            chain, cuts = _cuts(Users(found), layer)
            if cuts:
                found = _split(found, layer, chain, cuts)
    return found


def _cuts(users: Users, layer: Layer) -> tuple[list[Layer], list[Layer]]:
    """The moves behind a layer, and the slices of one axis that all of them end in."""
    chain: list[Layer] = []
    last = layer
    while users.only_one(last.name):
        (reader,) = users.of[last.name]
        if reader.kind not in ("reshape", "transpose"):
            return [], []
        chain.append(reader)
        last = reader
    cuts = users.of[last.name]
    if len(cuts) < 2 or not all(cut.kind == "slice" for cut in cuts):
        return [], []
    bounds = {(*c.attributes["axes"], *c.attributes["starts"], *c.attributes["ends"]) for c in cuts}
    axes = {tuple(cut.attributes["axes"]) for cut in cuts}
    plain = all(list(cut.attributes["steps"]) == [1] for cut in cuts)
    if len(axes) > 1 or len(bounds) < len(cuts) or not plain or len(cuts[0].attributes["axes"]) > 1:
        return [], []
    if _origin(layer, chain, int(cuts[0].attributes["axes"][0])) is None:
        return [], []
    return chain, cuts


def _origin(layer: Layer, chain: list[Layer], axis: int) -> list[int] | None:
    """Where an axis behind the moves is in the output of each of them and in the channels.

    The first entry is among the factors that the first reshape divides the channels into.
    """
    shapes = [layer.shape, *(move.shape for move in chain)]
    found = [axis]
    for index in range(len(chain) - 1, -1, -1):
        move, before, after = chain[index], shapes[index], shapes[index + 1]
        if move.kind == "transpose":
            axis = int(move.attributes["axes"][axis - 1])
        elif index == 0:
            lead = len(before) - 1
            if after[:lead] != before[:lead] or axis <= lead:
                return None
            axis -= lead
        else:
            return None
        found.insert(0, axis)
    if not chain:
        return [1] if axis == len(layer.shape) else None
    return found if chain[0].kind == "reshape" else None


def _split(layers: list[Layer], layer: Layer, chain: list[Layer], cuts: list[Layer]) -> list[Layer]:
    axis = int(cuts[0].attributes["axes"][0])
    origin = _origin(layer, chain, axis)
    assert origin is not None
    channels = layer.shape[-1]
    factors = chain[0].shape[len(layer.shape) - 1 :] if chain else (channels,)
    rows = np.arange(channels).reshape(factors)
    added: list[Layer] = []
    renamed: dict[str, str] = {}
    names = _NAMES.get(len(cuts), tuple(map(str, range(len(cuts)))))
    ordered = sorted(cuts, key=lambda cut: int(cut.attributes["starts"][0]))
    for suffix, cut in zip(names, ordered, strict=True):
        start, end = int(cut.attributes["starts"][0]), int(cut.attributes["ends"][0])
        chosen = rows.take(range(start, end), axis=origin[0] - 1).ravel()
        part = _part(layer, f"{layer.name}.{suffix}", chosen)
        added.append(part)
        for move, place in zip(chain, origin[1:], strict=True):
            shape = list(move.shape)
            shape[place - 1] = end - start
            attributes = {"shape": shape} if move.kind == "reshape" else move.attributes
            name = f"{move.name}.{suffix}"
            part = replace(
                move, name=name, inputs=[part.name], shape=tuple(shape), attributes=attributes
            )
            added.append(part)
        renamed[cut.name] = part.name
    gone = {layer.name, *(move.name for move in chain), *renamed}
    result: list[Layer] = []
    for other in layers:
        if other is layer:
            result += added
        if other.name not in gone:
            other.inputs = [renamed.get(name, name) for name in other.inputs]
            result.append(other)
    return result


def _part(layer: Layer, name: str, rows: NDArray[np.intp]) -> Layer:
    """Some rows of a linear layer."""
    module = layer.module
    assert isinstance(module, nn.Linear)
    index = torch.from_numpy(rows).to(module.weight.device)
    with torch.device("meta"):
        part = nn.Linear(module.in_features, len(rows), bias=module.bias is not None)
    part.weight = nn.Parameter(module.weight.detach()[index].clone())
    if module.bias is not None:
        part.bias = nn.Parameter(module.bias.detach()[index].clone())
    shape = (*layer.shape[:-1], len(rows))
    return replace(layer, name=name, shape=shape, module=part, norm=_norm_part(layer, index))


def _norm_part(layer: Layer, index: torch.Tensor) -> nn.BatchNorm2d | nn.BatchNorm1d | None:
    norm = layer.norm
    if norm is None:
        return None
    with torch.device("meta"):
        part = type(norm)(len(index), eps=norm.eps)
    for name, parameter in norm.named_parameters():
        setattr(part, name, nn.Parameter(parameter.detach()[index].clone()))
    for name, buffer in norm.named_buffers():
        part.register_buffer(name, buffer[index].clone() if buffer.dim() else buffer.clone())
    return part
