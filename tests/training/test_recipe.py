"""The choices that the settings leave open."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mecq_cli.config import QuantizeConfig
from mecq_cli.insertion import BitPlan, insert
from mecq_cli.quantizers import Quantizer
from mecq_cli.tasks.registry import CLASSIFICATION
from mecq_cli.training.recipe import choose, default_batch_size, default_epochs, make_optimizer
from mecq_cli.workflow.chosen import filled_in
from tests.exactness import float_network

CPU = torch.device("cpu")


def config(**changes: Any) -> QuantizeConfig:
    values: dict[str, Any] = {"model": "m", "wbits": 2, "abits": 2, "data": Path("d"), "amp": "off"}
    return QuantizeConfig(**values | changes)


def test_max_steps_and_epochs_bound_the_steps() -> None:
    assert choose(config(epochs=3), 10, 32, CPU).total_steps == 30
    assert choose(config(epochs=3, max_steps=7), 10, 32, CPU).total_steps == 7
    assert choose(config(epochs=3, max_steps=70), 10, 32, CPU).total_steps == 30
    assert choose(config(epochs=0), 10, 32, CPU).total_steps == 0
    assert choose(config(max_steps=0), 10, 32, CPU).total_steps == 0


def test_given_values_are_taken() -> None:
    recipe = choose(config(epochs=2, lr=0.3, weight_decay=0.1, warmup_epochs=0.5), 10, 32, CPU)
    assert (recipe.lr, recipe.weight_decay, recipe.warmup_steps) == (0.3, 0.1, 5)
    assert choose(config(distill=False), 10, 32, CPU).distill_weight == 0


def test_what_a_run_stores_of_the_warmup_gives_the_same_steps() -> None:
    for per_epoch in range(1, 500):
        chosen = choose(config(recipe="standard"), per_epoch, 32, CPU)
        stored = filled_in(config(), chosen, CLASSIFICATION)
        again = choose(stored, per_epoch, 32, CPU)
        assert again.warmup_steps == chosen.warmup_steps


def test_the_float_model_teaches_where_something_reads_it() -> None:
    assert choose(config(), 10, 32, CPU).has_teacher
    assert choose(config(mec_weight=0.0), 10, 32, CPU).has_teacher
    assert choose(config(distill=False), 10, 32, CPU).has_teacher
    assert not choose(config(distill=False, mec_weight=0.0), 10, 32, CPU).has_teacher
    assert not choose(config(distill=False, mec_views="quantized"), 10, 32, CPU).has_teacher


def test_weights_are_coded_as_one_view() -> None:
    recipe = choose(config(mec_on="weights", distill=False), 10, 32, CPU)
    assert (recipe.mec_weight, recipe.mec_views, recipe.mec.term) == (0.1, 1, "entropy")
    assert not recipe.has_teacher


def test_the_default_rate_follows_the_batch() -> None:
    def rate(batch: int, optimizer: str) -> float:
        return choose(config(optimizer=optimizer), 10, batch, CPU).lr

    assert rate(256, "sgd") == pytest.approx(2 * rate(128, "sgd"))
    assert rate(512, "adamw") == pytest.approx(2 * rate(128, "adamw"))


@pytest.mark.parametrize(("images", "size"), [(1, 32), (20, 32), (50_000, 32), (3000, 224)])
def test_default_batches_fit_the_data(images: int, size: int) -> None:
    batch = default_batch_size(images, size)
    assert batch in (8, 16, 32, 64, 128)
    assert batch == 8 or images >= 8 * batch
    assert size <= 64 or batch <= 32
    assert 5 <= default_epochs(max(images // batch, 1)) <= 60


def test_groups_and_schedule() -> None:
    """Every parameter that is trained once; steps without decay; up, then down to nothing."""
    model = insert(float_network("resnet20_cifar", 32), (3, 32, 32), BitPlan(2, 2))
    recipe = choose(config(epochs=1, lr=1.0, scale_lr=0.25), 100, 32, CPU)
    optimizer, schedule = make_optimizer(model, recipe)
    grouped = [p for group in optimizer.param_groups for p in group["params"]]
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert {id(p) for p in grouped} == trained
    assert len(trained) == len([*model.parameters()]) - 1  # all but the step of the images
    assert len(grouped) == len({id(p) for p in grouped})
    steps = {id(m.scale) for m in model.modules() if isinstance(m, Quantizer)}
    for group in optimizer.param_groups:
        kinds = {id(p) in steps for p in group["params"]}
        assert len(kinds) == 1
        decayed = all(p.dim() > 1 for p in group["params"]) and kinds == {False}
        assert (group["weight_decay"] > 0) is decayed
    rates = []
    for step in range(recipe.total_steps):
        schedule.step_update(step)
        rates.append([group["lr"] for group in optimizer.param_groups])
    first = [row[0] for row in rates]
    peak = first.index(max(first))
    assert peak == recipe.warmup_steps
    assert max(first) == pytest.approx(1.0, rel=0.02)
    assert first[: peak + 1] == sorted(first[: peak + 1])
    assert first[peak:] == sorted(first[peak:], reverse=True)
    assert first[-1] < 0.01
    assert rates[peak][-1] == pytest.approx(0.25 * rates[peak][0])


def test_no_group_begins_above_the_learning_rate_it_is_to_reach() -> None:
    model = insert(float_network("resnet20_cifar", 16), (3, 16, 16), BitPlan(2, 2))
    recipe = choose(config(epochs=10, lr=0.02, scale_lr=1e-3), 10, 8, CPU)
    assert recipe.warmup_steps > 1
    optimizer, schedule = make_optimizer(model, recipe)
    for step in range(recipe.warmup_steps):
        schedule.step_update(step)
        assert optimizer.param_groups[-1]["lr"] < 0.02 * 1e-3
    schedule.step_update(recipe.warmup_steps)
    assert optimizer.param_groups[-1]["lr"] == pytest.approx(0.02 * 1e-3, rel=0.05)


def test_weights_beside_features_are_coded_as_strongly_as_alone() -> None:
    alone = choose(config(mec_on="weights"), 10, 32, CPU)
    for term in (None, "entropy", "alignment"):
        beside = choose(config(mec_on="stages+weights", mec_term=term), 10, 32, CPU)
        assert beside.mec_weight * beside.mec.lone == pytest.approx(alone.mec_weight)
