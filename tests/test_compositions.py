"""Operations that are made of others: read as such, computed as PyTorch does, and exported."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mecq_cli.capture import capture
from mecq_cli.errors import UsageError
from mecq_cli.insertion import BitPlan, insert
from mecq_cli.sites import DropoutSite
from tests.exactness import random_images, taken_all_the_way
from tests.test_capture import Lambda, Net

SHAPE = (3, 12, 16)


class Placed(nn.Module):
    """A convolution, what a test wants, and a head that knows where each value is."""

    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        self.stem, self.middle = nn.Conv2d(3, 8, 3, padding=1), middle
        with torch.no_grad():
            size = self.middle.eval()(torch.zeros(2, 8, *SHAPE[1:]))[0].numel()
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(size, 4))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.middle(self.stem(x)))
        return logits


class With(nn.Module):
    """A function of a value and parameters."""

    def __init__(self, function: Callable[..., Tensor], *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.function = function
        self.parameter = nn.ParameterList(
            nn.Parameter(1.5 + torch.rand(s, generator=torch.Generator().manual_seed(0)))
            for s in shapes
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self.parameter)


class InContexts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            scaled: Tensor = self.inside(x) * 2
            x = scaled.sigmoid()
        with torch.autocast("cpu", enabled=False):
            return x + scaled


def _partly_changed(change: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x = x * 1.5
    change(x[:, :4])
    return x


CHANGES: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda part: part.mul_(3.0),
    lambda part: part.add_(1.0, alpha=0.5),
    lambda part: part.sub_(torch.ones(4, 1, 1)),
    F.celu_,
    F.selu_,
)


def _mean(x: Tensor) -> Tensor:
    return x.mean((2, 3), keepdim=True)


CASES: dict[str, nn.Module] = {
    "PReLU of channels": nn.PReLU(8),
    "SELU": nn.SELU(),
    "SELU in place": nn.SELU(inplace=True),
    "CELU": nn.CELU(0.7),
    "CELU in place": nn.CELU(0.7, inplace=True),
    "GLU": nn.GLU(1),
    "log sigmoid": nn.LogSigmoid(),
    "softshrink": nn.Softshrink(0.2),
    "threshold": nn.Threshold(0.1, 0.1),
    "tanhshrink": nn.Tanhshrink(),
    "absolute values": Lambda(lambda x: x.abs()),
    "dropped channels": nn.Dropout2d(0.2),
    "maximum of the plane": Lambda(lambda x: x * x.amax((2, 3), keepdim=True)),
    "maximum of the channels": Lambda(lambda x: x * x.max(1, keepdim=True)[0]),
    "minimum of rows": Lambda(lambda x: x + x.amin(3, keepdim=True)),
    "maximum of all values": Lambda(lambda x: x * x.amax((1, 2, 3), keepdim=True)),
    "maximum of two": Lambda(lambda x: torch.maximum(x[:, :4], x[:, 4:])),
    "minimum of two": Lambda(lambda x: torch.minimum(x[:, :4], x[:, 4:])),
    "adaptive maxima": nn.AdaptiveMaxPool2d((4, 8)),
    "pixel shuffle": nn.PixelShuffle(2),
    "pixel unshuffle": nn.PixelUnshuffle(2),
    "channel shuffle": nn.ChannelShuffle(4),
    "expand": Lambda(lambda x: torch.cat([x, _mean(x).expand(-1, -1, 12, 16)], 1)),
    "expand along rows": Lambda(lambda x: torch.cat([x, x[..., :1].expand_as(x)], 1)),
    "repeat": Lambda(lambda x: torch.cat([x, _mean(x).repeat(1, 1, 12, 16)], 1)),
    "expand, times a number": Lambda(lambda x: x * (_mean(x).expand(-1, -1, 12, 16) * 2.0)),
    "expand, and a number": Lambda(lambda x: x[:, :1].expand(-1, 8, -1, -1) + 1.0),
    "expand, times a weight": With(lambda x, p: _mean(x).expand(-1, -1, 12, 16) * p, (8, 1, 1)),
    "expand both": Lambda(lambda x: _mean(x).expand_as(x) * x[:, :1].expand(-1, 8, -1, -1)),
    "repeat channels of a point": Lambda(lambda x: _mean(x).repeat(1, 2, 1, 1)),
    "repeat channels": Lambda(lambda x: x.repeat(1, 2, 1, 1)),
    "repeat each": Lambda(lambda x: x.repeat_interleave(2, dim=1)),
    "add with a factor": Lambda(lambda x: torch.add(x, x.relu(), alpha=0.5)),
    "add with a factor in place": Lambda(lambda x: (x * 1.5).add_(x.relu(), alpha=0.5)),
    "sub with a factor in place": Lambda(lambda x: (x * 1.5).sub_(x.relu(), alpha=0.5)),
    "sub with a factor": Lambda(lambda x: torch.sub(x, x.relu(), alpha=0.5)),
    "addcmul with a factor": Lambda(lambda x: torch.addcmul(x, x, x.sigmoid(), value=0.3)),
    "sum of rows": Lambda(lambda x: x + x.sum(3, keepdim=True)),
    "sum of the plane": Lambda(lambda x: x * x.sum((2, 3))[..., None, None]),
    "RMS norm": Lambda(lambda x: F.rms_norm(x, (16,), eps=1e-3)),
    "RMS norm with a weight": With(lambda x, p: F.rms_norm(x, (16,), p), (16,)),
    "less a weight": With(lambda x, p: x - p, (8, 1, 1)),
    "a weight less it": With(lambda x, p: p - x, (8, 1, 1)),
    "rsub with a weight": With(lambda x, p: torch.rsub(x, p), (8, 1, 1)),
    "one channel, several gains": With(lambda x, p: x[:, :1] * p, (8, 1, 1)),
    "divided by a weight in place": With(lambda x, p: (x * 1.5).div_(p), (8, 1, 1)),
    "divided by a weight": With(lambda x, p: x / p, (8, 1, 1)),
    "value @ weight": With(lambda x, p: x @ p, (16, 16)),
    "weight @ value": With(lambda x, p: p @ x, (12, 12)),
    "addmm": With(lambda x, p, b: torch.addmm(b, x.mean((2, 3)), p)[..., None, None], (8, 8), (8,)),
    "einsum with a weight": With(lambda x, p: torch.einsum("nchw,cd->ndhw", x, p), (8, 8)),
    "einsum": Lambda(lambda x: torch.einsum("nchw,nchv->ncwv", x, x.sigmoid())),
    "movedim": Lambda(lambda x: x.movedim(1, -1).sigmoid().moveaxis(-1, 1)),
    "narrow": Lambda(lambda x: x.narrow(1, 0, 4) * x.narrow(1, 4, 4)),
    "tensor_split": Lambda(lambda x: torch.cat(torch.tensor_split(x, 3, 1)[::-1], 1)),
    "contexts": InContexts(),
    "transposed, stride 2 of 2": nn.ConvTranspose2d(8, 8, 2, 2),
    "transposed, stride 2 of 4": nn.ConvTranspose2d(8, 8, 4, 2, 1),
    "transposed, stride 2 of 3": nn.ConvTranspose2d(8, 8, 3, 2, 1, 1),
    "transposed, stride 1": nn.ConvTranspose2d(8, 8, 3, 1, 1),
    "transposed, dilated": nn.ConvTranspose2d(8, 8, 3, 2, 2, 1, dilation=2),
    "transposed, groups": nn.ConvTranspose2d(8, 8, 4, 2, 1, groups=2),
    "transposed, much padding": nn.ConvTranspose2d(8, 8, 3, 2, 3, groups=4, bias=False),
    "transposed, of sides": nn.ConvTranspose2d(8, 8, (4, 3), (2, 3), (1, 0)),
    "log softmax": nn.LogSoftmax(1),
}


@pytest.mark.parametrize("name", CASES)
def test_a_composed_operation_is_what_pytorch_computes(name: str) -> None:
    torch.manual_seed(0)
    net = Placed(CASES[name]).eval()
    images = torch.randn(3, *SHAPE)
    plain = insert(net, SHAPE, BitPlan(32, 32)).train()
    dropped = [site for site in plain.sites() if isinstance(site, DropoutSite)]
    assert [site.axes for site in dropped] == ([2] if "dropped" in name else [])
    for site in dropped:
        site.eval()
    torch.testing.assert_close(plain(images), net(images), rtol=1e-4, atol=1e-5)


def test_a_layer_that_is_run_twice_has_one_weight() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.ConvTranspose2d(8, 8, 2, 2)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.up(self.up(x).sigmoid())
            return y

    first, second = (
        layer.module
        for layer in capture(Placed(Twice()), SHAPE)
        if layer.name.startswith("middle") and layer.kind == "conv2d"
    )
    assert isinstance(first, nn.Conv2d)
    assert isinstance(second, nn.Conv2d)
    assert first.weight is second.weight
    assert first.bias is second.bias


def test_a_weight_of_many_steps_is_computed() -> None:
    def steps(x: Tensor, weight: Tensor) -> Tensor:
        for _ in range(40):
            weight = weight * weight.sigmoid()
        return F.linear(x, weight)

    layers = capture(Placed(With(steps, (16, 16))), SHAPE)
    assert [layer.kind for layer in layers] == ["conv2d", "linear", "flatten", "linear"]


@pytest.mark.parametrize(
    "middle",
    [nn.ConvTranspose2d(8, 8, 2, 2), nn.ConvTranspose2d(8, 8, 3, 2, 1, 1), CASES["value @ weight"],
     CASES["less a weight"], CASES["a weight less it"]],
)  # fmt: skip
def test_frozen_weights_stay_frozen(middle: nn.Module) -> None:
    net = Placed(deepcopy(middle))
    model = insert(net, SHAPE, BitPlan(4, 4))
    ends = (".site.weight", ".site.bias")
    middle_of = [(n, p) for n, p in model.named_parameters() if n.endswith(ends) and ".middle" in n]
    assert any(p.requires_grad for _, p in middle_of)
    plain = insert(net.requires_grad_(False), SHAPE, BitPlan(4, 4))
    trained = {n for n, p in plain.named_parameters() if p.requires_grad}
    assert not {n for n in trained if n.endswith(ends)}


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Lambda(lambda x: x + x.max(1, keepdim=True)[1].float()), "layer middle.0: .* max.dim"),
        (nn.InstanceNorm2d(8), r"layer middle.0: .*statistics .*\(a part of instance_norm"),
        (nn.Softsign(), "layer middle.0: this division"),
        (nn.Threshold(0.5, 0.0), "layer middle.0: the operation threshold"),
        (nn.AdaptiveMaxPool2d(5), "layer middle.0: the operation adaptive_max_pool2d"),
        (Lambda(lambda x: x.flip(3)), "layer middle.0: the operation flip"),
        (Lambda(lambda x: x.repeat(1, 1, 9, 1)), "layer middle.0: the operation repeat"),
        (
            Lambda(lambda x: torch.cat([x, x.repeat(1, 0, 1, 1)], 1)),
            "layer middle.0: the operation repeat",
        ),
        (Lambda(lambda x: x / x.shape[0]), "layer middle.0: this division"),
        (Lambda(lambda x: x + (x > 0).sum((2, 3), True)), "layer middle.0: the operation"),
        (
            Lambda(lambda x: x * x.flatten(1).amax(1)[:, None, None, None]),
            "layer middle.0.*: a single number for each image",
        ),
        (
            Lambda(lambda x: x.transpose(0, 1)[:1].expand(8, -1, -1, -1).sigmoid().transpose(0, 1)),
            "layer middle.0: ",
        ),
        (
            With(lambda x, p: F.linear(x, p)[..., None], (16,)),
            "layer middle.0: a linear layer of one row",
        ),
        *(
            (Lambda(partial(_partly_changed, change)), "layer middle.0: .* changes a part")
            for change in CHANGES
        ),
    ],
)
def test_what_cannot_be_composed_is_refused_by_its_own_name(
    module: nn.Module, message: str
) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        capture(Net(module), SHAPE)
    assert "\n" not in str(caught.value)


class Decoder(nn.Module):
    """A U with transposed convolutions, maps of positions, attention by maxima, log softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.PReLU(8))
        self.down = nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(8, 16, 3, padding=1), nn.SELU())
        self.up = nn.ConvTranspose2d(16, 8, 2, 2)
        self.wide = nn.Sequential(
            nn.ConvTranspose2d(16, 8, 3, 2, 1, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU()
        )
        self.gate = nn.Conv2d(2, 1, 3, padding=1)
        self.places, self.mask = nn.Parameter(torch.randn(8, 8, 8)), nn.Parameter(torch.rand(8, 8))
        self.drop, self.mix = nn.Dropout2d(0.1), nn.Conv2d(24, 16, 3, padding=1)
        self.head = nn.Sequential(nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(8, 5))

    def forward(self, x: Tensor) -> Tensor:
        top = self.stem(x)
        low = self.down(top)
        low = torch.cat([low[:, :8] + self.places, low[:, 8:] * self.mask], 1)
        top = torch.cat([top, self.up(low).abs(), self.wide(low)], 1)
        planes = [top.amax(1, keepdim=True), top.mean(1, keepdim=True)]
        top = self.drop(self.mix(top * self.gate(torch.cat(planes, 1)).sigmoid()))
        logits = self.head(torch.maximum(*top.chunk(2, 1)))
        return F.log_softmax(logits, dim=1)


@pytest.mark.parametrize("plan", [BitPlan(8, 8), BitPlan(2, 4), BitPlan(1, 2, quantizer="auto")])
def test_composed_operations_go_all_the_way(plan: BitPlan, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network, images = Decoder().eval(), random_images(4, 16)
    model, error = taken_all_the_way(network, plan, images, tmp_path)
    assert torch.allclose(model(images).exp().sum(1), torch.ones(4))
    if plan.wbits == 8:
        assert error < 0.1
