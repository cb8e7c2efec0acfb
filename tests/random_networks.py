"""Random small torch networks: what somebody might write, from what can be quantized.

Each is a chain of blocks: convolutions of all kinds with batch norm and activations, residual
adds, concatenations, pools, slices and padding; then a head. Everything follows from one seed.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mecq_cli.insertion import BitPlan

CLASSES = 5


class Function(nn.Module):
    """Plain code between the modules, as in the forward of a block."""

    def __init__(self, call: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x)


class Residual(nn.Module):
    def __init__(self, branch: nn.Module, shortcut: nn.Module, activation: nn.Module) -> None:
        super().__init__()
        self.branch, self.shortcut, self.activation = branch, shortcut, activation

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.activation(self.branch(x) + self.shortcut(x))
        return y


class Concat(nn.Module):
    def __init__(self, branches: Sequence[nn.Module]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], 1)


class Split(nn.Module):
    """The first channels pass by, the others go through a branch."""

    def __init__(self, first: int, branch: nn.Module) -> None:
        super().__init__()
        self.first, self.branch = first, branch

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x[:, : self.first], self.branch(x[:, self.first :])], 1)


class Gate(nn.Module):
    """A value times what a branch makes of it, or less that."""

    def __init__(self, branch: nn.Module, *, difference: bool = False) -> None:
        super().__init__()
        self.branch, self.difference = branch, difference

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.branch(x)
        return x - y if self.difference else x * y


class Scale(nn.Module):
    def __init__(self, scale: Tensor, bias: float) -> None:
        super().__init__()
        self.scale, self.bias = nn.Parameter(scale), bias

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.bias


class Maker:
    """Draws the parts of a network; ``shape`` is what the next block reads, (C, H, W)."""

    def __init__(self, seed: int, spread: float) -> None:
        self.rng, self.spread = random.Random(seed), spread
        self.generator = torch.Generator().manual_seed(seed)
        self.shape = (
            self.rng.choice((1, 3, 3, 4)),
            self.rng.randint(6, 12),
            self.rng.randint(6, 12),
        )

    def network(self) -> nn.Module:
        rng = self.rng
        blocks: list[nn.Module] = [self.unit()]
        makers = [
            *[self.unit] * 3, *[self.residual] * 3, *[self.concat] * 2, self.split,
            self.max_pool, self.avg_pool, self.slice, self.pad, nn.Dropout,
            *[self.gate] * 2, *[self.norm] * 2, self.shuffle, self.upsample, self.adaptive,
        ]  # fmt: skip
        for block in blocks:
            self.follow(block)
        for _ in range(rng.randint(1, 5)):
            block = rng.choice(makers)()
            self.follow(block)
            blocks.append(block)
        network = nn.Sequential(*blocks, *self.head())
        self.fill(network)
        return network

    def follow(self, block: nn.Module) -> None:
        with torch.no_grad():
            _, *shape = block.eval()(torch.zeros(1, *self.shape)).shape
        self.shape = (shape[0], shape[1], shape[2])

    # -- blocks --------------------------------------------------------------------------------

    def activation(self) -> nn.Module:
        limit = self.rng.choice((0.5, 1.0, 3.0))
        choices: list[Callable[[], nn.Module]] = [
            nn.Identity,
            nn.ReLU,
            lambda: nn.ReLU(inplace=True),
            nn.ReLU6,
            lambda: nn.Hardtanh(0.0, limit),
            lambda: Function(F.relu),
            lambda: Function(lambda x: x.clamp(min=0)),
            lambda: Function(lambda x: x.clamp(0, limit)),
        ]
        if self.rng.random() < 0.4:
            choices = [
                *(nn.SiLU, nn.GELU, nn.Sigmoid, nn.Tanh, nn.Hardswish, nn.Hardsigmoid, nn.Mish),
                *(nn.ELU, nn.LeakyReLU, nn.Softplus, nn.Hardtanh, lambda: nn.GELU("tanh")),
            ]
        return self.rng.choice(choices)()

    def unit(self, outputs: int | None = None, *, keep: bool = False) -> nn.Sequential:
        """Convolution, batch norm or none, activation or none. ``keep``: the height and width."""
        rng, (channels, height, width) = self.rng, self.shape
        kind = rng.choice(("dense", "dense", "depthwise", "grouped"))
        divisors = [g for g in range(1, channels + 1) if channels % g == 0]
        groups = {"dense": 1, "depthwise": channels, "grouped": rng.choice(divisors)}[kind]
        if outputs is None:
            outputs = groups * rng.randint(1, max(12 // groups, 1))
        elif outputs % groups:
            groups = 1
        sizes = (1, 1, 3, 3, 5) if keep else (1, 2, 3, 3, 5)
        before: list[nn.Module] = []
        rows, columns = (self.axis(size, sizes, keep=keep) for size in (height, width))
        if rng.random() < 0.6:  # most windows are square
            rows = columns = min(rows, columns)
        kernel, dilation, stride, padding = zip(rows, columns, strict=True)
        if not keep and rng.random() < 0.2:
            sides = tuple(rng.randint(0, 2) for _ in range(4))
            before.append(Function(lambda x: F.pad(x, sides)))
        bias = rng.random() < 0.5
        same = "same" if keep and rng.random() < 0.5 else padding
        conv = nn.Conv2d(channels, outputs, kernel, stride, same, dilation, groups, bias)
        norms = [nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs, affine=False)]
        norm = rng.choices([*norms, nn.Identity()], (6, 1, 2))
        return nn.Sequential(*before, conv, *norm, self.activation())

    def branch(self, outputs: int | None = None) -> nn.Module:
        """Of the height and width it gets; ``outputs`` channels, or any number."""
        shape = self.shape
        makers: list[Callable[[], nn.Module]] = [nn.Identity, lambda: self.unit(keep=True)]
        inner = self.rng.choices([*makers, self.residual, self.concat], (3, 4, 1, 1))[0]()
        self.follow(inner)
        block = nn.Sequential(inner, self.unit(outputs, keep=True))
        self.shape = shape
        return block

    def axis(self, size: int, kernels: Sequence[int], *, keep: bool) -> tuple[int, int, int, int]:
        """Kernel, dilation, stride and padding along an axis; ``keep``: of which the size stays."""
        kernel = self.rng.choice([k for k in kernels if k <= size])
        dilation = self.rng.choice((1, 1, 2)) if 2 * (kernel - 1) < size else 1
        half = dilation * (kernel - 1) // 2
        if keep:
            return kernel, dilation, 1, half
        return kernel, dilation, self.rng.choice((1, 1, 2, 3)), self.rng.choice((0, half, half, 1))

    def residual(self) -> nn.Module:
        outputs = self.rng.choice((None, None, self.rng.randint(1, 10)))
        shortcut = nn.Identity() if outputs is None else self.unit(outputs, keep=True)
        return Residual(self.branch(outputs or self.shape[0]), shortcut, self.activation())

    def concat(self) -> nn.Module:
        choices = [nn.Identity, self.branch, self.branch]
        return Concat([self.rng.choice(choices)() for _ in range(self.rng.randint(2, 3))])

    def split(self) -> nn.Module:
        channels, *size = self.shape
        if channels == 1:
            return self.unit()
        first = self.rng.randint(1, channels - 1)
        self.shape = (channels - first, size[0], size[1])
        block = Split(first, self.branch())
        self.shape = (channels, size[0], size[1])
        return block

    def window(self) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int], bool]:
        """Kernel, stride and padding of a pool, and whether it has windows over the edge."""
        axes = []
        for size in self.shape[1:]:
            kernel = self.rng.randint(1, min(3, size))
            axes.append((kernel, self.rng.randint(1, 3), self.rng.randint(0, kernel // 2)))
        kernels, strides, paddings = zip(*axes, strict=True)
        return kernels, strides, paddings, self.rng.random() < 0.5

    def max_pool(self) -> nn.Module:
        kernel, stride, padding, ceil_mode = self.window()
        return nn.MaxPool2d(kernel, stride, padding, ceil_mode=ceil_mode)

    def avg_pool(self) -> nn.Module:
        include = self.rng.random() < 0.5
        return nn.AvgPool2d(*self.window(), count_include_pad=include)

    def slice(self) -> nn.Module:
        channels, height, _ = self.shape
        first = self.rng.randint(0, channels - 1)
        last = self.rng.randint(first + 1, channels)
        step = self.rng.randint(1, 2) if height > 2 else 1
        return Function(lambda x: x[:, first:last, ::step])

    def pad(self) -> nn.Module:
        widths = tuple(self.rng.randint(0, 2) for _ in range(self.rng.choice((4, 6))))
        return Function(lambda x: F.pad(x, widths))

    def gate(self) -> nn.Module:
        """Squeeze and excitation, or a product or difference of two branches."""
        channels = self.shape[0]
        if self.rng.random() < 0.6:
            small = [nn.Conv2d(channels, 4, 1), self.activation(), nn.Conv2d(4, channels, 1)]
            gates = [nn.Sigmoid(), nn.Hardsigmoid()]
            return Gate(nn.Sequential(nn.AdaptiveAvgPool2d(1), *small, self.rng.choice(gates)))
        return Gate(self.branch(channels), difference=self.rng.random() < 0.3)

    def norm(self) -> nn.Module:
        """A batch norm by itself, or a factor and a summand for each channel."""
        channels = self.shape[0]
        if self.rng.random() < 0.3:
            return Scale(self.normal((channels, 1, 1)), float(self.normal(())))
        return nn.Sequential(nn.BatchNorm2d(channels), self.activation())

    def shuffle(self) -> nn.Module:
        channels, height, width = self.shape
        groups = self.rng.choice([g for g in range(1, channels + 1) if channels % g == 0])

        def call(x: Tensor) -> Tensor:
            x = x.view(x.shape[0], groups, channels // groups, height, width)
            return x.transpose(1, 2).reshape(x.shape[0], channels, height, width)

        return Function(call)

    def upsample(self) -> nn.Module:
        factor = 2 if max(self.shape[1:]) <= 12 else 1
        return nn.Upsample(scale_factor=factor)

    def adaptive(self) -> nn.Module:
        size = (self.rng.randint(2, 7), self.rng.randint(2, 7))
        return nn.AdaptiveAvgPool2d(size)

    def head(self) -> list[nn.Module]:
        rng, (channels, height, width) = self.rng, self.shape
        pool: list[nn.Module] = [
            rng.choice(
                [
                    nn.AdaptiveAvgPool2d(1),
                    Function(lambda x: x.mean((2, 3), keepdim=True)),
                    nn.Identity(),
                ]
            )
        ]
        features = channels * (height * width if isinstance(pool[0], nn.Identity) else 1)
        pool.append(nn.Flatten())
        if rng.random() < 0.4:
            hidden = rng.randint(2, 8)
            norm = nn.BatchNorm1d(hidden) if rng.random() < 0.5 else nn.Identity()
            pool += [nn.Linear(features, hidden, bias=rng.random() < 0.5), norm, self.activation()]
            features = hidden
        return [*pool, nn.Linear(features, CLASSES, bias=rng.random() < 0.7)]

    # -- numbers -------------------------------------------------------------------------------

    @torch.no_grad()
    def fill(self, network: nn.Module) -> None:
        """Weights and statistics as odd as real ones: dead and negative channels, wide ranges."""
        for module in network.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                weight = self.normal(module.weight.shape)
                rows = weight.flatten(1)
                rows *= (
                    torch.exp(self.spread * self.normal((len(rows), 1))) / rows[0].numel() ** 0.5
                )
                if self.rng.random() < 0.2:
                    rows[self.rng.randrange(len(rows))] = 0.0  # pruned
                module.weight.copy_(rows.reshape(weight.shape))
                if module.bias is not None:
                    module.bias.copy_(self.normal(module.bias.shape))
            elif isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
                size = (module.num_features,)
                assert module.running_mean is not None
                assert module.running_var is not None
                module.running_mean.copy_(0.5 * self.normal(size))
                module.running_var.copy_(torch.exp(self.spread * self.normal(size)))
                if module.affine:
                    gamma = 1.0 + self.normal(size)  # a sixth is negative
                    gamma[self.rng.randrange(size[0])] = self.rng.choice((0.0, -0.0, 1e-12, -0.5))
                    if self.rng.random() < 0.05:
                        gamma.zero_()
                    module.weight.copy_(gamma)
                    module.bias.copy_(0.5 * self.normal(size))

    def normal(self, size: Sequence[int]) -> Tensor:
        return torch.randn(tuple(size), generator=self.generator)


def random_network(
    seed: int, spread: float = 0.7, quantizer: str = "lsq"
) -> tuple[nn.Module, BitPlan, Tensor]:
    """A network in float, bits for each of its layers, and images [N, C, H, W].

    ``spread`` is the standard deviation of the logarithm of a channel's size.
    """
    maker = Maker(seed, spread)
    images = maker.normal((4, *maker.shape))
    network = maker.network()
    rng = maker.rng
    products = [n for n, m in network.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    # Thresholds are for few bits, and grids without zero for fewer.
    drawn = range(1, {"n2uq": 5, "auto": 4}.get(quantizer, 9))
    overrides = [(name, rng.choice(drawn), rng.choice(drawn)) for name in products]
    if rng.random() < 0.2:  # a layer in float, or with float weights
        odd = rng.randrange(len(products))
        overrides[odd] = (products[odd], 32, rng.choice((2, 8, 32)))
    plan = BitPlan(
        wbits=rng.choice(drawn),
        abits=32 if rng.random() < 0.05 else rng.choice(drawn),
        residual_bits=32 if rng.random() < 0.1 else 8,
        quantizer=quantizer,
        overrides=overrides,
    )
    return network, plan, images
