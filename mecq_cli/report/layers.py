"""What the layers of a run do with their bits: codes used, entropy, clipping, histograms.

Histograms count in codes of the quantized network, before (the FP network's values, divided by
the steps that were learned) and after (the integers): so both lie on one axis, and it shows what
the grid makes of the values.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mecq_cli.insertion import QuantizedModel
from mecq_cli.integer.ir import INPUT, Grid, IntegerModel, Node
from mecq_cli.kernels import run_node
from mecq_cli.sites import ProductSite

BINS = 48
"""Of the histogram of FP values."""

_BARS = 32
"""More codes than that are drawn in groups."""

_FAR = 1 << 22
"""Ends of a grid that clips nothing; such integers are exact in float32."""

_ROUNDING = ("quantize", "requantize", "conv2d", "linear", "add", "avg_pool2d", "global_avg_pool")
_CONVERTED = re.compile(r"\.(quantize|dequantize)(_\d+)?$|\.threshold$")

Counts = NDArray[np.int64]


@dataclass
class Codes:
    """How often each code of a grid occurred, and how many values lay beyond its ends."""

    first: int
    counts: Counts
    spacing: int = 1
    clipped: int | None = 0

    @property
    def total(self) -> int:
        """Values counted."""
        return int(self.counts.sum())

    def entropy(self) -> float:
        """Of the codes, in bits."""
        shares = self.counts[self.counts > 0] / self.total
        return float(-(shares * np.log2(shares)).sum()) + 0.0

    def to_json(self) -> dict[str, Any]:
        """Numbers of the table, and bars: [left end, width, density] in codes."""
        bars = []
        group = max(math.ceil(len(self.counts) / _BARS), 1)
        for start in range(0, len(self.counts), group):
            part = self.counts[start : start + group]
            left = self.first + self.spacing * (start - 0.5)
            width = self.spacing * len(part)
            bars.append([left, width, _round(int(part.sum()) / self.total / width)])
        return {
            "entropy": self.entropy(),
            "used": int((self.counts > 0).sum()),
            "codes": len(self.counts),
            "clipped": None if self.clipped is None else self.clipped / self.total,
            "values": self.total,
            "bars": bars,
        }


def weight_codes(node: Node) -> Codes | None:
    """Of the weights of a conv2d or linear node; None for float ones."""
    if node.weight_bits in (None, 32):
        return None
    assert node.weight_bits is not None
    weight = node.tensors["weight"].astype(np.int64).ravel()
    zeroless = node.mid_rise or node.weight_bits == 1
    spacing = 2 if zeroless else 1
    first = 1 - 2**node.weight_bits if zeroless else -(2 ** (node.weight_bits - 1))
    counts = np.bincount((weight - first) // spacing, minlength=2**node.weight_bits)
    return Codes(first, counts, spacing, None)


@torch.no_grad()
def clipped_weights(site: ProductSite) -> int | None:
    """How many trained weights lie more than half a step beyond the ends of their grid."""
    quantizer = site.weight_quantizer
    if quantizer is None:
        return None
    q, step = (t.double() for t in quantizer.integers(site.weight))
    step = step.reshape(-1, *([1] * (q.dim() - 1)))
    beyond = site.weight.detach().double() - q * step
    top = 2**quantizer.bits - 1 if quantizer.mid_rise else 2 ** (quantizer.bits - 1) - 1
    bottom = -top if quantizer.mid_rise else -top - 1
    half = step if quantizer.mid_rise else step / 2
    out = ((q >= top) & (beyond > half)) | ((q <= bottom) & (beyond < -half))
    return int(out.sum())


@torch.no_grad()
def weights_before(site: ProductSite, fp: Tensor, codes: Codes) -> list[list[float]] | None:
    """Histogram of FP weights [O, ...] in units of the trained steps, as [left, density]."""
    if site.weight_quantizer is None:
        return None
    _, step = site.weight_quantizer.integers(site.weight)
    units = fp.detach().float() / step.reshape(-1, *([1] * (fp.dim() - 1)))
    histogram = Histogram(*_reach(codes))
    histogram.add(units)
    return histogram.to_json()


class Histogram:
    """Shares of values in `BINS` equal parts of a range, gathered batch by batch."""

    def __init__(self, low: float, high: float) -> None:
        self.low, self.high = low, high
        self.counts = torch.zeros(BINS, dtype=torch.float64)
        self.total = 0

    def add(self, values: Tensor) -> None:
        """Count them; those out of the range only in the total."""
        flat = values.float().reshape(-1)
        self.counts += torch.histc(flat, BINS, self.low, self.high).double()
        self.total += flat.numel()

    def to_json(self) -> list[list[float]]:
        """[left end, density] of each part."""
        width = (self.high - self.low) / BINS
        density = self.counts / max(self.total, 1) / width
        return [[_round(self.low + i * width), _round(float(d))] for i, d in enumerate(density)]


def _reach(codes: Codes, *, unsigned: bool = False) -> tuple[float, float]:
    """What a histogram shows: the grid, and half of its length on either side.

    Below a grid without negative values there is hardly anything to see.
    """
    length = codes.spacing * len(codes.counts)
    low = codes.first - 0.5 * codes.spacing
    return low - (0.1 if unsigned else 0.5) * length, low + 1.5 * length


def origin_of(name: str) -> str:
    """The value that a conversion started from, as the FP network knows it."""
    while (shorter := _CONVERTED.sub("", name)) != name:
        name = shorter
    return name


class Watched:
    """Counts the codes of every value of an integer network on a grid, image after image."""

    def __init__(self, model: IntegerModel) -> None:
        self.model = model
        self.codes: dict[str, Codes] = {}
        # What only thresholds read is on a grid that reaches just beyond them.
        compared = {n.inputs[0] for n in model.nodes if n.op == "threshold"}
        compared -= {name for n in model.nodes if n.op != "threshold" for name in n.inputs}
        for node in model.nodes:
            if node.grid is not None:
                counted = (
                    node.op in _ROUNDING
                    and 2**node.grid.bits - 1 == node.grid.qmax
                    and node.name not in compared
                )
                counts = np.zeros(2**node.grid.bits, np.int64)
                self.codes[node.name] = Codes(0, counts, node.grid.spacing, 0 if counted else None)

    @torch.no_grad()
    def see(self, images: Tensor) -> None:
        """Run normalised images [N, C, H, W] and count."""
        for node, value in _walk(self.model, images, self._run):
            if node.grid is not None:
                codes = self.codes[node.name]
                flat = value.reshape(-1).long()
                if codes.spacing > 1:  # a zero that pads is none of the codes
                    flat = flat[flat % codes.spacing == 0] // codes.spacing
                found = torch.bincount(flat, minlength=len(codes.counts))
                codes.counts += found.cpu().numpy()

    def _run(self, node: Node, inputs: list[Tensor], grids: list[Grid | None]) -> Tensor:
        grid, codes = node.grid, self.codes.get(node.name)
        if grid is None or codes is None or codes.clipped is None:
            return run_node(node, inputs, grids)
        wide = replace(node, grid=replace(grid, qmin=-_FAR, qmax=_FAR))
        value = run_node(wide, inputs, grids)
        codes.clipped += int((value > grid.qmax).sum())
        if grid.qmin < grid.zero_point:  # else what is below was made zero by the activation
            codes.clipped += int((value < grid.qmin).sum())
        return value.clamp(grid.qmin, grid.qmax)


class Floats:
    """Histograms of the FP network's values, in codes of the grids the quantized one has there.

    Args:
        model: the FP network as an integer model whose values are all floats.
        wanted: by name of a value of the quantized network: its grid.
    """

    def __init__(self, model: IntegerModel, wanted: Mapping[str, tuple[Grid, Codes]]) -> None:
        self.model = model
        names = {node.name for node in model.nodes} | {INPUT}
        self.histograms: dict[str, Histogram] = {}
        self._at: dict[str, list[tuple[Grid, Histogram]]] = {}
        for name, (grid, codes) in wanted.items():
            origin = origin_of(name)
            place = next((n for n in (f"{origin}.relu", origin) if n in names), None)
            if place is not None:
                histogram = self.histograms[name] = Histogram(
                    *_reach(codes, unsigned=grid.zero_point == 0)
                )
                self._at.setdefault(place, []).append((grid, histogram))

    @torch.no_grad()
    def see(self, images: Tensor) -> None:
        """Run normalised images [N, C, H, W] and count."""
        self._count(INPUT, images)
        for node, value in _walk(self.model, images, run_node):
            self._count(node.name, value)

    def _count(self, name: str, value: Tensor) -> None:
        for grid, histogram in self._at.get(name, ()):
            histogram.add(value / grid.scale + grid.zero_point)


def _walk(
    model: IntegerModel, images: Tensor, run: Callable[..., Tensor]
) -> Iterator[tuple[Node, Tensor]]:
    """Each node with its output, which is forgotten once nobody needs it any more."""
    uses = Counter(name for node in model.nodes for name in node.inputs)
    values: dict[str, Tensor] = {INPUT: images}
    grids: dict[str, Grid | None] = {INPUT: None}
    for node in model.nodes:
        inputs = [values[name] for name in node.inputs]
        value = run(node, inputs, [grids[name] for name in node.inputs])
        values[node.name], grids[node.name] = value, node.grid
        yield node, value
        uses.subtract(node.inputs)
        for name in node.inputs:
            if not uses[name]:
                values.pop(name, None)


def gather(
    rows: Iterable[Mapping[str, Any]],
    model: IntegerModel,
    watched: Watched | None,
    floats: Floats | None,
    simulator: QuantizedModel | None,
    fp_weights: Mapping[str, Tensor],
) -> list[dict[str, Any]]:
    """The site table with what was seen.

    Args:
        rows: of mecq_cli.sizes.site_rows.
        model: the integer network.
        watched: after it saw images; None without any.
        floats: the same of the FP network.
        simulator: the trained network; None where its checkpoint is gone.
        fp_weights: of the FP network by layer.

    Returns:
        The rows, each with "weights" and "activations" (of a layer with weights what it reads, of
        any other what it puts out) as `Codes.to_json` gives them, with "before" added.
    """
    nodes = {node.name: node for node in model.nodes}
    sites = {site.name: site for site in simulator.sites()} if simulator is not None else {}
    gathered = []
    for row in rows:
        node = nodes[row["layer"]]
        product = node.op in ("conv2d", "linear")
        entry = dict(row)
        if product:
            entry["weights"] = _weights(node, sites.get(node.name), fp_weights.get(node.name))
        source = _read_by(node, nodes) if product else node.name
        entry["activations"] = _activations(source, watched, floats)
        gathered.append(entry)
    return gathered


def _read_by(node: Node, nodes: Mapping[str, Node]) -> str:
    """Whose output a layer reads; flattening changes none of its values."""
    source = node.inputs[0]
    while source in nodes and nodes[source].op == "flatten":
        source = nodes[source].inputs[0]
    return source


def _weights(node: Node, site: Any, fp: Tensor | None) -> dict[str, Any] | None:
    codes = weight_codes(node)
    if codes is None:
        return None
    before = None
    if isinstance(site, ProductSite):
        codes.clipped = clipped_weights(site)
        before = None if fp is None else weights_before(site, fp, codes)
    return {**codes.to_json(), "before": before}


def _activations(
    name: str, watched: Watched | None, floats: Floats | None
) -> dict[str, Any] | None:
    codes = None if watched is None else watched.codes.get(name)
    if codes is None or not codes.total:
        return None
    histogram = None if floats is None else floats.histograms.get(name)
    return {**codes.to_json(), "before": None if histogram is None else histogram.to_json()}


def _round(value: float) -> float:
    return float(f"{value:.4g}")
