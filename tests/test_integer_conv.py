"""Convolutions of integers in training: the same values and gradients as those of floats."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mecq_cli.calibration import calibrate
from mecq_cli.insertion import BitPlan, insert
from mecq_cli.integer_conv import Geometry, conv2d, is_available, windows_see_pixels

pytestmark = pytest.mark.skipif(not is_available(), reason="this CPU has no VNNI")


@given(
    channels=st.integers(1, 20),
    outputs=st.integers(1, 20),
    kernel=st.sampled_from([1, 2, 3, 5]),
    stride=st.integers(1, 2),
    padding=st.integers(0, 2),
    dilation=st.integers(1, 2),
    zero_point=st.sampled_from([0, 3, 128, 255]),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=60, deadline=None)
def test_values_and_gradients(
    channels: int, outputs: int, kernel: int, stride: int, padding: int, dilation: int,
    zero_point: int, seed: int,
) -> None:  # fmt: skip
    assume(windows_see_pixels((kernel,), (padding,), (dilation,)))
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (2, channels, 11, 12), generator=generator)
    integers = torch.randint(-128, 128, (outputs, channels, kernel, kernel), generator=generator)
    scale, steps = torch.tensor(0.0625), torch.rand(outputs, generator=generator) + 0.01
    x = ((codes - zero_point) * scale).to(memory_format=torch.channels_last)
    weight = integers * steps.view(-1, 1, 1, 1)
    geometry = Geometry((stride, stride), (padding, padding), (dilation, dilation))
    a, b = (x.clone().requires_grad_() for _ in range(2))
    v, w = (weight.clone().requires_grad_() for _ in range(2))
    ours = conv2d(a, scale, zero_point, v, steps, geometry)
    theirs = F.conv2d(b.double(), w.double(), None, stride, padding, dilation)
    # Exact sums; only the scales and the rounding to float32 are left.
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=2e-3)
    upstream = torch.randn(ours.shape, generator=generator)
    ours.backward(upstream)
    theirs.backward(upstream.double())
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(v.grad, w.grad, rtol=1e-4, atol=1e-2)


def test_bfloat16_comes_out_rounded_once() -> None:
    torch.manual_seed(0)
    codes, integers = torch.randint(0, 4, (2, 8, 9, 9)), torch.randint(-2, 2, (6, 8, 3, 3))
    x, weight = codes * 0.5, integers * 0.25
    geometry = Geometry((1, 1), (1, 1), (1, 1))
    steps = torch.full((6,), 0.25)
    ours = conv2d(x.bfloat16(), torch.tensor(0.5), 0, weight, steps, geometry)
    assert ours.dtype == torch.bfloat16
    assert torch.equal(ours, F.conv2d(x, weight, None, 1, 1).bfloat16())


class Small(nn.Module):
    """The second convolution is fed by dropout, the third one is depthwise."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.third = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.fourth = nn.Conv2d(8, 8, 3, stride=2)
        self.norm = nn.BatchNorm2d(8)
        self.dropout = nn.Dropout(0.5)
        self.classifier = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        x = F.max_pool2d(self.dropout(x), 2)
        x = F.relu(self.third(F.relu(self.second(x))))
        x = F.relu(self.norm(self.fourth(x)))
        out: Tensor = self.classifier(x.mean((2, 3)))
        return out


def test_a_network_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = insert(Small(), (3, 16, 16), BitPlan(3, 3))
    images = torch.randn(8, 3, 16, 16).to(memory_format=torch.channels_last)
    calibrate(model, [images], 1)
    model.train()
    assert model.convolve_integers() == 2
    on = {site.name for site in model.sites() if getattr(site, "on_integers", False)}
    assert on == {"first", "fourth"}

    def run() -> tuple[Tensor, list[Tensor]]:
        torch.manual_seed(1)  # dropout
        model.zero_grad()
        logits = model(images)
        logits.square().sum().backward()
        return logits, [p.grad.clone() for p in model.parameters() if p.grad is not None]

    plain, plain_gradients = run()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    ours, gradients = run()
    torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-3)
    for mine, other in zip(gradients, plain_gradients, strict=True):
        torch.testing.assert_close(
            mine, other, rtol=1e-2, atol=1e-4 + 1e-2 * float(other.abs().max())
        )
