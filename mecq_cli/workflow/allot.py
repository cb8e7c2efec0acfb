"""The bits of the layers where a target says how many in all: measured before the training."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mecq_cli.config import TARGETS, Allotted, QuantizeConfig, from_toml, question, whole_bits
from mecq_cli.config import Allotment as Known
from mecq_cli.events import Listener
from mecq_cli.insertion import QuantizedModel
from mecq_cli.models.loading import LoadedModel
from mecq_cli.models.order import channels_last
from mecq_cli.precision import (
    CANDIDATES,
    Allotment,
    Target,
    allot,
    average_bits,
    choices_of,
    measure,
    reached,
)
from mecq_cli.quantizers import quantizers_named
from mecq_cli.settings import bytes_of
from mecq_cli.tasks.base import Task
from mecq_cli.training.family import Family, family_of
from mecq_cli.training.signals import deferring
from mecq_cli.workflow.common import insert_quantizers

IMAGES = {"coding": 64, "hessian": 256, "loss": 256}
MOST_VALUES = {"coding": 5_000_000, "hessian": 10_000_000, "loss": 10_000_000}
"""What is measured on, in one batch: 64 or 256 images, of 224 pixels 33 or 66. The geometry of
features needs fewer than outputs do (docs/method.md)."""

FEWEST, FEWEST_OF_TOKENS = 4, 16
"""Images, however large. Cells of maps are rows as well as images are; the geometry of tokens needs
images."""

FEWEST_ROWS = 32
"""Of features whose geometry is compared. That of two rows is always the same."""

Row = dict[str, Any]


def is_pending(config: QuantizeConfig) -> bool:
    """Whether bits are to be allotted: there is a target, and no run that has met it already."""
    return config.target is not None and not config.allotted


def as_stored(config: QuantizeConfig, file: Path) -> QuantizeConfig:
    """The settings with the bits of a run that met the same target, if that is what ``file`` is."""
    if not file.is_file():
        return config
    stored = from_toml(file)
    same = all(getattr(stored, key) == getattr(config, key) for key in (*TARGETS, "sensitivity"))
    if not same or not stored.allotted:
        return config
    known = {key: getattr(stored, key) for key in ("allotted", "allotment", "wbits")}
    return config.model_copy(update=known)


def with_bits(
    config: QuantizeConfig,
    loaded: LoadedModel,
    task: Task,
    device: torch.device,
    some_images: Callable[[int], Iterator[Tensor]],
    listener: Listener,
) -> QuantizeConfig:
    """Measure sensitivities and allot bits; the settings with them.

    Of several processes each does it for itself: what the first one finds has to hold for all.

    Args:
        config: with a target.
        loaded: the float model, which stays as it is.
        task: what it is for.
        device: to measure on.
        some_images: about so many normalised training images, in batches.
        listener: hears of it.

    Raises:
        UsageError: the target cannot be met.
        NumericError: a sensitivity that is not finite.
    """
    assert config.target is not None
    started = time.perf_counter()
    size = None if config.target_size is None else bytes_of(config.target_size)
    target = Target(config.target_avg_bits, size, config.target)
    count, grid = wanted(config, loaded)
    with deferring():
        model = _measured(config, loaded, grid).to(device)
    channels_last(model)
    rules = [rule.pattern for rule in config.layers if rule.wbits is not None]
    candidates = [7 if bits == 8 and config.reduce_range else bits for bits in CANDIDATES]
    choices = choices_of(model, rules, candidates)
    target.check(choices)  # before minutes are spent
    listener.note(f"bits of each layer for {config.target}: {config.sensitivity} is measured")
    if loaded.weights == "random":
        listener.warn("the float weights are random: how sensitive they are says little")
    images = torch.cat(list(some_images(count)))[:count]
    sensitivities = measure(
        config.sensitivity, model, images, choices, quantizers_named(config.quantizer).weight,
        distortion=config.mec_distortion, seed=config.seed, listener=listener,
        divergence=task.divergence,
    )  # fmt: skip
    found = allot(choices, sensitivities, target)
    average = average_bits(choices, [found.bits.get(c.name, c.bits[0]) for c in choices])
    assert average is not None
    how = Known(
        asked=question(config.model_dump()),
        images=len(images),
        seconds=round(time.perf_counter() - started, 1),
        optimal=found.optimal,
        gap=found.gap,
    )
    return config.model_copy(
        update={"allotted": _rows(found), "allotment": how, "wbits": whole_bits(average)}
    )


def shown_wbits(config: QuantizeConfig, model: QuantizedModel) -> int | float:
    """Bits of the weights for people: the average, where a target allotted them."""
    average = reached(model).average
    if not config.allotted or average is None:
        return config.wbits
    shown = round(average, 2)
    return int(shown) if shown.is_integer() else shown


def document_of(config: QuantizeConfig, model: QuantizedModel) -> dict[str, Any]:
    """What the allotment came to, as a part of a result; empty without one."""
    if not config.allotted:
        return {}
    total = reached(model)
    return {
        "allotment": {
            "sensitivity": config.sensitivity,
            "target_avg_bits": config.target_avg_bits,
            "target_size": config.target_size,
            "average_bits": total.average,
            "weight_bytes": total.bytes,
            **(config.allotment.model_dump(exclude={"asked"}) if config.allotment else {}),
        }
    }


def tell(config: QuantizeConfig, model: QuantizedModel, listener: Listener) -> None:
    """The table of the layers, a line each."""
    weights = {place: c.weights for c in choices_of(model, ["*"]) for place in c.places}
    width = max(len("layer"), *(len(row.layer) for row in config.allotted))
    listener.note(f"{'layer':<{width}} {'weights':>12}  bits  {config.sensitivity}")
    for row in config.allotted:
        listener.note(
            f"{row.layer:<{width}} {weights[row.layer]:>12,}  {row.wbits:>4}  {row.sensitivity:.2e}"
        )


def with_sensitivities(rows: list[Row], config: QuantizeConfig | None) -> list[Row]:
    """Rows of the site table, and what was measured of the layers that a target gave bits."""
    known = {} if config is None else {row.layer: row.sensitivity for row in config.allotted}
    return [
        row | {"sensitivity": known[row["layer"]]} if row["layer"] in known else row for row in rows
    ]


def wanted(config: QuantizeConfig, loaded: LoadedModel) -> tuple[int, int]:
    """How many images, and into how many cells along each side their maps are cut."""
    kind = config.sensitivity
    by_size = MOST_VALUES[kind] // math.prod(loaded.preprocessing.input_size)
    images = min(IMAGES[kind], by_size, config.calibration_images)
    if kind == "coding" and family_of(loaded.module) is Family.TOKENS:
        return max(images, FEWEST_OF_TOKENS), 1
    images = max(images, FEWEST)
    return images, math.ceil(math.sqrt(FEWEST_ROWS / images))


def _measured(config: QuantizeConfig, loaded: LoadedModel, grid: int) -> QuantizedModel:
    """A network of its own that returns all values whose geometry counts."""
    tapped = {"mec_on": "stages+penultimate", "mec_weight": 1.0, "mec_grid": grid, "allotted": ()}
    own = replace(loaded, module=copy.deepcopy(loaded.module))
    return insert_quantizers(own, config.model_copy(update=tapped))


def _rows(found: Allotment) -> tuple[Allotted, ...]:
    return tuple(
        Allotted(layer=name, wbits=bits, sensitivity=float(f"{found.costs[name]:.6g}"))
        for name, bits in found.bits.items()
    )
