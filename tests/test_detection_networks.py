"""Networks that detect, from the float module to integers, ONNX and boxes."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.retinanet import RetinaNet
from torchvision.models.detection.ssd import SSD

from mecq_cli.capture import capture
from mecq_cli.errors import ArtifactError, UsageError
from mecq_cli.export import onnx, safetensors
from mecq_cli.export.onnx_detection import BOXES, LABELS, SCORES
from mecq_cli.export.ort import OrtRunner
from mecq_cli.insertion import BitPlan, assign_bits, insert, tapped_layers
from mecq_cli.integer.ir import shared_weights
from mecq_cli.integerize import IntegerModule, integerize
from mecq_cli.models.detection import detector_of, feature_maps, outputs_only
from mecq_cli.models.detector import KEY, detector_in
from mecq_cli.precision import choices_of, measure
from mecq_cli.quantizers import quantizers_named
from mecq_cli.sizes import ideal_bytes, totals
from mecq_cli.tasks.decoding import SCORE, decoded
from mecq_cli.tasks.detection import Detection
from mecq_cli.verify import BoxComparison
from tests.detectors import small_ssd, tiny_retinanet
from tests.exactness import check, quantized, random_images

SIZE = 64
WIDTHS = (8, 12, 16, 16, 16)


def network(kind: str) -> Any:
    """A network with random weights, unsure of everything."""
    torch.manual_seed(0)
    net: Any = small_ssd(SIZE, widths=WIDTHS) if kind == "ssd" else tiny_retinanet()
    for module in net.head.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=0.1)
            nn.init.normal_(module.bias, std=0.5)  # type: ignore[arg-type]
    return outputs_only(net.eval())


KINDS = pytest.mark.parametrize("kind", ["ssd", "retinanet"])


@KINDS
def test_boxes_are_those_of_torchvision(kind: str) -> None:
    net = network(kind)
    with torch.no_grad():
        outputs = net(random_images(3, SIZE)) * 2
        detector = detector_of(net, (SIZE, SIZE))
        found = decoded(outputs, detector)
        heads = {
            "cls_logits": outputs[:, :4].transpose(1, 2),
            "bbox_regression": outputs[:, 4:].transpose(1, 2),
        }
        images = torch.zeros(3, 3, SIZE, SIZE)
        sizes = [(SIZE, SIZE)] * 3
        anchors = net.anchor_generator(ImageList(images, sizes), feature_maps(net, images))
        if isinstance(net, RetinaNet):
            counts = [level.count for level in detector.levels]
            heads = {key: list(value.split(counts, 1)) for key, value in heads.items()}
            anchors = [list(own.split(counts)) for own in anchors]
        wanted = net.postprocess_detections(heads, anchors, sizes)
    for own, known in zip(found, wanted, strict=True):
        count = len(known["scores"])
        assert count > 20
        assert int((own[:, SCORE] > 0).sum()) == count
        torch.testing.assert_close(own[:count, :4], known["boxes"], atol=1e-3, rtol=0)
        torch.testing.assert_close(own[:count, SCORE], known["scores"], atol=1e-6, rtol=0)
        assert torch.equal(own[:count, 5].long(), known["labels"])


@KINDS
def test_a_description_survives_json_and_gives_the_same_anchors(kind: str) -> None:
    net = network(kind)
    detector = detector_of(net, (SIZE, SIZE))
    assert detector_in({KEY: detector.to_json()}) == detector
    images = torch.zeros(1, 3, SIZE, SIZE)
    (anchors,) = net.anchor_generator(ImageList(images, [(SIZE, SIZE)]), feature_maps(net, images))
    np.testing.assert_allclose(detector.anchors, anchors.numpy(), atol=1e-4)


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "yolo"}, {"levels": []}, {"iou_threshold": 1.5}, {"candidates": 0},
        {"weights": [1, 1, 0, 1]}, {"size": [64.5, 64]}, {"largest_growth": float("inf")},
        {"levels": [{"grid": [1], "stride": [1, 1], "boxes": []}]}, {"more": 1},
    ],
)  # fmt: skip
def test_an_impossible_description_is_an_artifact_error(change: dict[str, Any]) -> None:
    document = detector_of(network("ssd"), (SIZE, SIZE)).to_json()
    with pytest.raises(ArtifactError, match="makes no boxes"):
        detector_in({KEY: {**document, **change}})


@KINDS
def test_every_way_gives_the_same_integers(kind: str, tmp_path: Path) -> None:
    images = random_images(4, SIZE)
    model = quantized(network(kind), BitPlan(4, 4), images)
    counts = check(model, images, tmp_path)
    assert counts["alive"] > 10
    assert counts["off"] <= 5


@KINDS
@pytest.mark.parametrize("profile", ["ort", "portable"])
def test_an_onnx_file_alone_makes_the_boxes_of_the_simulator(
    kind: str, profile: str, tmp_path: Path
) -> None:
    net = network(kind)
    detector = detector_of(net, (SIZE, SIZE))
    images = random_images(5, SIZE)
    network_of_bits = quantized(net, BitPlan(4, 4), images)
    metadata = {"classes": ["nothing", "a", "b", "c"], KEY: detector.to_json()}
    model = integerize(network_of_bits, (3, SIZE, SIZE), metadata)
    onnx.save(model, tmp_path / "model.onnx", profile=profile)
    outputs = IntegerModule(model)(images)
    assert outputs.shape == (5, 8, len(detector.anchors))
    wanted = decoded(outputs, detector).numpy()
    assert (wanted[..., SCORE] > 0).sum() > 100
    runner = OrtRunner(tmp_path / "model.onnx", threads=1)
    for part in (slice(0, 1), slice(1, 5)):
        boxes, scores, labels = runner.run_named(images[part].numpy(), (BOXES, SCORES, LABELS))
        assert labels.dtype == np.int64
        got = np.concatenate([boxes, scores[..., None], labels[..., None]], -1, dtype=np.float32)
        compared = BoxComparison()
        compared.add(wanted[part], got, SIZE)
        compared.require("test")
        assert compared.agree == compared.boxes
        assert (np.diff(scores, axis=1) <= 0).all()
        assert (boxes[scores == 0] == 0).all()
    with pytest.raises(ArtifactError, match="has no output 'masks'"):
        runner.run_named(images.numpy(), ("masks",))


@KINDS
def test_nothing_is_found_where_nothing_is_probable(kind: str, tmp_path: Path) -> None:
    """No box at all goes through the file: NonMaxSuppression gives an empty list."""
    net = network(kind)
    with torch.no_grad():
        for module in net.head.classification_head.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.zero_()
                module.bias.fill_(-20)  # type: ignore[union-attr]
                if kind == "ssd":
                    module.bias[::4] = 20  # type: ignore[index]
    images = random_images(2, SIZE)
    detector = detector_of(net, (SIZE, SIZE))
    bits = quantized(net, BitPlan(4, 4), images)
    model = integerize(bits, (3, SIZE, SIZE), {"classes": [*"nabc"], KEY: detector.to_json()})
    onnx.save(model, tmp_path / "model.onnx")
    _, scores, _ = OrtRunner(tmp_path / "model.onnx").run_named(
        images.numpy(), (BOXES, SCORES, LABELS)
    )
    assert (scores == 0).all()
    assert (decoded(IntegerModule(model)(images), detector) == 0).all()


@KINDS
def test_the_ends_of_all_heads_are_the_last_layers(kind: str) -> None:
    layers = capture(network(kind), (3, SIZE, SIZE))
    bits, lasts, _ = assign_bits(layers, BitPlan(2, 3))
    levels = 3 if kind == "ssd" else 2
    assert len(lasts) == 2 * levels
    assert all(name.startswith("head.") for name in lasts)
    assert {(bits[name].wbits, bits[name].abits) for name in lasts} == {(8, 8)}
    stages = tapped_layers(layers, ["stages"])
    assert all(name.startswith("backbone.") for name in stages)
    adds = [name for name in stages if name.endswith("add")]
    assert len(adds) == len(WIDTHS) - 1 if kind == "ssd" else len(adds) == 3
    assert tapped_layers(layers, ["penultimate"]) == [stages[-1]]


class Lengths(nn.Module):
    """As the first map of SSD300: each place divided by its length, and scaled by channel."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)
        self.scale = nn.Parameter(torch.linspace(10, 20, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        logits: Tensor = self.second(self.scale.view(1, -1, 1, 1) * F.normalize(x))
        return logits


def test_places_are_divided_by_their_length_over_the_channels(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, images = Lengths(), random_images(4, 16)
    kinds = [layer.kind for layer in capture(net, (3, 16, 16))]
    assert kinds.count("l2_normalize") == 1
    with torch.no_grad():
        wanted = net(images)
        eight = quantized(net, BitPlan(8, 8), images)(images)
    assert float((eight - wanted).abs().max()) < 0.05 * float(wanted.abs().max())
    counts = check(quantized(net, BitPlan(4, 4), images), images, tmp_path)
    assert counts["off"] <= 5


def test_weights_that_levels_share_are_stored_once(tmp_path: Path) -> None:
    """The heads of a RetinaNet run at each level, with one weight and its integers."""
    torch.manual_seed(0)
    net = outputs_only(tiny_retinanet(width=32).eval())
    images = random_images(2, SIZE)
    bits = quantized(net, BitPlan(4, 4), images)
    metadata = {"classes": [*"nabc"], KEY: detector_of(net, (SIZE, SIZE)).to_json()}
    model = integerize(bits, (3, SIZE, SIZE), metadata)
    shared = shared_weights(model)
    towers = {
        f"head.{kind}_head.conv.{n}.0"
        for kind in ("classification", "regression")
        for n in range(4)
    }
    assert towers <= {*shared.values()}
    assert all(name == f"{owner}_2" for name, owner in shared.items())
    safetensors.save(model, tmp_path / "model.safetensors")
    stored = safetensors.load(tmp_path / "model.safetensors")
    assert torch.equal(IntegerModule(stored)(images), IntegerModule(model)(images))
    weights = {node.name: node.tensors["weight"] for node in stored.nodes if node.weight_bits}
    for name, owner in shared.items():
        assert np.shares_memory(weights[name], weights[owner])
    bits_of = {node.name: node.weight_bits or 0 for node in model.nodes}
    saved = sum(weights[name].size * bits_of[name] for name in shared) // 8
    with patch("mecq_cli.export.safetensors.shared_weights", return_value={}):
        plain = len(safetensors.to_bytes(model))
    assert saved * 0.98 < plain - len(safetensors.to_bytes(model)) < saved * 1.05
    proto = onnx.to_model(model)
    stored_names = {tensor.name for tensor in proto.graph.initializer}
    kept = [name for name in stored_names if name.endswith("::weight")]
    assert len(kept) == len(weights) - len(shared)
    sizes = totals(model, 0, 0)
    assert sizes["ideal_bytes"] == sum(ideal_bytes(node) for node in model.nodes) - saved


class Crooked(AnchorGenerator):  # type: ignore[misc]
    """Anchors that are larger further down."""

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        return [own * torch.linspace(1, 2, len(own))[:, None] for own in super().forward(
            image_list, feature_maps)]  # fmt: skip


def test_anchors_that_differ_from_place_to_place_are_refused() -> None:
    net = tiny_retinanet()
    net.anchor_generator = Crooked(((12,), (24,)), ((1.0,),) * 2)
    with pytest.raises(UsageError, match="not the same boxes at each place"):
        detector_of(net, (SIZE, SIZE))


def test_anchors_beside_the_image_are_refused() -> None:
    """As those of SSD300, whose steps are fixed, of images of 512 pixels."""
    net = small_ssd(SIZE, widths=WIDTHS)
    net.anchor_generator.steps = [8, 16, 32]
    detector_of(outputs_only(net.eval()), (SIZE, SIZE))
    net.anchor_generator.steps = [8, 16, 48]
    with pytest.raises(UsageError, match=r"outside of the image to \d+ %.* another --img-size"):
        detector_of(net, (SIZE, SIZE))


def test_heads_for_other_anchors_are_refused() -> None:
    net = tiny_retinanet()
    net.anchor_generator = AnchorGenerator(((12,), (24,)), ((1.0,),) * 2)
    with pytest.raises(UsageError, match="must be made for each other"):
        detector_of(net, (SIZE, SIZE))


def test_the_module_is_still_one_of_torchvision() -> None:
    net = small_ssd(SIZE, widths=WIDTHS)
    keys = list(net.state_dict())
    assert isinstance(outputs_only(net), SSD)
    assert outputs_only(net) is net
    assert list(net.state_dict()) == keys


def test_what_makes_boxes_counts_for_the_bits_of_layers() -> None:
    net = network("retinanet")
    detector = detector_of(net, (SIZE, SIZE))
    assert detector is not None
    model = insert(net, (3, SIZE, SIZE), BitPlan(4, 4, quantizer="auto"), ())
    choices = choices_of(model, [], (2, 4))
    make = quantizers_named("auto").weight
    found = measure(
        "loss",
        model,
        random_images(4, SIZE),
        choices,
        make,
        divergence=Detection(detector).divergence,
    )
    of_boxes = [name for name in found if "regression" in name]
    assert of_boxes
    for name in of_boxes:
        assert found[name][2] > found[name][4] > 0
