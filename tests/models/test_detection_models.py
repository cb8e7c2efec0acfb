"""torchvision's networks that detect: names, weights, classes, sizes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.retinanet import RetinaNet
from torchvision.ops import FrozenBatchNorm2d

from mecq_cli.capture import capture
from mecq_cli.errors import CheckpointError, UsageError
from mecq_cli.models.detection import coco_names, detection_names, outputs_only
from mecq_cli.models.libraries import find, model_names
from mecq_cli.models.loading import load_model

SSDLITE, RETINANET = "ssdlite320_mobilenet_v3_large", "retinanet_resnet50_fpn"


def test_names_sizes_and_preprocessing() -> None:
    assert {SSDLITE, RETINANET, "ssd300_vgg16", "retinanet_resnet50_fpn_v2"} == {*detection_names()}
    assert {*detection_names()} <= {*model_names()}
    found = {name: find(name) for name in detection_names()}
    assert {name: model.preprocessing.input_size[1] for name, model in found.items()} == {
        SSDLITE: 320, "ssd300_vgg16": 300, RETINANET: 800, "retinanet_resnet50_fpn_v2": 800
    }  # fmt: skip
    assert {model.task for model in found.values()} == {"detect"}
    assert {model.num_classes for model in found.values()} == {91}
    assert found[SSDLITE].preprocessing.mean == (0.5, 0.5, 0.5)
    assert found["ssd300_vgg16"].preprocessing.std == pytest.approx((1 / 255,) * 3)
    assert coco_names()[:3] == ("__background__", "person", "bicycle")
    with pytest.raises(UsageError, match="two stages or without anchors"):
        find("torchvision/fcos_resnet50_fpn")


@pytest.mark.parametrize("name", [SSDLITE, RETINANET])
def test_weights_of_torchvision_s_own_module_fit(name: str, tmp_path: Path) -> None:
    """As torchvision's training saves them; how many classes they have is found from them."""
    torch.manual_seed(0)
    library = torchvision.models.get_model(
        name, weights=None, weights_backbone=None, num_classes=5
    ).eval()
    torch.save(library.state_dict(), tmp_path / "float.pth")
    loaded = load_model(name, checkpoint=tmp_path / "float.pth", img_size=128)
    assert (loaded.num_classes, loaded.weights) == (5, "float.pth")
    assert loaded.detector is not None
    images = torch.rand(2, 3, 128, 128)
    with torch.no_grad():
        outputs = loaded.module(images)
        maps = list(library.backbone(images).values())
        heads = library.head(maps)
    assert torch.equal(outputs[:, :5].transpose(1, 2), heads["cls_logits"])
    assert torch.equal(outputs[:, 5:].transpose(1, 2), heads["bbox_regression"])
    assert outputs.shape == (2, 9, len(loaded.detector.anchors))
    with pytest.raises(CheckpointError, match="classifier of 5 classes and 3 are wanted"):
        load_model(name, checkpoint=tmp_path / "float.pth", num_classes=3, img_size=128)
    other = load_model(
        name, checkpoint=tmp_path / "float.pth", num_classes=3, reset_classifier=True, img_size=128
    )
    assert other.num_classes == 3
    first = "backbone.body.conv1" if name == RETINANET else "backbone.features.0.0.0"
    kept, new = (m.get_parameter(f"{first}.weight") for m in (library, other.module))
    assert torch.equal(kept, new)


def test_published_weights_with_new_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their classifiers are left out; the bias of new ones begins where nothing is there."""
    published = torchvision.models.get_model(RETINANET, weights=None, weights_backbone=None)
    state = {  # as of frozen batch norms, which count no batches
        key: torch.full_like(value, 0.5)
        for key, value in published.state_dict().items()
        if "num_batches" not in key
    }
    weights = type(find(RETINANET)._weights)  # type: ignore[attr-defined]
    monkeypatch.setattr(weights, "get_state_dict", lambda *_, **__: dict(state))
    monkeypatch.setattr("mecq_cli.models.hub.PublishedWeights.cached", lambda _: Path("there"))
    for classes in (4, 91):
        loaded = load_model(RETINANET, num_classes=classes, reset_classifier=True, img_size=128)
        head = loaded.module.get_submodule("head.classification_head.cls_logits")
        assert isinstance(head, nn.Conv2d)
        assert head.bias is not None
        assert head.bias.tolist() == pytest.approx([-4.595] * 9 * classes, abs=1e-3)
        assert bool((loaded.module.get_parameter("backbone.body.conv1.weight") == 0.5).all())
        assert loaded.module.get_submodule("backbone.body.bn1").eps == 1e-12
    plain = load_model(RETINANET, img_size=128)
    bias = plain.module.get_parameter("head.classification_head.cls_logits.bias")
    assert bool((bias == 0.5).all())
    with pytest.raises(CheckpointError, match="classifier of 91 classes and 4 are wanted"):
        load_model(RETINANET, num_classes=4, img_size=128)


def test_images_that_are_too_small_are_refused() -> None:
    with pytest.raises(UsageError, match=r"cannot take images of 128 pixels .*own size is 300"):
        load_model("ssd300_vgg16", pretrained=False, num_classes=3, img_size=128)


def test_frozen_batch_norms_become_such_as_learn() -> None:
    """They compute the same, and are folded into the convolutions before them."""
    backbone = resnet_fpn_backbone(
        backbone_name="resnet18", weights=None, returned_layers=[2, 3, 4], trainable_layers=2
    )
    net = RetinaNet(backbone, 4).eval()
    for module in net.modules():
        if isinstance(module, FrozenBatchNorm2d):
            for buffer in module.buffers():
                buffer.uniform_(0.5, 1.5)
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        heads = net.head(list(net.backbone(images).values()))
        outputs = outputs_only(net)(images)
    moves = outputs[:, 4:].transpose(1, 2)
    torch.testing.assert_close(moves, heads["bbox_regression"], rtol=1e-4, atol=1e-5)
    assert not any(isinstance(module, FrozenBatchNorm2d) for module in net.modules())
    layers = {layer.name: layer for layer in capture(net, (3, 64, 64))}
    assert layers["backbone.body.conv1"].norm is not None
    assert "affine" not in {layer.kind for layer in layers.values()}
