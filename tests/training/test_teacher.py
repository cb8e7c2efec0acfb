"""The frozen FP network: the same function as the network it comes from, which stays as it is."""

from __future__ import annotations

import torch
from torch import nn

from mecq_cli.training.teacher import Teacher


class Small(nn.Module):
    """Batch norms behind convolutions with and without bias and a linear layer; dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.bn2 = nn.BatchNorm2d(8, eps=1e-3)
        self.hidden = nn.Linear(8, 12)
        self.bn3 = nn.BatchNorm1d(12)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.conv2(x)) + x)
        x = torch.relu(self.bn3(self.hidden(x.mean((2, 3)))))
        logits: torch.Tensor = self.fc(self.drop(x))
        return logits


def test_the_teacher_is_the_network_in_evaluation() -> None:
    torch.manual_seed(0)
    network = Small()
    with torch.no_grad():
        for norm in (
            m for m in network.modules() if isinstance(m, nn.BatchNorm2d | nn.BatchNorm1d)
        ):
            norm.weight.normal_()  # negative ones too
            norm.bias.normal_()
            assert norm.running_mean is not None
            assert norm.running_var is not None
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.1, 3.0)
    network.eval().requires_grad_(False)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    teacher = Teacher(network, (3, 16, 16), ["penultimate"])
    images = torch.randn(6, 3, 16, 16)
    for _ in range(2):  # a second time: nothing was learned from the first
        logits, rows = teacher(images)
        torch.testing.assert_close(logits, network(images), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(network.fc(rows), logits, rtol=1e-4, atol=1e-4)
    after = network.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert not any(p.requires_grad for p in teacher.parameters())


class Scaled(nn.Module):
    """Constants and norms without parameters become tensors of the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.LayerNorm(8, elementwise_affine=False)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        x = x * 0.17 + torch.relu(x)
        logits: torch.Tensor = self.fc(self.norm(x.flatten(2).mT).mean(1) * 0.5)
        return logits


def test_all_of_the_teacher_is_where_the_network_is() -> None:
    network = Scaled().eval().to("meta")
    teacher = Teacher(network, (3, 16, 16), ["penultimate"])
    places = {name: t.device.type for name, t in teacher.state_dict().items()}
    assert set(places.values()) == {"meta"}, places
