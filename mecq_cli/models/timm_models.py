"""Models of timm's: by their names, and saved ones that say themselves what they are."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import timm
from timm.data.config import resolve_data_config
from timm.models import PretrainedCfg, get_pretrained_cfg
from torch import nn

from mecq_cli.errors import CheckpointError, UsageError
from mecq_cli.models.hub import PublishedWeights
from mecq_cli.models.preprocessing import Preprocessing
from mecq_cli.models.weights import first_line
from mecq_cli.settings import LOCAL, split_model_name
from mecq_cli.storage import read_bytes_limited

DESCRIPTION = "config.json"
"""What timm calls the file that describes a saved model."""
_DESCRIPTION_LIMIT = 2**24

WEIGHTS = ("model.safetensors", "pytorch_model.bin", "pytorch_model.pth")
"""What timm calls the weights beside it; the first one present is taken."""


class TimmModel:
    """A model of timm's, the CIFAR ResNets of this package among them."""

    task = "classify"
    rows_of_a_class = 1

    def __init__(self, name: str, cfg: PretrainedCfg | None = None) -> None:
        cfg = cfg or get_pretrained_cfg(name) or PretrainedCfg()
        self.name = name
        self.num_classes = cfg.num_classes
        classifier: Any = cfg.classifier or ()
        self.classifiers = (classifier,) if isinstance(classifier, str) else tuple(classifier)
        self.unused: tuple[str, ...] = ()
        self.preprocessing = _timm_preprocessing(cfg)
        self.published: PublishedWeights | None = None
        if cfg.hf_hub_id:
            self.published = PublishedWeights(
                cfg.hf_hub_id, on_hub=True, filename=cfg.hf_hub_filename
            )
        elif cfg.url:
            self.published = PublishedWeights(cfg.url if isinstance(cfg.url, str) else cfg.url[0])
        self._fixed_input_size = cfg.fixed_input_size

    def build(self, *, pretrained: bool, num_classes: int, img_size: int | None) -> nn.Module:
        options = self._options(num_classes, img_size)
        if pretrained and self.published and self.published.on_hub:
            # Straight from the cache: by itself timm asks the hub for a newer file first.
            file = self.published.cached()
            if file is not None:
                options["pretrained_cfg_overlay"] = {"file": str(file), "custom_load": False}
        return timm.create_model(self.name, pretrained=pretrained, **options)

    def _options(self, num_classes: int, img_size: int | None) -> dict[str, Any]:
        options: dict[str, Any] = {"num_classes": num_classes}
        if img_size is not None and self._fixed_input_size:
            options["img_size"] = img_size
        return options


class SavedTimmModel(TimmModel):
    """A folder as timm's ``save_for_hf`` makes it, on this machine or on the Hugging Face Hub.

    Its description holds the architecture, its arguments, the number of classes and the
    preprocessing, so that no flag has to say them again.

    Args:
        name: ``local-dir:FOLDER`` or ``hf-hub:OWNER/NAME[@REVISION]``, as timm has them.

    Raises:
        UsageError: there is no such folder or repository.
        CheckpointError: its description is none of a model of timm's.
        EnvironmentFailure: the Hub cannot be reached, and the description is not in the cache.
    """

    def __init__(self, name: str) -> None:
        source, where = split_model_name(name)
        self._source: Path | PublishedWeights
        if source == LOCAL:
            self._source = Path(where)
            description = self._source / DESCRIPTION
            if not description.is_file():
                raise UsageError(
                    f"{name}: has no {DESCRIPTION}; expected a folder that timm's save_for_hf made "
                    "(for other weights: the name of the model, and --checkpoint FILE)"
                )
        else:
            self._source = PublishedWeights(where, on_hub=True)
            description = PublishedWeights(where, on_hub=True, filename=DESCRIPTION).fetched(name)
        self._folder = description.parent
        super().__init__(name, _described(description))
        self.published = None

    def file(self) -> Path:
        """Its weights.

        Raises:
            CheckpointError: there are none in the folder.
            EnvironmentFailure: the Hub cannot be reached, and they are not in the cache.
        """
        if isinstance(self._source, PublishedWeights):
            return self._source.fetched(self.name)
        for name in WEIGHTS:
            if (self._source / name).is_file():
                return self._source / name
        raise CheckpointError(
            f"{self.name}: has none of {', '.join(WEIGHTS)}; give the file with --checkpoint, or "
            "start from random weights with --no-pretrained"
        )

    def build(self, *, pretrained: bool, num_classes: int, img_size: int | None) -> nn.Module:
        """Make the net, with random weights: those in the file are loaded as any checkpoint is."""
        assert not pretrained
        options = self._options(num_classes, img_size)
        try:
            return timm.create_model(f"{LOCAL}{self._folder}", pretrained=False, **options)
        except (AssertionError, RuntimeError, TypeError, ValueError) as error:
            if img_size is not None:
                raise  # which may be what is wrong
            raise CheckpointError(
                f"{self._folder / DESCRIPTION}: timm cannot make the model it describes "
                f"({first_line(error)})"
            ) from error


def _described(file: Path) -> PretrainedCfg:
    """What timm knows of the architecture, and what the description says of this model."""
    try:
        document = json.loads(read_bytes_limited(file, _DESCRIPTION_LIMIT, error=CheckpointError))
        architecture = document["architecture"]
        if not timm.is_model(architecture):
            raise CheckpointError(f"{file}: timm has no model {str(architecture)[:60]!r}")
        said = dict(document.get("pretrained_cfg", document))  # of old ones the document itself
        if "num_classes" in document:
            said["num_classes"] = document["num_classes"]
        cfg = {**(get_pretrained_cfg(architecture) or PretrainedCfg()).to_dict(), **said}
        known = {field.name for field in fields(PretrainedCfg)}
        made = PretrainedCfg(**{k: _plain(v) for k, v in cfg.items() if k in known})
        _timm_preprocessing(made).require_sound()
        if type(made.num_classes) is not int:
            raise TypeError(f"num_classes is {made.num_classes!r}")
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{file}: does not describe a model of timm's ({type(error).__name__}: "
            f"{first_line(error)})"
        ) from error
    return made


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _timm_preprocessing(cfg: PretrainedCfg) -> Preprocessing:
    # timm gives these two no annotations.
    as_dict: Callable[[], dict[str, Any]] = cfg.to_dict
    resolve: Callable[..., dict[str, Any]] = resolve_data_config
    return Preprocessing(**resolve(pretrained_cfg=as_dict()))
