"""How many bits each layer gets."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from mecq_cli.errors import UsageError
from mecq_cli.insertion.needs import PRODUCTS
from mecq_cli.integer.ir import INPUT
from mecq_cli.layers import Layer

GATE_BITS = 8
"""Weights and inputs of the small layers that make gates from means over the plane."""


@dataclass(frozen=True)
class Bits:
    """Bits of one layer: weight and input activation, 32 for FP."""

    wbits: int
    abits: int


@dataclass(frozen=True)
class BitPlan:
    """How many bits each layer gets, and by which quantizers.

    Attributes:
        wbits, abits: of every layer but the first and the last; 1 to 8, or 32.
        first_last_bits: of those two, weights and input.
        residual_bits: 8, or 32 to leave residual adds in float.
        reduce_range: weights of 8 bits get 7, wherever the 8 come from.
        overrides: (pattern on the layer name, wbits or None, abits or None), the last one wins.
        quantizer: name of those of weights and activations, see mecq_cli.quantizers.
    """

    wbits: int
    abits: int
    first_last_bits: int = 8
    residual_bits: int = 8
    reduce_range: bool = False
    overrides: Sequence[tuple[str, int | None, int | None]] = ()
    quantizer: str = "lsq"


class Assigned(NamedTuple):
    """What a plan says of the layers of a network.

    Attributes:
        bits: of each conv2d, linear and matmul layer.
        classifiers: names of those that make the logits.
        governed: names of those with weights whose bits are the plan's ``wbits`` where no override
            says otherwise: neither the first, nor the last, nor a gate.
    """

    bits: dict[str, Bits]
    classifiers: list[str]
    governed: list[str]


def assign_bits(layers: list[Layer], plan: BitPlan) -> Assigned:
    """Bits of each layer that multiplies."""
    products = [layer for layer in layers if layer.kind in PRODUCTS]
    if not products:
        raise UsageError("this model has no convolution or linear layer to quantize")
    by_name = {layer.name: layer for layer in layers}
    firsts = [p.name for p in products if first_above(p.inputs[0], by_name) == INPUT]
    lasts = makers_of_logits(layers)
    ends = {*firsts, *lasts}
    bits = {}
    for layer in products:
        end = layer.name in ends
        # "--wbits 32" means an FP weight everywhere, the ends included.
        wbits = plan.first_last_bits if end and plan.wbits != 32 else plan.wbits
        abits = plan.first_last_bits if end and plan.abits != 32 else plan.abits
        bits[layer.name] = Bits(wbits, abits)
    gates = gate_layers(layers)
    for name in gates:
        # Little to compute, of which every channel of the network depends.
        old = bits[name]
        bits[name] = Bits(*(32 if b == 32 else GATE_BITS for b in (old.wbits, old.abits)))
    bits |= {m.name: Bits(plan.wbits, plan.abits) for m in layers if m.kind == "matmul"}
    for pattern, wbits_or_none, abits_or_none in plan.overrides:
        hits = [name for name in bits if fnmatch.fnmatchcase(name, pattern)]
        if not hits:
            raise UsageError(
                f"layer pattern {pattern!r} matches no layer; the layers are {', '.join(bits)}"
            )
        for name in hits:
            old = bits[name]
            bits[name] = Bits(wbits_or_none or old.wbits, abits_or_none or old.abits)
    if plan.reduce_range:
        bits = {name: replace(b, wbits=7) if b.wbits == 8 else b for name, b in bits.items()}
    governed = [p.name for p in products if p.name not in ends and p.name not in gates]
    return Assigned(bits, lasts, governed)


def gate_layers(layers: list[Layer]) -> list[str]:
    """Products that make a factor or summand of whole channels: of squeeze and excitation.

    Upwards from the smaller operand of an add or mul, to the pool that it comes from.
    """
    by_name = {layer.name: layer for layer in layers}
    found: set[str] = set()
    for layer in layers:
        if layer.kind not in ("add", "mul") or INPUT in layer.inputs:
            continue
        for name in layer.inputs:
            if math.prod(by_name[name].shape) < math.prod(layer.shape):
                found |= _small_products(name, by_name)
    return [layer.name for layer in layers if layer.name in found]


def _small_products(name: str, by_name: dict[str, Layer]) -> set[str]:
    found: set[str] = set()
    while name in by_name and math.prod(by_name[name].shape[1:]) == 1:
        layer = by_name[name]
        if layer.kind in PRODUCTS:
            found.add(name)
        name = layer.inputs[0]
    return found


def first_above(name: str, by_name: dict[str, Layer]) -> str:
    """The first product at or above a value, through operations that only move values."""
    while name != INPUT and by_name[name].kind not in PRODUCTS:
        if by_name[name].kind in ("add", "mul", "constant", "matmul"):
            return name
        name = by_name[name].inputs[0]
    return name


def makers_of_logits(layers: list[Layer]) -> list[str]:
    """The products that make the logits, of an image or of each pixel."""
    by_name = {layer.name: layer for layer in layers}
    if len(layers[-1].shape) != 3:
        return last_products(layers[-1].name, by_name)
    logits = dense_logits(layers)
    found = [layer.name for layer in layers if layer.name in logits and layer.kind in PRODUCTS]
    return found or last_products(layers[-1].name, by_name)


def dense_logits(layers: list[Layer]) -> set[str]:
    """Of a network that segments: layers that hold logits, a map for each class.

    From the output upwards through resizing and sums of several heads, to the products that make
    them. A sum of something else is a residual one, and holds no logits.
    """
    by_name = {layer.name: layer for layer in layers}
    found: set[str] = set()
    waiting = [layers[-1].name] if len(layers[-1].shape) == 3 else []
    while waiting:
        layer = by_name.get(waiting.pop())
        if layer is None or layer.shape[0] != layers[-1].shape[0]:
            continue
        heads = [by_name.get(_above_resizing(name, by_name)) for name in layer.inputs]
        of_heads = all(head is not None and head.kind in PRODUCTS for head in heads)
        if layer.kind in PRODUCTS:
            found.add(layer.name)
        elif layer.kind in _RESIZING or (layer.kind == "add" and of_heads):
            found.add(layer.name)
            waiting += layer.inputs
    return found


_RESIZING = ("resize", "upsample")


def _above_resizing(name: str, by_name: dict[str, Layer]) -> str:
    while name in by_name and by_name[name].kind in _RESIZING:
        name = by_name[name].inputs[0]
    return name


def last_products(name: str, by_name: dict[str, Layer]) -> list[str]:
    """The products that make the logits: several, where these are the mean of several heads, or
    those of several heads beside each other."""
    layer = by_name.get(name)
    if layer is None or layer.kind in PRODUCTS:
        return [name]
    if layer.kind == "constant":
        return []
    if layer.kind == "add" and len(layer.shape) > 1:
        return [first_above(name, by_name)]
    heads = layer.inputs if layer.kind in ("add", "rescale", "concat") else layer.inputs[:1]
    return [found for head in heads for found in last_products(head, by_name)]
