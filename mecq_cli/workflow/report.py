"""`mecq report`: what there is to say about a run, as one HTML page."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mecq_cli import __version__
from mecq_cli.config import QuantizeConfig, ReportConfig
from mecq_cli.data import ImageDataset, Split, eval_batches, normalize
from mecq_cli.data.images import open_rgb
from mecq_cli.errors import ArtifactError, InputError, MecqError, UsageError
from mecq_cli.events import Listener
from mecq_cli.export import safetensors
from mecq_cli.insertion import BitPlan, QuantizedModel, insert
from mecq_cli.integer.ir import Grid, IntegerModel
from mecq_cli.integerize import IntegerModule, integerize
from mecq_cli.models.classes import ClassMap, match_classes
from mecq_cli.models.loading import LoadedModel, load_model
from mecq_cli.models.preprocessing import Preprocessing
from mecq_cli.report import curves, figures, html, layers, page, predictions
from mecq_cli.runs import RunFolder, resolve_target
from mecq_cli.sites import ProductSite
from mecq_cli.sizes import site_rows, totals
from mecq_cli.storage import atomic_write, read_bytes_limited
from mecq_cli.training import state
from mecq_cli.training.metrics import read_rows
from mecq_cli.workflow.common import eval_batch_size, insert_quantizers, load_for_data
from mecq_cli.workflow.machine import facts
from mecq_cli.workflow.report_runtime import look_at_runtime
from mecq_cli.workflow.targets import evaluation_split, preprocessing_of, settings_of

WATCHED_IMAGES = 256
"""For the codes of activations; each image gives thousands of values."""

_LARGEST_PAGE = 64 * 2**20
_TASK = "look at images"


@dataclass
class Material:
    """What of a run could be opened.

    Attributes:
        run: its folder.
        config: its settings; None where only an artifact was put there.
        summary: summary.json; {} of a run that is not finished.
        model: the integer network; None of a run that has none yet.
        preprocessing: of its images.
        split: evaluation images; None where they are gone.
        classes: of the outputs.
        fp: the FP network; None where its weights are gone.
        simulator: the trained network; None where its checkpoint is gone.
        left_out: what cannot be shown, and why.
    """

    run: RunFolder
    config: QuantizeConfig | None
    summary: dict[str, Any]
    model: IntegerModel | None = None
    preprocessing: Preprocessing | None = None
    split: Split | None = None
    classes: ClassMap | None = None
    fp: nn.Module | None = None
    simulator: QuantizedModel | None = None
    left_out: list[str] = field(default_factory=list)

    def attempt(self, what: str, call: Callable[[], Any]) -> Any:
        """What ``call`` returns; None, and a remark, where it cannot."""
        try:
            return call()
        except MecqError as error:
            self.left_out.append(f"{what}: {error}")
            return None


def report(config: ReportConfig, listener: Listener) -> dict[str, Any]:
    """Measure what there is of a run and write RUN/report.html (or ``output``).

    Returns:
        The numbers of the page (see mecq_cli.report), "path" and "bytes" of the file.

    Raises:
        UsageError: the target is no run, or the file exists and is no report.
        EnvironmentFailure: matplotlib is missing.
        MecqError: see mecq_cli.errors.
    """
    figures.require("mecq report")
    run = _run(config.run)
    output = config.output or run.report
    force = may_replace(output, force=config.force)
    material = _open(run, config)
    document = _gathered(material, config, listener)
    listener.note("drawing")
    pictures = _thumbnails(material, document)
    data = page.render(document, pictures).encode()
    atomic_write(output, data, force=force)
    return {**document, "path": str(output), "bytes": len(data)}


def may_replace(path: Path, *, force: bool) -> bool:
    """Whether a page may take the place of what is at ``path``: of an older page it may.

    Raises:
        UsageError: there is something else.
    """
    if force or not path.exists():
        return force
    if path.is_file() and html.is_ours(read_bytes_limited(path, _LARGEST_PAGE)):
        return True
    raise UsageError(
        f"{path} exists and is no page that mecq wrote; --force overwrites it, or give another name"
    )


def _run(name: str | None) -> RunFolder:
    target = resolve_target(name)
    if target.run is None:
        raise UsageError(f"{target.name}: is no run folder; a report is about a run")
    return target.run


def _open(run: RunFolder, asked: ReportConfig) -> Material:
    config = settings_of(run)
    material = Material(run, config, read_summary(run))
    if not run.artifact.exists():
        material.left_out.append(
            "Layers, answers and sizes: the run has no integer artifact yet; it is written at the "
            "end of the training."
        )
        return material
    model = material.model = safetensors.load(run.artifact)
    preprocessing = material.preprocessing = preprocessing_of(model.metadata, run.artifact)
    if asked.data is not None:  # named, so it has to be there
        material.split = evaluation_split(config, asked.data)
    else:
        material.split = material.attempt(
            "Answers, activations and verification need the images",
            lambda: evaluation_split(config, None),
        )
    names = tuple(str(name) for name in model.metadata.get("classes", ()))
    material.classes = ClassMap(names, tuple(range(len(names))))
    if material.split is not None:
        imagenet = bool(model.metadata.get("imagenet", False))
        material.classes = match_classes(material.split.classes, len(names), imagenet=imagenet)
    if config is None:
        material.left_out.append("The float network: the folder holds an artifact and no settings.")
        return material
    settings = config
    loaded = material.attempt(
        "What quantization changed needs the float network", lambda: _float(settings, material)
    )
    if loaded is not None:
        if loaded.preprocessing != preprocessing:
            raise ArtifactError(
                f"{run.artifact}: its preprocessing is not the one that {run.config} asks for; "
                "give the folder of one run"
            )
        material.fp = copy.deepcopy(loaded.module).eval().requires_grad_(False)
        material.simulator = material.attempt(
            "Clipped weights need the last checkpoint", lambda: _simulator(loaded, settings, run)
        )
    return material


def read_summary(run: RunFolder) -> dict[str, Any]:
    """The content of summary.json; {} of a run that is not finished."""
    if not run.summary.exists():
        return {}
    try:
        document = json.loads(run.summary.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{run.summary}: could not be read: {error}; restore it") from error
    if not isinstance(document, dict):
        raise InputError(f"{run.summary}: is no summary of a run; restore it")
    return document


def _float(config: QuantizeConfig, material: Material) -> LoadedModel:
    """The network that the run began with; a random one is made anew from the run's seed."""
    torch.manual_seed(config.seed)
    options: dict[str, Any] = {
        "checkpoint": config.checkpoint,
        "pretrained": config.pretrained,
        "reset_classifier": config.reset_classifier,
        "img_size": config.img_size,
        "crop_pct": config.crop_pct,
    }
    if material.split is not None:
        return load_for_data(config.model, material.split.classes, **options)[0]
    assert material.classes is not None
    return load_model(config.model, num_classes=len(material.classes.names) or None, **options)


def _simulator(loaded: LoadedModel, config: QuantizeConfig, run: RunFolder) -> QuantizedModel:
    model = insert_quantizers(loaded, config)
    state.load_model(run.checkpoints, model)
    return model.eval()


def _gathered(material: Material, asked: ReportConfig, listener: Listener) -> dict[str, Any]:
    run, config, summary = material.run, material.config, material.summary
    document: dict[str, Any] = {
        "mecq": __version__,
        "run": str(run.path),
        "model": summary.get("model") or (config.model if config else None),
        "wbits": summary.get("wbits") or (config.wbits if config else None),
        "abits": summary.get("abits") or (config.abits if config else None),
        "finished": bool(summary.get("finished")),
        "summary": summary,
        "training": curves.gather(read_rows(run.metrics)),
        "machine": facts(),
        "command": _command(run),
        "settings": run.config.read_text(encoding="utf-8") if run.config.exists() else None,
        "left_out": material.left_out,
    }
    model = material.model
    if model is None:
        return document
    for key in ("model", "wbits", "abits"):
        document[key] = model.metadata.get(key, document[key])
    fp32 = int(model.metadata.get("fp32_bytes", 0))
    document["sizes"] = totals(model, fp32, run.artifact.stat().st_size)
    seen = _Seen(material, model, asked.images)
    seen.look(listener)
    document["layers"] = layers.gather(
        site_rows(model), model, seen.watched, seen.floats, material.simulator, seen.fp_weights
    )
    document["watched_images"] = seen.watched_images
    document["answers"] = seen.answers()
    document["runtime"] = look_at_runtime(run, model, material.fp, seen.some, listener)
    return document


def _command(run: RunFolder) -> list[str] | None:
    if not run.config.exists():
        return None
    return ["mecq", "quantize", "--config", str(run.config), "--output", f"{run.path}-again"]


class _Seen:
    """Both networks on the evaluation images.

    Attributes:
        some: normalised images [N, C, H, W] that the activations were counted on; None without.
        watched, floats: codes and FP values of those.
        fp_weights: of the FP network by layer.
    """

    def __init__(self, material: Material, model: IntegerModel, images: int) -> None:
        self.material, self.model = material, model
        self.dataset: ImageDataset | None = None
        self.total = 0
        self.some: Tensor | None = None
        self.watched: layers.Watched | None = None
        self.floats: layers.Floats | None = None
        self.watched_images = 0
        self._answers: predictions.Answers | None = None
        split, classes = material.split, material.classes
        if split is not None and classes is not None and material.preprocessing is not None:
            self.total = len(split)
            chosen = split.take(_evenly(len(split), images))
            self.dataset = ImageDataset(chosen, material.preprocessing, classes.indices)
        fp = None
        if material.fp is not None:
            fp = insert(copy.deepcopy(material.fp), model.input_shape, BitPlan(32, 32)).eval()
        self._fp = fp
        sites = fp.sites() if fp is not None else []
        self.fp_weights = {s.name: s.weight for s in sites if isinstance(s, ProductSite)}

    def look(self, listener: Listener) -> None:
        """At the images, where there are any."""
        if self.dataset is None:
            return
        self._watch(listener)
        self._answers = self._answer(listener)

    def _watch(self, listener: Listener) -> None:
        assert self.dataset is not None
        split = self.dataset.split
        part = split.take(_evenly(len(split), WATCHED_IMAGES))
        preprocessing = self.dataset.preprocessing
        dataset = ImageDataset(part, preprocessing)
        size = min(eval_batch_size(preprocessing), 32)
        batches = [
            normalize(batch.images, preprocessing).contiguous()
            for batch in eval_batches(dataset, batch_size=size)
        ]
        self.watched_images = len(part)
        self.watched = layers.Watched(self.model)
        listener.start("count codes", len(part))
        for number, images in enumerate(batches):
            self.watched.see(images)
            listener.advance("count codes", min((number + 1) * size, len(part)))
        listener.finish("count codes")
        self.some = torch.cat(batches)
        if self._fp is None:
            return
        grids: dict[str, Grid | None] = {node.name: node.grid for node in self.model.nodes}
        wanted = {
            name: (grid, codes)
            for name, codes in self.watched.codes.items()
            if (grid := grids[name]) is not None
        }
        self.floats = layers.Floats(integerize(self._fp, self.model.input_shape, {}), wanted)
        for images in batches:
            self.floats.see(images)

    @torch.no_grad()
    def _answer(self, listener: Listener) -> predictions.Answers:
        assert self.dataset is not None
        integer, plain = IntegerModule(self.model), self.material.fp
        labels, said, sure, fp = [], [], [], []
        listener.start(_TASK, len(self.dataset))
        preprocessing, done = self.dataset.preprocessing, 0
        for batch in eval_batches(self.dataset, batch_size=eval_batch_size(preprocessing)):
            images = normalize(batch.images, preprocessing)
            confidence, choice = torch.softmax(integer(images).double(), 1).max(1)
            labels.append(batch.labels)
            said.append(choice)
            sure.append(confidence)
            if plain is not None:
                fp.append(plain(images).argmax(1))
            done += len(choice)
            listener.advance(_TASK, done)
        listener.finish(_TASK)
        return predictions.Answers(
            torch.cat(labels).numpy(),
            torch.cat(said).numpy(),
            torch.cat(fp).numpy() if fp else None,
            torch.cat(sure).numpy(),
        )

    def answers(self) -> dict[str, Any] | None:
        """What `mecq_cli.report.predictions` makes of them."""
        if self._answers is None or self.dataset is None or self.material.classes is None:
            return None
        split = self.dataset.split
        found = predictions.gather(self._answers, self.material.classes.names, split.paths)
        # By their place in the whole split, where their files are looked up again.
        chosen = _evenly(self.total, len(split))
        for example in found["examples"]:
            example["index"] = chosen[example["index"]]
        return {"of": self.total, "split": split.name, "root": str(split.root), **found}


def _evenly(total: int, count: int) -> list[int]:
    """``count`` of ``total`` images, or all; neighbours are often of one class."""
    places: list[int] = np.linspace(0, total - 1, min(count, total)).astype(int).tolist()
    return places


def _thumbnails(material: Material, document: Mapping[str, Any]) -> dict[int, str]:
    """The example images as data URIs, by their place in the split."""
    answers, split = document.get("answers"), material.split
    if answers is None or split is None:
        return {}
    return {
        example["index"]: predictions.thumbnail(open_rgb(split.file(example["index"])))
        for example in answers["examples"]
    }
