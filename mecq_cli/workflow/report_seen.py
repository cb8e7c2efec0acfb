"""The layers of both networks of a report on the evaluation images."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from mecq_cli.data import ImageDataset, dataset_of, eval_batches, evenly, normalize
from mecq_cli.events import Listener
from mecq_cli.insertion import BitPlan, insert
from mecq_cli.integer.ir import Grid, IntegerModel
from mecq_cli.integerize import integerize
from mecq_cli.report import layers
from mecq_cli.sites import ProductSite
from mecq_cli.workflow.common import eval_batch_size
from mecq_cli.workflow.report_material import Material

WATCHED_IMAGES = 256
"""For the codes of activations; each image gives thousands of values."""


class Seen:
    """Both networks on the evaluation images.

    Attributes:
        dataset: these images; None where they are gone.
        places: of these in the split.
        some: normalised images [N, C, H, W] that the activations were counted on; None without.
        watched, floats: codes and FP values of those.
        fp_weights: of the FP network by layer.
    """

    def __init__(self, material: Material, model: IntegerModel, images: int) -> None:
        self.material, self.model = material, model
        self.dataset: ImageDataset | None = None
        self.places: list[int] = []
        self.some: Tensor | None = None
        self.watched: layers.Watched | None = None
        self.floats: layers.Floats | None = None
        self.watched_images = 0
        split, classes = material.split, material.classes
        if split is not None and classes is not None and material.preprocessing is not None:
            self.places = evenly(len(split), images)
            chosen = split.take(self.places)
            self.dataset = dataset_of(chosen, material.preprocessing, classes.indices)
        fp = None
        if material.fp is not None:
            fp = insert(copy.deepcopy(material.fp), model.input_shape, BitPlan(32, 32)).eval()
        self._fp = fp
        sites = fp.sites() if fp is not None else []
        self.fp_weights = {s.name: s.weight for s in sites if isinstance(s, ProductSite)}

    def look(self, listener: Listener) -> None:
        """Count the codes and the FP values of some of the images, where there are any."""
        if self.dataset is None:
            return
        split = self.dataset.split
        part = split.evenly(WATCHED_IMAGES)
        preprocessing = self.dataset.preprocessing
        dataset = dataset_of(part, preprocessing)
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
