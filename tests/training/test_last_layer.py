"""The last layer that is fitted: the least of its loss, and only where it makes the outputs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mecq_cli.training.last_layer import fit, inputs_of, last_layer


def clusters(images: int, classes: int = 3, spread: float = 0.7) -> tuple[Tensor, Tensor]:
    """Features of very different sizes, around a middle for each class."""
    generator = torch.Generator().manual_seed(images)
    labels = torch.arange(images) % classes
    middles = 3.0 * torch.eye(classes, 6)
    rows = middles[labels] + spread * torch.randn(images, 6, generator=generator)
    return rows * torch.tensor([1e-3, 1.0, 1e3, 1.0, 1.0, 0.0]) + 5.0, labels


def test_it_knows_images_that_it_was_not_fitted_to() -> None:
    weight, bias = fit(*clusters(300), 3)
    features, labels = clusters(500)
    right = ((features @ weight.mT + bias).argmax(1) == labels).float().mean()
    assert right > 0.97
    assert torch.isfinite(weight).all()
    assert not weight[:, 5].any()  # that feature is the same in all images


@pytest.mark.parametrize("bias", [True, False])
def test_it_is_where_the_loss_of_scikit_learn_is_least(bias: bool) -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    features, labels = clusters(40, spread=2.0)  # too few to choose the penalty
    rows = features - features.mean(0) if bias else features
    rows = rows / rows.square().mean(0).sqrt().clamp_min(1e-3)
    # Its C is the inverse of the penalty of the sum, ours is that of the mean.
    model = linear_model.LogisticRegression(
        C=1 / (0.01 * 40), tol=1e-8, max_iter=1000, fit_intercept=bias
    )
    model.fit(rows.numpy(), labels.numpy())
    weight, offset = fit(features, labels, 3, bias=bias)
    expected = torch.from_numpy(model.predict_log_proba(rows.numpy())).float()
    got = F.log_softmax(features @ weight.mT + offset, 1)
    torch.testing.assert_close(got, expected, atol=5e-3, rtol=0)
    assert bool(offset.any()) is bias


def test_a_class_without_images_is_never_the_answer() -> None:
    features, labels = clusters(90)
    weight, bias = fit(features, labels, 5)
    assert weight.shape == (5, 6)
    assert int((features @ weight.mT + bias).argmax(1).max()) < 3


def test_images_that_are_all_the_same() -> None:
    weight, bias = fit(torch.ones(60, 4), torch.arange(60) % 2, 2)
    assert torch.isfinite(weight).all()
    assert torch.isfinite(bias).all()


class Pooling(nn.Module):
    """A network whose last layer is looked for, with what may come behind it."""

    def __init__(self, behind: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
        self.head, self.behind = nn.Linear(4, 2), behind

    def forward(self, x: Tensor) -> Tensor:
        return self.behind(self.head(self.body(x).mean((2, 3))))  # type: ignore[no-any-return]


def test_the_inputs_of_the_layer_that_makes_the_outputs() -> None:
    images = torch.rand(6, 3, 8, 8)
    net = Pooling(nn.Identity())
    layer = last_layer(net, ["head"])
    assert layer is net.head
    found = inputs_of(net, layer, images.split(4))
    assert found is not None
    torch.testing.assert_close(net.head(found), net(images))
    other = Pooling(nn.Softmax(1))
    assert inputs_of(other, other.head, images.split(4)) is None
    assert last_layer(net, ["head", "body"]) is None
    assert last_layer(net, ["body"]) is None
