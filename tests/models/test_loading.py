"""Real checkpoints, both libraries, and what happens where weights or names are wrong."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import save_file
from timm.data.transforms_factory import create_transform
from torch import nn

from mecq_cli.errors import CheckpointError, EnvironmentFailure, UsageError
from mecq_cli.models import hub, libraries
from mecq_cli.models.classes import match_classes
from mecq_cli.models.loading import LoadedModel, load_model, model_names

Weights = Callable[[str], Path]

TINY = "test_resnet.r160_in1k"
RESNET20 = "cifar10-resnet20-12fca82f.pth"


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No network, and empty caches; gives the folder that they are in."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        nobody = f"http://127.0.0.1:{server.getsockname()[1]}"
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, nobody)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return tmp_path


def top1(model: LoadedModel, images: Path, each: int) -> float:
    """Percent of the first ``each`` images a class, with nothing but PIL and timm between."""
    p = model.preprocessing
    transform = create_transform(
        p.input_size,
        mean=p.mean,
        std=p.std,
        interpolation=p.interpolation,
        crop_pct=p.crop_pct,
        crop_mode=p.crop_mode,
    )
    folders = sorted(images.iterdir())
    classes = match_classes([f.name for f in folders], model.num_classes)
    right = 0
    for folder, index in zip(folders, classes.indices, strict=True):
        files = sorted(folder.iterdir())[:each]
        batch = torch.stack([transform(Image.open(f).convert("RGB")) for f in files])
        with torch.inference_mode():
            right += int((model.module(batch).argmax(1) == index).sum())
    return 100 * right / (each * len(folders))


@pytest.mark.parametrize(
    ("name", "file", "floor"),
    [("resnet20_cifar", RESNET20, 89), ("resnet56_cifar", "cifar10-resnet56-4bfd9763.pth", 89)],
)
@pytest.mark.parametrize("cifar10", [50], indirect=True)
def test_cifar_checkpoints_are_right(
    weights: Weights, cifar10: Path, name: str, file: str, floor: float
) -> None:
    model = load_model(name, checkpoint=weights(file))
    assert (model.num_classes, model.weights, model.imagenet) == (10, file, False)
    assert top1(model, cifar10 / "val", 50) >= floor


@pytest.mark.parametrize(
    ("name", "file", "crop_pct", "floor"),
    [
        ("tf_efficientnet_lite0", "timm-tf_efficientnet_lite0-imagenette10.pth", None, 97),
        ("torchvision/squeezenet1_0", "torchvision-squeezenet1_0-imagenette10.pth", None, 88),
        ("torchvision/squeezenet1_0", "torchvision-squeezenet1_0-imagenette10.pth", 1.0, 91),
    ],
)
def test_imagenette_checkpoints_are_right(
    weights: Weights, imagenette: Path, name: str, file: str, crop_pct: float | None, floor: float
) -> None:
    model = load_model(name, checkpoint=weights(file), crop_pct=crop_pct)
    assert model.num_classes == 10
    assert top1(model, imagenette / "val", 8) >= floor


@pytest.mark.parametrize("depth", [20, 32, 44, 56, 110])
def test_cifar_resnets_have_the_size_of_the_paper(depth: int) -> None:
    published = {20: 0.27, 32: 0.46, 44: 0.66, 56: 0.85, 110: 1.7}  # million, its table 6
    module = load_model(f"resnet{depth}_cifar", pretrained=False).module
    size = sum(p.numel() for p in module.parameters()) / 1e6
    assert size == pytest.approx(published[depth], abs=0.05 if depth == 110 else 0.01)


def test_cifar_resnets_obey_timm() -> None:
    module = timm.create_model("resnet20_cifar", num_classes=7, in_chans=1)
    assert module(torch.zeros(2, 1, 32, 32)).shape == (2, 7)
    with pytest.raises(TypeError, match="no_such_option"):
        timm.create_model("resnet20_cifar", no_such_option=1)


def test_cifar_resnets_can_be_exported_in_training_mode() -> None:
    module = load_model("resnet20_cifar", pretrained=False).module.train()
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(
        module, (torch.zeros(2, 3, 32, 32),), dynamic_shapes=({0: batch},), strict=False
    )
    assert program.module()(torch.zeros(5, 3, 32, 32)).shape == (5, 10)


def test_number_of_classes_comes_from_the_weights_or_from_the_user(weights: Weights) -> None:
    checkpoint = weights(RESNET20)
    with pytest.raises(CheckpointError, match=r"of 10 classes and 7 are wanted.*--reset-class"):
        load_model("resnet20_cifar", checkpoint=checkpoint, num_classes=7)
    plain = load_model("resnet20_cifar", checkpoint=checkpoint).module.state_dict()
    for classes in (7, 10):
        reset = load_model(
            "resnet20_cifar", checkpoint=checkpoint, num_classes=classes, reset_classifier=True
        )
        state = reset.module.state_dict()
        assert (reset.num_classes, state["linear.weight"].shape) == (classes, (classes, 64))
        assert not torch.equal(state["linear.weight"][:7], plain["linear.weight"][:7])
        assert torch.equal(state["layer3.2.conv2.weight"], plain["layer3.2.conv2.weight"])


def test_random_weights_take_any_number_of_classes() -> None:
    model = load_model("resnet18", pretrained=False, num_classes=3, img_size=64)
    assert (model.weights, model.num_classes, model.imagenet) == ("random", 3, False)
    assert model.module(torch.zeros(1, *model.preprocessing.input_size)).shape == (1, 3)
    assert load_model("resnet18", pretrained=False).imagenet


def test_a_checkpoint_of_another_net_is_one_line(weights: Weights) -> None:
    with pytest.raises(CheckpointError, match="does not fit") as caught:
        load_model("resnet56_cifar", checkpoint=weights(RESNET20))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("resnet50x", "resnet50"),
        ("resnet20_cifr", "resnet20_cifar"),
        ("squeezenet1_0", "torchvision/squeezenet1_0"),
        ("torchvision/resnet81", "torchvision/resnet18"),
        ("ResNet18", "resnet18"),
        ("resnet50.a1_in2k", "resnet50.a1_in1k"),
        ("some/model", "are known"),
        ("../../etc/passwd", "are known"),
    ],
)
def test_unknown_models_get_near_matches(name: str, near: str) -> None:
    with pytest.raises(UsageError, match="unknown model") as caught:
        load_model(name)
    assert near in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("option", [{"img_size": 0}, {"crop_pct": 0.0}, {"num_classes": 0}])
def test_senseless_settings_are_refused(option: dict[str, int]) -> None:
    with pytest.raises(UsageError):
        load_model("resnet20_cifar", pretrained=False, **option)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "torchvision/vit_b_32"])
def test_nets_of_a_fixed_size_are_built_for_the_size_asked_for(name: str) -> None:
    model = load_model(name, pretrained=False, num_classes=2, img_size=96)
    assert model.preprocessing.input_size == (3, 96, 96)
    assert model.module(torch.zeros(1, 3, 96, 96)).shape == (1, 2)


def test_an_impossible_size_is_one_line() -> None:
    with pytest.raises(UsageError, match="cannot be built for images of 100 pixels"):
        load_model("torchvision/maxvit_t", pretrained=False, img_size=100)


@pytest.mark.parametrize("name", ["resnet50", "torchvision/resnet18", "gcvit_tiny"])
def test_missing_weights_without_a_network_are_one_quick_line(
    offline: Path, capfd: pytest.CaptureFixture[str], name: str
) -> None:
    start = time.monotonic()
    with pytest.raises(EnvironmentFailure, match="no connection") as caught:
        load_model(name)
    assert time.monotonic() - start < 3
    message = str(caught.value)
    assert "\n" not in message
    assert {"--checkpoint", "--no-pretrained"} <= {*message.split()}
    assert capfd.readouterr() == ("", "")


def test_a_silent_network_is_given_up_on(offline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As with a name server that never answers, where a socket's timeout does not help.
    over = threading.Event()

    def silent(*_: object, **__: object) -> None:
        over.wait(20)
        raise TimeoutError

    monkeypatch.setattr(socket, "create_connection", silent)
    start = time.monotonic()
    with pytest.raises(EnvironmentFailure, match="no connection"):
        load_model("resnet50")
    took = time.monotonic() - start
    over.set()  # the thread that still waits must not outlive the test
    assert took < 3


def test_a_network_that_hangs_up_is_one_line(
    offline: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(hub, "_answers", lambda url: True)  # ... and then the download fails
    with pytest.raises(EnvironmentFailure, match="cannot be fetched: URLError") as caught:
        load_model("torchvision/resnet18")
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_hub_offline_is_honoured(offline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(EnvironmentFailure, match="HF_HUB_OFFLINE is set"):
        load_model("resnet50")


def test_a_model_without_published_weights_says_so() -> None:
    with pytest.raises(UsageError, match=r"no published weights of resnet20_cifar.*--checkpoint"):
        load_model("resnet20_cifar")


def cached_tiny(cache: Path) -> dict[str, torch.Tensor]:
    """Weights of the `TINY` model, in the cache as huggingface_hub would put them there."""
    torch.manual_seed(0)
    state = timm.create_model(TINY).state_dict()
    cfg = libraries.find(TINY).published
    assert cfg is not None
    repository = cache / "hf" / ("models--" + cfg.location.replace("/", "--"))
    snapshot = repository / "snapshots" / "0"
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0")
    save_file(state, snapshot / "model.safetensors")
    return state


def same(module: nn.Module, state: dict[str, torch.Tensor], *, but: str = "-") -> bool:
    own = module.state_dict()
    return all(torch.equal(own[k], v) for k, v in state.items() if not k.startswith(but))


def test_cached_timm_weights_need_no_network(offline: Path) -> None:
    state = cached_tiny(offline)
    model = load_model(TINY)
    assert (model.weights, model.num_classes, model.imagenet) == ("library", 1000, True)
    assert same(model.module, state)
    with pytest.raises(CheckpointError, match=r"1000 classes and 7 are wanted.*--reset-class"):
        load_model(TINY, num_classes=7)
    for classes in (7, 1000):
        reset = load_model(TINY, num_classes=classes, reset_classifier=True).module
        assert same(reset, state, but="fc.")
        assert reset.get_parameter("fc.weight").shape[0] == classes
        assert not torch.equal(reset.get_parameter("fc.weight")[:7], state["fc.weight"][:7])


def test_cached_torchvision_weights_need_no_network(offline: Path) -> None:
    name = "torchvision/squeezenet1_1"
    published = libraries.find(name).published
    assert published is not None
    state = torchvision.models.squeezenet1_1().state_dict()
    file = offline / "hub" / "checkpoints" / published.location.rpartition("/")[2]
    file.parent.mkdir(parents=True)
    torch.save(state, file)
    assert same(load_model(name).module, state)
    reset = load_model(name, num_classes=7, reset_classifier=True).module
    assert same(reset, state, but="classifier.")
    assert reset(torch.zeros(1, 3, 64, 64)).shape == (1, 7)
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="delete that file") as caught:
        load_model(name)
    assert "\n" not in str(caught.value)


def torchvision_families() -> list[str]:
    """The smallest of each kind of classifier, as far as building it takes no second."""
    return [
        "torchvision/" + name
        for name in (
            "alexnet convnext_tiny densenet121 efficientnet_b0 googlenet inception_v3 maxvit_t "
            "mnasnet0_5 mobilenet_v2 mobilenet_v3_small regnet_x_400mf resnet18 "
            "shufflenet_v2_x0_5 squeezenet1_1 swin_t vit_b_32"
        ).split()
    ]


@pytest.mark.parametrize("name", torchvision_families())
def test_torchvision_classifiers_are_known(name: str) -> None:
    module = load_model(name, pretrained=False, num_classes=3).module
    layers = {k for k, v in module.named_modules() if getattr(v, "out_features", 0) == 3}
    layers |= {k for k, v in module.named_modules() if getattr(v, "out_channels", 0) == 3}
    assert layers == {*libraries.find(name).classifiers}


def test_torchvision_preprocessing_is_that_of_its_weights() -> None:
    for name in model_names():
        if name.startswith("torchvision/"):
            p = libraries.find(name).preprocessing
            weights = torchvision.models.get_model_weights(name.removeprefix("torchvision/"))
            transforms = weights.DEFAULT.transforms()
            assert p.input_size[1] == transforms.crop_size[0]
            assert int(p.input_size[1] / p.crop_pct) == transforms.resize_size[0]
            assert p.interpolation == transforms.interpolation.value


@pytest.mark.parametrize("arch", ["googlenet", "inception_v3"])
def test_input_transform_is_part_of_the_preprocessing(arch: str) -> None:
    original = torchvision.models.get_model(
        arch, weights=None, init_weights=True, transform_input=True
    ).eval()
    model = load_model(f"torchvision/{arch}", pretrained=False)
    model.module.load_state_dict(original.state_dict(), strict=False)
    # In float64: random weights make large numbers, and large rounding errors of float32.
    image = torch.rand(1, 3, 96, 96, dtype=torch.float64)
    its_own = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    inputs = []
    for mean, std in (its_own, (model.preprocessing.mean, model.preprocessing.std)):
        shift, scale = (torch.tensor(v, dtype=image.dtype).view(3, 1, 1) for v in (mean, std))
        inputs.append((image - shift) / scale)
    with torch.inference_mode():
        expected, got = original.double()(inputs[0]), model.module.double()(inputs[1])
    torch.testing.assert_close(got, expected, rtol=1e-7, atol=0)
