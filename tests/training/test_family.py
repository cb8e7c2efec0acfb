"""What kind of network a model is, and what its training takes from that."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import nn

from mecq_cli.config import QuantizeConfig
from mecq_cli.errors import UsageError
from mecq_cli.insertion import BitPlan, insert
from mecq_cli.training.family import Family, family_of
from mecq_cli.training.oscillation import require_freezing
from mecq_cli.training.recipe import Recipe, choose

KNOWN = {
    "resnet18": Family.CONVOLUTIONS,
    "resnext50_32x4d": Family.CONVOLUTIONS,  # groups, but of several channels
    "mobilenetv2_100": Family.DEPTHWISE,
    "efficientnet_lite0": Family.DEPTHWISE,
    "mnasnet_100": Family.DEPTHWISE,
    "vit_tiny_patch16_224": Family.TOKENS,
    "convnext_atto": Family.TOKENS,  # its layer norms count, not its depthwise convolutions
}


@pytest.mark.parametrize("name", KNOWN)
def test_families_of_timm(name: str) -> None:
    assert family_of(timm.create_model(name)) is KNOWN[name]


def chosen(family: Family, **settings: Any) -> Recipe:
    config = QuantizeConfig.model_validate(
        {"model": "net", "data": "data", "wbits": 4, "abits": 4, **settings}
    )
    return choose(config, 10, 32, torch.device("cpu"), family=family)


def test_oscillations_are_frozen_in_depthwise_networks_unless_told_otherwise() -> None:
    assert chosen(Family.DEPTHWISE).freeze_oscillations == 0.02
    assert any("frozen" in reason for reason in chosen(Family.DEPTHWISE).reasons)
    assert chosen(Family.CONVOLUTIONS).freeze_oscillations == 0
    told = chosen(Family.DEPTHWISE, freeze_oscillations=0.0)
    assert told.freeze_oscillations == 0
    assert not any("frozen" in reason for reason in told.reasons)
    assert chosen(Family.CONVOLUTIONS, freeze_oscillations=0.1).freeze_oscillations == 0.1


def test_nothing_is_said_to_be_frozen_that_cannot_be() -> None:
    for settings in ({"quantizer": "pact"}, {"quantizer": "n2uq"}, {"wbits": 32}, {"wbits": 8}):
        recipe = chosen(Family.DEPTHWISE, **settings)
        assert recipe.freeze_oscillations == 0
        assert not any("frozen" in reason for reason in recipe.reasons)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10)).eval()
    few = BitPlan(4, 4, quantizer="auto", first_last_bits=4)
    require_freezing(insert(net, (1, 8, 8), few, ()))
    for plan in (BitPlan(4, 4, quantizer="pact"), BitPlan(8, 4, quantizer="auto")):
        with pytest.raises(UsageError, match="--freeze-oscillations: no weight of this network"):
            require_freezing(insert(net, (1, 8, 8), plan, ()))


def test_what_is_coded_of_tokens_is_what_the_last_layer_reads() -> None:
    assert chosen(Family.TOKENS).mec_on == ("penultimate",)
    assert chosen(Family.CONVOLUTIONS).mec_on == ("stages",)
    assert chosen(Family.TOKENS, mec_on="stages+layers").mec_on == ("stages", "layers")


@pytest.mark.parametrize(("wbits", "abits", "times"), [(4, 4, 4), (2, 4, 10), (3, 2, 10)])
def test_depthwise_networks_have_a_learning_rate_of_their_own_and_that_is_told(
    wbits: int, abits: int, times: float
) -> None:
    bits = {"wbits": wbits, "abits": abits}
    plain, recipe = (chosen(f, **bits) for f in (Family.CONVOLUTIONS, Family.DEPTHWISE))
    assert recipe.lr == pytest.approx(times * plain.lr)
    assert any(f"{times} times the learning rate" in reason for reason in recipe.reasons)
    for settings in ({"lr": 0.01}, {"optimizer": "adamw"}):
        told = chosen(Family.DEPTHWISE, **bits, **settings)
        assert told.lr == chosen(Family.CONVOLUTIONS, **bits, **settings).lr
        assert not any("learning rate" in reason for reason in told.reasons)


@pytest.mark.parametrize("family", [Family.DEPTHWISE, Family.TOKENS])
def test_networks_that_do_something_else_keep_theirs(family: Family) -> None:
    """Nobody asked whether they want another one."""
    settings = {"model": "net", "data": "data", "wbits": 2, "abits": 2}
    config = QuantizeConfig.model_validate(settings)
    found = [
        choose(config, 10, 128, torch.device("cpu"), family=family, classifies=classifies)
        for classifies in (False, True)
    ]
    assert found[0].lr == pytest.approx({Family.DEPTHWISE: 0.02, Family.TOKENS: 2e-4}[family])
    assert found[1].lr > 2 * found[0].lr
    assert not any("learning rate" in reason for reason in found[0].reasons)


def test_tokens_are_trained_by_adamw_and_that_is_told() -> None:
    recipe = chosen(Family.TOKENS)
    assert recipe.optimizer == "adamw"
    assert recipe.lr == pytest.approx(1e-4)
    assert chosen(Family.TOKENS, abits=2).lr == pytest.approx(2.5e-4)
    assert any("adamw" in reason for reason in recipe.reasons)
    assert not any("adamw" in reason for reason in chosen(Family.TOKENS, optimizer="sgd").reasons)
