"""`mecq_cli.load`: an integer artifact as a torch module, for use in other programs."""

from __future__ import annotations

import os

import torch
from PIL import Image
from torch import Tensor

from mecq_cli.data import normalize, read_image
from mecq_cli.data.augmentation import eval_transform
from mecq_cli.errors import UsageError
from mecq_cli.integer.ir import IntegerModel
from mecq_cli.integerize import IntegerModule
from mecq_cli.models.detector import detector_in
from mecq_cli.models.preprocessing import Preprocessing
from mecq_cli.target import resolve_target
from mecq_cli.tasks.decoding import SCORE, decoded
from mecq_cli.workflow.artifacts import load_artifact, preprocessing_of
from mecq_cli.workflow.targets import require_artifact


class Classifier(IntegerModule):
    """An integer artifact as a torch module in evaluation mode.

    ``classifier(images)``, normalised floats [N, C, H, W], gives logits, float32 [N, classes]:
    bit for bit those that ``mecq eval`` counts and the exported ONNX file computes.

    Attributes:
        preprocessing: how an image becomes the input: ``input_size``, ``mean``, ``std``,
            ``interpolation``, ``crop_pct``, ``crop_mode``.
        classes: a name for each logit.
        imagenet: whether the logits are those of ImageNet-1k.
        detector: what makes boxes of the outputs of a network that detects; else None.
        model: the integer model itself, see `mecq_cli.integer.ir`.
    """

    def __init__(self, model: IntegerModel, preprocessing: Preprocessing) -> None:
        super().__init__(model)
        self.preprocessing = preprocessing
        self.classes = tuple(str(name) for name in model.metadata.get("classes", ()))
        self.imagenet = bool(model.metadata.get("imagenet", False))
        self.detector = detector_in(model.metadata)

    def detect(self, images: Tensor) -> list[Tensor]:
        """The boxes in normalised images, of a network that detects.

        Returns:
            For each image float32 [boxes, 6], the most probable first: left, top, right, bottom in
            pixels of the input, probability, index of the class.

        Raises:
            UsageError: the network does not detect, or as calling it.
        """
        if self.detector is None:
            raise UsageError(f"{self.model.metadata.get('model', 'this model')} does not detect")
        return [rows[rows[:, SCORE] > 0] for rows in decoded(self(images), self.detector)]

    def read(self, path: str | os.PathLike[str]) -> Tensor:
        """An image file as this model sees it: resized, cropped, normalised, float32 [C, H, W].

        Raises:
            DataError: the file is no usable image.
        """
        picture = Image.fromarray(read_image(path, advice=""))
        pixels = torch.tensor(eval_transform(self.preprocessing)(picture))
        return normalize(pixels[None], self.preprocessing)[0]


def load(path: str | os.PathLike[str]) -> Classifier:
    """Read an integer artifact back.

    Args:
        path: a run folder or a .safetensors file that mecq wrote; "runs/latest" is the latest run.

    Raises:
        UsageError: there is no such file, or it is something else.
        ArtifactError: it was damaged, or is of a newer version.
    """
    target = resolve_target(os.fspath(path))
    if target.run is not None:
        file = require_artifact(target.run)
    elif target.kind == "artifact" and target.path is not None:
        file = target.path
    else:
        raise UsageError(
            f"{target.name}: no integer artifact; give a run folder or a .safetensors file that "
            "mecq wrote"
        )
    model = load_artifact(file)
    return Classifier(model, preprocessing_of(model.metadata, file))
