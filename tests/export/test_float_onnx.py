"""The float file against the model itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from mecq_cli.export.float_onnx import float_onnx
from mecq_cli.export.ort import OrtRunner
from tests.exactness import float_network, random_images
from tests.test_functions import Functions
from tests.token_networks import NETWORKS, network


class Tokens(nn.Module):
    """Linear layers on tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.inner, self.head = nn.Linear(8, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        logits: Tensor = self.head(torch.relu(self.inner(x)).mean(1))
        return logits


class Everything(nn.Module):
    """Every layer that a file may hold."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU6())
        self.depthwise = nn.Conv2d(8, 8, 3, padding="same", dilation=2, groups=8, bias=False)
        self.ceiled = nn.MaxPool2d(3, 2, 1, ceil_mode=True)
        self.counted = nn.AvgPool2d(3, 2, 1)
        self.uncounted = nn.AvgPool2d(3, 2, 1, count_include_pad=False)
        self.drop = nn.Dropout(0.5)
        self.adaptive = nn.Sequential(nn.Upsample(scale_factor=2), nn.AdaptiveAvgPool2d((3, 5)))
        self.head = nn.Linear(22, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.relu(x + self.depthwise(nn.functional.pad(x, (1, 0, 0, 1)))[:, :, :-1, 1:])
        y = nn.functional.pad(self.counted(x), (0, 0, 0, 0, 1, 1))
        y = torch.cat([self.ceiled(x)[:, ::2, :4, :4], y, self.uncounted(x)], 1)
        y = self.adaptive(y).transpose(2, 3)
        logits: Tensor = self.head(self.drop(y.mean((2, 3))))
        return logits


NAMES = ("mobilenetv2_035", "torchvision/squeezenet1_1", "torchvision/shufflenet_v2_x0_5")


@pytest.mark.parametrize(
    "name", ["everything", "functions", "tokens", *NAMES, "ghostnetv2_100", *NETWORKS]
)
def test_it_computes_what_the_model_does(name: str, tmp_path: Path) -> None:
    made = {"everything": Everything, "functions": Functions, "tokens": Tokens}
    size = 16 if name in made else 8 if name in NETWORKS else 64
    torch.manual_seed(0)
    if name in NETWORKS:
        model = network(name).eval()
    else:
        model = (made[name]() if name in made else float_network(name, size)).eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    images = random_images(3, size)
    proto = float_onnx(model, (3, size, size))
    assert "BatchNormalization" not in {node.op_type for node in proto.graph.node}
    assert not model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    onnx.save_model(proto, tmp_path / "float.onnx")
    runner = OrtRunner(tmp_path / "float.onnx", allow_foreign=True)
    with torch.no_grad():
        wanted = model(images).numpy()
    assert np.ptp(wanted) > 0.01
    np.testing.assert_allclose(runner.run(images.numpy()), wanted, atol=1e-4 * np.abs(wanted).max())
