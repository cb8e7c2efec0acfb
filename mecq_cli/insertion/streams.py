"""Where values are floats anyway, whatever the bits: what norms and softmax make and read.

A residual stream is 8-bit integers where a convolution or linear layer reads it: these then work
on integers alone. Between norms it stays in float. A grid would serve nobody there: the norm needs
floats, and rescales each token by itself, so that what a grid for all tokens rounds away is lost.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from mecq_cli.insertion.needs import FLOATING, PASSING, POOLS
from mecq_cli.layers import Layer, Users


def float_values(layers: Sequence[Layer]) -> set[str]:
    """Names of the layers that put out floats: float operations, and sums between these."""
    users = Users(list(layers))
    found = {layer.name for layer in layers if layer.kind in FLOATING}
    for stream in _streams(layers, users):
        values = {*stream, *(name for add in stream for name in _origins(users, add))}
        readers = [reader for name in values for reader in _readers(users, name)]
        if all(r.kind in (*FLOATING, *POOLS) or r.name in stream for r in readers):
            found |= stream
    return found


def origin(users: Users, name: str) -> Layer | None:
    """The layer that computed a value, above operations that only move it; None for images."""
    layer = users.by_name.get(name)
    while layer is not None and layer.kind in PASSING:
        layer = users.by_name.get(layer.inputs[0])
    return layer


def of_images(users: Users, name: str) -> bool:
    """Whether a value consists of images alone, moved perhaps."""
    layer = users.by_name.get(name)
    if layer is None:
        return True
    return layer.kind in PASSING and all(of_images(users, source) for source in layer.inputs)


def _streams(layers: Sequence[Layer], users: Users) -> Iterable[set[str]]:
    """Adds that read each other, together."""
    streams: dict[str, set[str]] = {}
    for layer in layers:
        if layer.kind != "add":
            continue
        joined = {layer.name}
        for name in _origins(users, layer.name):
            joined |= streams.get(name, set())
        streams |= dict.fromkeys(joined, joined)
    return {id(stream): stream for stream in streams.values()}.values()


def _origins(users: Users, name: str) -> Iterator[str]:
    """What a layer reads, above moving operations."""
    for source in users.by_name[name].inputs:
        layer = users.by_name.get(source)
        if layer is None:
            continue
        if layer.kind in PASSING:
            yield from _origins(users, source)
        else:
            yield source


def _readers(users: Users, name: str) -> Iterator[Layer]:
    """Who reads a value, below moving operations."""
    for reader in users.of[name]:
        if reader.kind in PASSING:
            yield from _readers(users, reader.name)
        else:
            yield reader
