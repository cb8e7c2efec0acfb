"""Modules as people write them, which no library has: all the way, and compared at the end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import TensorDataset

import mecq_cli
from mecq_cli.config import QuantizeConfig
from mecq_cli.export import safetensors
from mecq_cli.models.order import channels_last
from mecq_cli.models.preprocessing import Preprocessing
from mecq_cli.workflow.api import Quantized
from mecq_cli.workflow.own_module import load_module

Forward = Callable[[Any, Tensor], Tensor]

CLASSES = 4


class Net(nn.Module):
    """A forward as a function of the module."""

    def __init__(self, forward: Forward, **parts: Any) -> None:
        super().__init__()
        self.call = forward
        for name, part in parts.items():
            if isinstance(part, nn.Module):
                self.add_module(name, part)
            else:
                setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self, x)


def conv(inputs: int, outputs: int, kernel: int = 3, **more: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **more)


def head(inputs: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, CLASSES)]


def pooled(net: Any, x: Tensor) -> Tensor:
    logits: Tensor = net.last(x.mean((2, 3)))
    return logits


def viewed(net: Any, x: Tensor) -> Tensor:
    x = nn.functional.max_pool2d(torch.relu(net.c(x)), 4)
    logits: Tensor = net.last(x.view(x.size(0), -1))
    return logits


class Attending(nn.Module):
    """Asks for the weights of the attention, as one does by default, and reads none."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, 4)
        self.norm = nn.LayerNorm(16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.last = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        y = self.norm(x)
        logits: Tensor = self.last((x + self.attention(y, y, y)[0]).mean(1))
        return logits


class Embedding(nn.Module):
    """A linear layer of a name of its own, beside position embeddings."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, 4)
        self.positions = nn.Parameter(torch.randn(1, 16, 16) / 10)
        self.name = name
        self.norm = nn.LayerNorm(16)
        self.add_module(name, nn.Linear(16, 16))
        self.last = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        logits: Tensor = self.last((x + torch.relu(getattr(self, self.name)(self.norm(x)))).mean(1))
        return logits


def named(name: str) -> nn.Module:
    parts = {name: conv(3, 8), "last": nn.Linear(8, CLASSES)}
    return Net(lambda s, x: pooled(s, torch.relu(getattr(s, name)(x))), **parts)


def frozen(net: nn.Module) -> nn.Module:
    return net.requires_grad_(False)


def reading_image(forward: Forward, channels: int, last: int) -> Net:
    return Net(forward, c=conv(3, channels), last=nn.Linear(last, CLASSES))


def scaled_image() -> Net:
    return Net(
        lambda s, x: s.last(s.norm(torch.relu(s.c(x * s.gain)).mean((2, 3)))),
        c=conv(3, 8), norm=nn.LayerNorm(8), last=nn.Linear(8, CLASSES),
        gain=nn.Parameter(torch.rand(1, 3, 1, 1) + 0.5),
    )  # fmt: skip


MODULES: dict[str, Callable[[], nn.Module]] = {
    "flattened by view": lambda: Net(viewed, c=conv(3, 8), last=nn.Linear(128, CLASSES)),
    "no stage, linear": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(768, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, CLASSES)
    ),
    "no stage, convolutions": lambda: nn.Sequential(
        conv(3, 8), nn.ReLU(), conv(8, CLASSES, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    ),
    "one layer": lambda: nn.Sequential(nn.Flatten(), nn.Linear(768, CLASSES)),
    "image padded": lambda: nn.Sequential(conv(3, 8, padding_mode="circular"), nn.ReLU(), *head(8)),
    "image added": lambda: reading_image(lambda s, x: pooled(s, x + torch.relu(s.c(x))), 3, 3),
    "image joined": lambda: reading_image(
        lambda s, x: pooled(s, torch.cat([x, torch.relu(s.c(x))], 1)), 8, 11
    ),
    "image multiplied": lambda: reading_image(
        lambda s, x: pooled(s, x * torch.sigmoid(s.c(x))), 3, 3
    ),
    "image joined to itself": lambda: reading_image(
        lambda s, x: pooled(s, torch.relu(s.c(torch.cat([x, x], 2)))), 8, 8
    ),
    "image scaled": scaled_image,
    "logarithms of probabilities": lambda: nn.Sequential(
        conv(3, 8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Dropout2d(0.25),
        nn.Flatten(),
        nn.Linear(512, 16),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(16, CLASSES),
        nn.LogSoftmax(1),
    ),
    "transposed convolution": lambda: nn.Sequential(
        conv(3, 8),
        nn.PReLU(8),
        nn.MaxPool2d(2),
        nn.ConvTranspose2d(8, 8, 2, 2),
        nn.SELU(),
        nn.ConvTranspose2d(8, 8, 3, 2, 1, 1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        *head(8),
    ),
    "all frozen": lambda: frozen(nn.Sequential(conv(3, 8), nn.ReLU(), *head(8))),
    "averaged": lambda: AveragedModel(nn.Sequential(conv(3, 8), nn.ReLU(), *head(8))),
    "named input": lambda: named("input"),
    "named logits": lambda: named("logits"),
    "named with colons": lambda: named("a::b"),
    "named batch": lambda: Embedding("batch"),
    "named ones": lambda: Embedding("ones"),
    "attention with weights": Attending,
}


def images(seed: int, shape: Sequence[int] = (3, 16, 16)) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.randn(32, *shape, generator=generator), torch.arange(32) % CLASSES)


def quantized(module: nn.Module, output: Path, **more: Any) -> Quantized:
    settings: dict[str, Any] = {
        "wbits": 4, "abits": 4, "epochs": 1, "batch_size": 16, "workers": 0, "device": "cpu",
        "compile": "off", "output": output,
    }  # fmt: skip
    return mecq_cli.quantize(module.eval(), (images(0), images(1)), **{**settings, **more})


@pytest.mark.parametrize("name", MODULES)
def test_goes_all_the_way(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    result = quantized(MODULES[name](), tmp_path / "run")
    # Compared with the simulator, layer by layer, before it is kept.
    result.export(tmp_path / "model.onnx", images=32, verify=True)


def test_grey_images_flattened_by_view(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Net(viewed, c=conv(1, 8), last=nn.Linear(128, CLASSES)).eval()
    data = images(0, (1, 16, 16)), images(1, (1, 16, 16))
    result = mecq_cli.quantize(
        net, data, wbits=8, abits=8, epochs=0, workers=0, device="cpu", output=tmp_path / "run"
    )
    found = result(data[1].tensors[0])
    with torch.no_grad():
        expected = net(data[1].tensors[0])
    assert float((found - expected).norm() / expected.norm()) < 0.05


def test_a_network_of_several_outputs_may_flatten_by_view() -> None:
    def flattened(net: Any, x: Tensor) -> dict[str, Tensor]:
        maps = net.c(x)
        return {"out": maps.view(len(x), -1).view(maps.shape)}

    plain = Preprocessing((3, 8, 8), (0.0,) * 3, (1.0,) * 3)
    net = Net(flattened, c=conv(3, CLASSES)).eval()  # type: ignore[arg-type]
    loaded = load_module(net, plain, QuantizeConfig(model="m", wbits=4, abits=4, data="d"))
    batch = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        found = channels_last(loaded.module)(batch.to(memory_format=torch.channels_last))
        assert torch.equal(found, net(batch)["out"])


def test_fixed_filters_are_not_trained(tmp_path: Path) -> None:
    blur = torch.tensor([1.0, 2.0, 1.0])
    kernel = (blur[:, None] * blur / 16).expand(3, 1, 3, 3).contiguous()

    class Blurred(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("kernel", kernel.clone())
            self.rest = nn.Sequential(conv(3, 8), nn.ReLU(), *head(8))

        def forward(self, x: Tensor) -> Tensor:
            x = nn.functional.conv2d(x, self.get_buffer("kernel"), padding=1, groups=3)
            logits: Tensor = self.rest(x)
            return logits

    torch.manual_seed(0)
    quantized(Blurred(), tmp_path / "run", wbits=8, abits=8, epochs=2, lr=0.1, mec_weight=0)
    model = safetensors.load(tmp_path / "run" / "model.safetensors")
    (node,) = (n for n in model.nodes if n.op == "conv2d" and n.attributes["groups"] == 3)
    weight = node.tensors["weight"].astype(float)
    largest = weight.max((1, 2, 3), keepdims=True)
    wanted = kernel.numpy() / float(kernel.max())
    assert abs(weight / largest - wanted).max() < 0.06  # they are rounded, and clipped


def test_a_module_that_cannot_be_copied_is_one_line(tmp_path: Path) -> None:
    net = nn.Sequential(conv(3, 8), nn.ReLU(), *head(8))
    net.kept = net(torch.randn(1, 3, 16, 16))  # with its history
    with pytest.raises(mecq_cli.UsageError, match="cannot be copied"):
        quantized(net, tmp_path / "run")
