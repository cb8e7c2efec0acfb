"""Networks that would be read as others are refused, in one line, before they are trained."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mecq_cli.calibration import calibrate
from mecq_cli.errors import UsageError
from mecq_cli.insertion import BitPlan, insert
from mecq_cli.workflow.faithful import require_exportable, require_faithful
from tests.exactness import float_network

SHAPE = (3, 16, 16)
Middle = Callable[["Net", Tensor], Tensor]


class Net(nn.Module):
    """A convolution to 16 channels of 8 x 8, what a test does with it, and a classifier."""

    def __init__(self, middle: Middle) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.more = nn.Conv2d(16, 16, 1)
        self.row = nn.Conv1d(16, 16, 1)
        self.norm = nn.BatchNorm1d(16)
        self.plane = nn.BatchNorm2d(16)
        self.one = nn.Conv2d(16, 1, 1)
        self.gain = nn.Parameter(torch.linspace(0.5, 2.0, 16).reshape(16, 1, 1))
        self.register_buffer("mask", torch.ones(16, 16).tril().triu(-4).bool())
        self.head = nn.Linear(16, 4)
        self.middle = middle

    def forward(self, x: Tensor) -> Tensor:
        y = self.middle(self, self.stem(x))
        y = y.mean((2, 3)) if y.dim() == 4 else y.mean(1) if y.dim() == 3 else y
        logits: Tensor = self.head(y)
        return logits


def network(middle: Middle) -> Net:
    torch.manual_seed(0)
    net = Net(middle).eval()
    for norm in (net.norm, net.plane):
        nn.init.uniform_(norm.weight)
        nn.init.normal_(norm.bias)
        nn.init.normal_(norm.running_mean)  # type: ignore[arg-type]
    return net


def read(module: nn.Module) -> None:
    model = insert(module, SHAPE, BitPlan(4, 4))
    require_faithful(model, module, SHAPE)
    calibrate(model, [torch.randn(4, *SHAPE)], 1)
    require_exportable(model, SHAPE)


def set_part(net: Net, x: Tensor) -> Tensor:
    y: Tensor = net.more(x)
    y[:, :4] = 0
    return y


def add_to_part(net: Net, x: Tensor) -> Tensor:
    y: Tensor = net.more(x)
    y[:, :4] += x[:, :4]
    return y


def copy_part(net: Net, x: Tensor) -> Tensor:
    y: Tensor = net.more(x)
    y[:, :4] = x[:, 4:8]
    return y


def through_a_view(net: Net, x: Tensor) -> Tensor:
    y: Tensor = net.more(x)
    F.relu_(y.flatten(2))
    return y


def tokens(x: Tensor) -> Tensor:
    """[N, 64, 16]"""
    return x.flatten(2).transpose(1, 2)


def norm_of_rows(net: Net, x: Tensor) -> Tensor:
    t = tokens(x)[:, :16]
    return net.norm(t.reshape(-1, 16)).reshape(t.shape)  # type: ignore[no-any-return]


def windows(net: Net, x: Tensor) -> Tensor:
    n, c = x.shape[:2]
    parts = x.reshape(n, c, 2, 4, 2, 4).permute(0, 2, 4, 1, 3, 5).reshape(-1, c, 4, 4)
    return F.interpolate(parts, size=(8, 8)).reshape(n, 4, c, 64).mean((1, 3))


def row_of_windows(net: Net, x: Tensor) -> Tensor:
    n, c = x.shape[:2]
    parts = x.flatten(2).reshape(n, c, 4, 16).transpose(1, 2).reshape(-1, c, 16)
    return net.row(parts).reshape(n, 4, c, 16).mean((1, 3))  # type: ignore[no-any-return]


def masked(net: Net, x: Tensor) -> Tensor:
    t = tokens(x)[:, :16].unsqueeze(1)
    return F.scaled_dot_product_attention(t, t, t, attn_mask=net.mask).squeeze(1)  # type: ignore[arg-type]


WRONG: list[tuple[Middle, str]] = [
    (set_part, "fill_"),
    (add_to_part, "add_.Tensor changes a part of a value in place"),
    (copy_part, "copy_.default changes a part of a value in place"),
    (through_a_view, "relu_.default changes a part of a value in place"),
    (norm_of_rows, "does not compute the same"),
    (windows, "of which the first axis is not that of the images"),
    (row_of_windows, "of which the first axis is not that of the images"),
    (masked, "a mask of true and false"),
    (lambda net, x: net.more(x / x.norm(dim=1, keepdim=True).clamp(1e-6, 0.5)), "lower bound"),
    (lambda net, x: net.more(x / x.norm(dim=1, keepdim=True).clamp(min=1.0)), "lower bound"),
    (lambda net, x: net.more(F.pad(x, (1, 1, 1, 1, 2, 2, 2, 2))[2:-2, 2:-2]), "can be padded"),
    (lambda net, x: F.pad(tokens(x), (0, 0, 1, 0)), "what can be padded is [C, H, W]"),
]


@pytest.mark.parametrize(("middle", "words"), WRONG, ids=range(len(WRONG)))
def test_what_would_be_another_network_is_refused(middle: Middle, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        read(network(middle))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_cannot_be_run_is_refused() -> None:
    net = network(lambda net, x: tokens(x))
    with pytest.raises(UsageError, match="cannot be run"):
        require_faithful(insert(net, SHAPE, BitPlan(4, 4)), net, (3, 32, 32))


def whole_in_place(net: Net, x: Tensor) -> Tensor:
    y: Tensor = net.more(x)
    y.mul_(2.0)
    y += x
    return F.relu_(y)


RIGHT: list[Middle] = [
    whole_in_place,
    lambda net, x: torch.softmax(torch.roll(net.more(x), 2, 1) * net.gain, 1),
    lambda net, x: F.pad(net.more(x), (1, 1, 0, 0, 0, 0)),
    lambda net, x: net.more(x / x.norm(dim=1, keepdim=True).clamp_min(1e-6)),
    lambda net, x: net.plane(net.one(x) * net.gain + net.more(x)),
    lambda net, x: F.avg_pool2d(F.avg_pool2d(net.more(x), 8), 2, ceil_mode=True),
]


@pytest.mark.parametrize("middle", RIGHT, ids=range(len(RIGHT)))
def test_what_is_the_same_is_taken(middle: Middle) -> None:
    read(network(middle))


@pytest.mark.parametrize("name", ["resnet20_cifar", "mobilenetv2_050", "vit_tiny_patch16_224"])
def test_known_networks_are_read_rightly(name: str) -> None:
    size = 224 if "vit" in name else 32
    module = float_network(name, size)
    require_faithful(insert(module, (3, size, size), BitPlan(2, 2)), module, (3, size, size))
