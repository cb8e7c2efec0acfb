"""The frozen FP network computed with integers of 8 bits: the logits and features it gives, sooner.

What is learned from it is not needed to the last digit. On a CPU with VNNI a network whose weights
and activations are bytes takes about half the time of one in bfloat16. It is used only where it
says the same as the FP network (`make_teacher`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from mecq_cli.calibration import calibrate
from mecq_cli.entropy import as_rows
from mecq_cli.insertion import BitPlan, QuantizedModel, Tap, insert
from mecq_cli.integer.ir import Grid, Node, multiplied_weight
from mecq_cli.integer_conv import is_available, windows_see_pixels
from mecq_cli.kernels import dequantize, run_node
from mecq_cli.sites import DropoutSite, FloatSite, MatmulSite, Site
from mecq_cli.training.recipe import Recipe
from mecq_cli.training.teacher import Teacher

BITS = 8
LARGEST_ERROR = 0.15
"""Of logits and features: the root mean square relative to each one's deviation over images."""

AT_ONCE = 2**21
"""Values that are turned into floats at once."""

MOVING = ("concat", "flatten", "slice", "pad", "reshape", "transpose", "upsample")
"""Operations that move bytes."""


class IntegerTeacher(nn.Module):
    """A calibrated network of 8 bits, run by oneDNN's operations on bytes.

    The same values as in evaluation but for their last unit: a sum of a convolution and what a
    residual add adds to it is rounded once instead of twice. Nothing of it is trained.

    Args:
        model: weights and activations of at most 8 bits; its taps are those of the teacher.
    """

    def __init__(self, model: QuantizedModel) -> None:
        super().__init__()
        # By names: nodes would keep the network alive, with its weights in float32.
        self._operations: list[tuple[str, tuple[str, ...], Callable[..., Tensor]]] = []
        graph = model.graph
        grids: dict[fx.Node, Grid | None] = {}
        convolutions: dict[fx.Node, _Product] = {}
        for fx_node in graph.graph.nodes:
            inputs = tuple(fx_node.all_input_nodes)
            if fx_node.op == "placeholder":
                grids[fx_node], self._images = None, fx_node.name
            elif fx_node.target is torch.flatten:  # tokens, of which rows are made next
                self._add(fx_node, _names(inputs), _tokens)
                grids[fx_node] = grids[inputs[0]]
            elif fx_node.op == "call_function":
                self._add(fx_node, _names(inputs), _Rows(grids[inputs[0]], int(fx_node.args[1])))
            elif fx_node.op == "output":
                self._outputs = _names(fx_node.args[0])
            else:
                site = graph.get_submodule(str(fx_node.target))
                assert isinstance(site, Site)
                # The operands as they are given: an add may add a value to itself.
                inputs = tuple(a for a in fx_node.args if isinstance(a, fx.Node))
                if isinstance(site, DropoutSite):
                    self._add(fx_node, _names(inputs), _same)
                    grids[fx_node] = grids[inputs[0]]
                    continue
                node = site.node(tuple(i.name for i in inputs))
                grids[fx_node] = node.grid
                sources = [grids[i] for i in inputs]
                operation = _operation(node, sources)
                fused = self._fusable(node, inputs, convolutions)
                # One that clips cannot take over what is done behind its clip.
                if isinstance(operation, _Product) and node.op == "conv2d" and not site.clips:
                    convolutions[fx_node] = operation
                if fused is None:
                    self._add(fx_node, _names(inputs), operation)
                else:
                    self._fuse(fx_node, inputs, fused, node, grids, convolutions)
        self._last_use = {
            name: i for i, (_, inputs, _) in enumerate(self._operations) for name in inputs
        }
        self._last_use |= dict.fromkeys(self._outputs, len(self._operations))
        self._reuse_memory()

    def _reuse_memory(self) -> None:
        """Let an add write to the memory of a value that nobody reads after it, or through views.

        That is, one of a product, of which all other readers are products or rows.
        """
        made = {name: operation for name, _, operation in self._operations}
        readers: dict[str, list[Callable[..., Tensor]]] = {}
        for _, inputs, operation in self._operations:
            for name in inputs:
                readers.setdefault(name, []).append(operation)
        for i, (_, inputs, operation) in enumerate(self._operations):
            if not isinstance(operation, _Product) or operation.other is None:
                continue
            x, other = inputs
            operation.in_place = (
                x != other
                and self._last_use[other] == i
                and isinstance(made.get(other), _Product)
                and all(isinstance(reader, _Product | _Rows) for reader in readers[other])
            )

    def _add(
        self, fx_node: fx.Node, inputs: tuple[str, ...], operation: Callable[..., Tensor]
    ) -> None:
        self._operations.append((fx_node.name, inputs, operation))

    @staticmethod
    def _fusable(
        node: Node, inputs: tuple[fx.Node, ...], convolutions: Mapping[fx.Node, _Product]
    ) -> fx.Node | None:
        """The convolution that can take over an add."""
        if node.op != "add" or node.grid is None or inputs[0] is inputs[1]:
            return None
        alone = [i for i in inputs if i in convolutions and len(i.users) == 1]
        return alone[-1] if alone else None

    def _fuse(
        self,
        fx_node: fx.Node,
        inputs: tuple[fx.Node, ...],
        convolution: fx.Node,
        node: Node,
        grids: Mapping[fx.Node, Grid | None],
        convolutions: Mapping[fx.Node, _Product],
    ) -> None:
        """Let the convolution add the other operand to its sums, where the add was."""
        (place,) = (i for i, (n, _, _) in enumerate(self._operations) if n == convolution.name)
        _, sources, _ = self._operations.pop(place)
        other = inputs[0] if inputs[1] is convolution else inputs[1]
        product, grid, result = convolutions[convolution], grids[other], node.grid
        assert grid is not None
        assert result is not None
        self._add(fx_node, (*sources, other.name), product.adding(grid, result))

    @torch.no_grad()
    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Logits [N, classes] and the tapped values, as rows."""
        values: dict[str, Tensor] = {self._images: images}
        with torch.autocast(images.device.type, enabled=False):
            for i, (name, inputs, operation) in enumerate(self._operations):
                values[name] = operation(*(values[n] for n in inputs))
                for used in inputs:
                    if self._last_use[used] == i:
                        values.pop(used, None)
        return tuple(values[name] for name in self._outputs)


def make_teacher(
    model: nn.Module,
    input_shape: tuple[int, int, int],
    taps: Sequence[Tap],
    grid: int,
    recipe: Recipe,
    images: Callable[[], Iterable[Tensor]],
) -> Teacher | IntegerTeacher:
    """The frozen network of a training: of integers where that is sooner and says the same.

    Args:
        model: FP classifier; it must not be trained.
        input_shape: (C, H, W).
        taps, grid: as the quantized network has them.
        recipe: of the training; where its model is compiled, its convolutions are of integers too.
        images: normalised batches, for the grids.
    """
    teacher = Teacher(model, input_shape, taps, grid, recipe.bf16)
    on_cpu = all(p.device.type == "cpu" for p in model.parameters())
    if recipe.teacher == "float" or recipe.compile != "model" or not (on_cpu and is_available()):
        return teacher
    if any(isinstance(site, MatmulSite | FloatSite) for site in teacher.network.sites()):
        return teacher  # there is little to gain between norms and softmax, which are floats
    quick, error = quick_teacher(model, input_shape, taps, grid, images())
    return quick if error <= LARGEST_ERROR else teacher


def quick_teacher(
    model: nn.Module,
    input_shape: tuple[int, int, int],
    taps: Sequence[Tap],
    grid: int,
    images: Iterable[Tensor],
) -> tuple[IntegerTeacher, float]:
    """The FP network with 8 bits, and its largest error on the last of the batches.

    Where there are several, its grids have not seen that one.
    """
    network = insert(model, input_shape, BitPlan(BITS, BITS), taps, grid)
    network.requires_grad_(False)
    batches = list(images)
    seen = batches[:-1] or batches
    calibrate(network, seen, len(seen))
    network.eval()
    quick = IntegerTeacher(network)
    expected = Teacher(model, input_shape, taps, grid)(batches[-1])
    return quick, max(_error(a, b) for a, b in zip(quick(batches[-1]), expected, strict=True))


def _error(value: Tensor, expected: Tensor) -> float:
    """Of rows [N, d], by feature, in units of its deviation: the features are standardised."""
    expected = expected.float()
    deviation = (expected - expected.mean(0)).square().mean(0)
    error = (value.float() - expected).square().mean(0)
    alive = deviation > 1e-6 * deviation.max()
    share = (error[alive] / deviation[alive]).clamp_max(1.0)
    return float(share.mean().sqrt()) if len(share) else 1.0


def _operation(node: Node, sources: Sequence[Grid | None]) -> Callable[..., Tensor]:
    if node.op in ("conv2d", "linear") and sources[0] is not None:
        return _Product(node, sources[0])
    return _Other(node, sources)


def _names(nodes: Any) -> tuple[str, ...]:
    return tuple(node.name for node in nodes)


def _same(x: Tensor) -> Tensor:
    return x


def _tokens(x: Tensor) -> Tensor:
    return x.flatten(1, -2)


class _Rows:
    """What the graph returns beside the logits."""

    def __init__(self, grid: Grid | None, cells: int) -> None:
        self.grid, self.cells = grid, cells

    def __call__(self, x: Tensor) -> Tensor:
        if self.grid is None:
            return as_rows(x, self.cells)
        parts = x.split(max(AT_ONCE // x[0].numel(), 1))
        rows = torch.cat([as_rows(part.float(), self.cells) for part in parts])
        return dequantize(rows, self.grid)


class _Other:
    """An operation other than a product, by `mecq_cli.kernels`."""

    def __init__(self, node: Node, sources: Sequence[Grid | None]) -> None:
        self.node, self.sources = node, sources

    def __call__(self, *inputs: Tensor) -> Tensor:
        values: Sequence[Tensor] = inputs
        if self.node.op == "max_pool2d" and inputs[0].dtype == torch.uint8:
            return _max_pool(self.node, inputs[0])
        if self.node.op not in MOVING:
            values = [x.float() for x in inputs]
        out = run_node(self.node, values, self.sources)
        return out if self.node.grid is None else out.to(torch.uint8)


def _max_pool(node: Node, x: Tensor) -> Tensor:
    """Of bytes, by the operation of quantized tensors; PyTorch's other one knows floats only."""
    a = node.attributes
    sizes = [[*a[name]] for name in ("kernel", "stride", "padding", "dilation")]
    out: Tensor = torch.ops.quantized.max_pool2d(x, *sizes, bool(a["ceil_mode"]))
    return out


class _Product:
    """A convolution or linear layer of bytes, with an add behind it where there is one."""

    def __init__(self, node: Node, source: Grid) -> None:
        self.op, self.source, self.result = node.op, source, node.grid
        self.other: Grid | None = None
        self.in_place = False
        scale = torch.from_numpy(node.tensors["weight_scale"])
        weight = torch.from_numpy(multiplied_weight(node))
        self.bias = torch.from_numpy(node.tensors["bias"]) * scale * source.scale
        # Scales are positive there. The one weight that has no opposite is off by one step.
        negative = scale.view(-1, *[1] * (weight.dim() - 1)) < 0
        self.weight = torch.where(negative, -weight.clamp_min(-127), weight)
        self.scale = scale.abs()
        self.zeros = torch.zeros(len(scale), dtype=torch.int32)
        self.packed: tuple[tuple[int, ...], Tensor] | None = None
        self.geometry: tuple[Any, ...] = ()
        if node.op == "conv2d":
            a = node.attributes
            top, left, bottom, right = a["padding"]
            symmetric = (top, left) == (bottom, right)
            by_operation = symmetric and windows_see_pixels(
                weight.shape[2:], (top, left), a["dilation"]
            )
            self.around = None if by_operation else (left, right, top, bottom)
            padding = [top, left] if self.around is None else [0, 0]
            self.geometry = ([*a["stride"]], padding, [*a["dilation"]], a["groups"])

    def adding(self, other: Grid, result: Grid) -> _Product:
        """The same with a value on the grid ``other`` added, on the grid ``result``."""
        product = copy.copy(self)
        product.other, product.result = other, result
        return product

    def __call__(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        result, source = self.result, self.source
        kind = torch.float32 if result is None else torch.uint8
        scale, zero = (1.0, 0) if result is None else (result.scale, result.zero_point)
        if self.op == "linear":
            y: Tensor = torch.ops.onednn.qlinear_pointwise(
                x, source.scale, source.zero_point, self._packed(x), self.scale, self.zeros,
                self.bias, scale, zero, kind, "none", [], "",
            )  # fmt: skip
        else:
            if self.around is not None:
                x = nn.functional.pad(x, self.around, value=float(source.zero_point))
            x = x.contiguous(memory_format=torch.channels_last)
            given = (x, source.scale, source.zero_point, self._packed(x), self.scale, self.zeros)
            if other is None:
                y = torch.ops.onednn.qconv_pointwise(
                    *given, self.bias, *self.geometry, scale, zero, kind, "none", [], ""
                )
            else:
                assert self.other is not None
                # Its memory becomes the result's.
                alone = self.in_place and other.is_contiguous(memory_format=torch.channels_last)
                total = other if alone else other.clone(memory_format=torch.channels_last)
                y = torch.ops.onednn.qconv2d_pointwise.binary(
                    *given, total, self.bias, *self.geometry, scale, zero, kind,
                    self.other.scale, self.other.zero_point, "sum", 1.0, "none", [], "",
                )  # fmt: skip
        if result is not None and (result.qmin > 0 or result.qmax < 255):
            y = y.clamp_(result.qmin, result.qmax)
        return y

    def _packed(self, x: Tensor) -> Tensor:
        """The weight as the operation wants it for inputs of such a shape."""
        shape = tuple(x.shape)
        if self.packed is None or self.packed[0] != shape:
            if self.op == "linear":
                packed = torch.ops.onednn.qlinear_prepack(self.weight, [*shape])
            else:
                stride, padding, dilation, groups = self.geometry
                source = self.source
                packed = torch.ops.onednn.qconv_prepack(
                    self.weight, self.scale, source.scale, source.zero_point, stride, padding,
                    dilation, groups, [*shape],
                )  # fmt: skip
            self.packed = shape, packed
        return self.packed[1]
