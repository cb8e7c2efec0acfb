"""What follows the network while it trains: its average, frozen oscillations, lowered bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mecq_cli.config import QuantizeConfig
from mecq_cli.errors import UsageError
from mecq_cli.insertion import BitPlan, insert
from mecq_cli.quantizers import QUANTIZERS, Quantizer, UniformWeight
from mecq_cli.sites import ProductSite
from mecq_cli.training import averaging, oscillation, state
from mecq_cli.training.averaging import WeightAverage
from mecq_cli.training.lowering import Stage, require_lowering
from mecq_cli.training.oscillation import OscillationFreezing
from mecq_cli.training.recipe import Recipe, choose
from tests.exactness import float_network
from tests.training.test_loop import Recorder, metrics, trainer


def test_the_average_is_the_exponential_one_and_forgets_its_beginning() -> None:
    layer = nn.Linear(3, 2)
    average = WeightAverage(layer, 0.75)
    expected = layer.weight.detach().clone()
    for n in range(60):
        with torch.no_grad():
            layer.weight.add_(1.0)
        average.update(0.0)
        decay = min(0.75, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * layer.weight.detach()
    last = layer.weight.detach().clone()
    average.settle()
    torch.testing.assert_close(layer.weight.detach(), expected)
    # A line is followed at the distance decay / (1 - decay): where it began plays no part.
    torch.testing.assert_close(last - expected, torch.full_like(last, 3.0), atol=0.1, rtol=0)


@pytest.mark.parametrize("quantizer", ["lsq", "lsq-mid-rise"])
def test_a_weight_that_jumps_to_and_fro_is_frozen_where_it_is_most(quantizer: str) -> None:
    plan = BitPlan(2, 2, quantizer=quantizer)
    model = insert(float_network("resnet20_cifar", 16), (3, 16, 16), plan)
    site = next(s for s in model.sites() if isinstance(s, ProductSite) and s.wbits == 2)
    rounding = site.weight_quantizer
    assert isinstance(rounding, UniformWeight)
    levels = (-3.0, -1.0) if rounding.mid_rise else (-1.0, 0.0)
    step = rounding.scale.detach()[0]
    flat = site.weight.data[0].flatten()  # a view: of one output channel

    with torch.no_grad():
        flat[0] = step * levels[0]
    freezing = OscillationFreezing(model, 0.02)
    watched = [s.name for s in model.sites() if isinstance(s, ProductSite) and s.wbits == 2]
    assert list(freezing.saved_states()) == watched, "not the first and the last layer of 8 bits"
    before, _ = rounding.integers(site.weight)
    for n in range(300):
        with torch.no_grad():
            flat[0] = step * levels[n % 4 == 0]  # three times of four on the lower one
            flat[1] = step * levels[n >= 150]  # moves once
        freezing.update(1.0)
    assert 0 < freezing.frozen_share < 1e-4
    for _ in range(300):  # however far the optimizer moves it from then on
        with torch.no_grad():
            flat[0] = step * levels[1]
        freezing.update(1.0)
    with torch.no_grad():
        flat[0], flat[1] = step * levels[1], step * levels[0]
        rounding.scale.mul_(2.0)
    freezing.update(1.0)
    integers, _ = rounding.integers(site.weight)
    assert float(integers[0].flatten()[0]) == levels[0]
    assert float(flat[0]) == pytest.approx(levels[0] * float(rounding.scale.detach()[0]))
    rounding.scale.data.div_(2.0)
    freezing.settle()
    after, _ = rounding.integers(site.weight)
    assert int((after != before).sum()) <= 2, "all the others are where they were"


def test_bits_are_lowered_one_by_one(tmp_path: Path) -> None:
    listener = Recorder()
    one = trainer(tmp_path, listener, lower_from=4, epochs=10, mec_weight=0.0)
    assert one.stages == [Stage(0, 4), Stage(6, 3), Stage(12, 0)]
    one.train("")
    assert [n for n in listener.notes if n.startswith("step")] == [
        "step 0: at least 4 bits",
        "step 6: at least 3 bits",
        "step 12: all bits as they were asked for",
    ]
    for site in one.model.sites():
        if isinstance(site, ProductSite) and site.wbits == 2:
            assert site.weight_quantizer is not None
            integers, _ = site.weight_quantizer.integers(site.weight)
            assert (int(integers.min()), int(integers.max())) == (-2, 1)


def test_a_network_whose_bits_are_still_lowered_is_not_evaluated(tmp_path: Path) -> None:
    """Its integers would not fit those that were asked for."""
    one = trainer(tmp_path, lower_from=4, epochs=10, mec_weight=0.0)
    one.evaluation, one.eval_every = (lambda: 50.0), 4
    one.train("")
    rows = metrics(tmp_path)
    key = one.step.task.figures.eval_key
    assert [row["step"] for row in rows if key in row] == [12, 16, 20, 24, 28, 32, 36]


def test_lowering_that_cannot_be_is_refused() -> None:
    model = insert(float_network("resnet20_cifar", 16), (3, 16, 16), BitPlan(2, 2))

    def recipe(**settings: Any) -> Recipe:
        values = {"model": "m", "wbits": 2, "abits": 2, "data": "d", **settings}
        return choose(QuantizeConfig.model_validate(values), 2, 8, torch.device("cpu"))

    require_lowering(model, recipe(lower_from=4, epochs=4))
    require_lowering(model, recipe(lower_from=0, epochs=0))
    with pytest.raises(UsageError, match=r"4: 6 steps are too few to lower the bits 2 times; .* 7"):
        require_lowering(model, recipe(lower_from=4, epochs=3))
    with pytest.raises(UsageError, match=r"3: 2 steps are too few to lower the bits once; .* 4"):
        require_lowering(model, recipe(lower_from=3, epochs=1))
    four = insert(float_network("resnet20_cifar", 16), (3, 16, 16), BitPlan(4, 4))
    with pytest.raises(UsageError, match="4: the fewest bits of this network are 4"):
        require_lowering(four, recipe(lower_from=4, epochs=10))


def test_stopped_at_the_begin_of_a_stage(tmp_path: Path) -> None:
    import os
    import signal

    from mecq_cli.errors import Interrupted

    for name in "ab":
        (tmp_path / name).mkdir()
    whole = trainer(tmp_path / "a", lower_from=4, epochs=5, mec_weight=0.0)
    assert [stage.first_step for stage in whole.stages] == [0, 3, 6]
    whole.train("")
    for at in (2, 3, 6, 7):
        stop = Recorder({at: lambda: os.kill(os.getpid(), signal.SIGINT)})
        part = trainer(tmp_path / "b", stop, lower_from=4, epochs=5, mec_weight=0.0)
        part.resume()
        with pytest.raises(Interrupted):
            part.train("")
    last = trainer(tmp_path / "b", lower_from=4, epochs=5, mec_weight=0.0)
    assert last.resume()
    last.train("")
    wanted = whole.model.state_dict()
    for name, value in last.model.state_dict().items():
        assert torch.equal(value, wanted[name]), name


@pytest.mark.parametrize("name", QUANTIZERS)
def test_quantizers_that_know_their_own_bits_only_say_so(name: str) -> None:
    """The message names those that can."""
    model = insert(float_network("resnet20_cifar", 16), (3, 16, 16), BitPlan(2, 2, quantizer=name))
    quantizers = [m for m in model.modules() if isinstance(m, Quantizer)]
    before = [q.kernels for q in quantizers]
    recipe = choose(
        QuantizeConfig(model="m", wbits=2, abits=2, data="d", lower_from=4, epochs=10), 10, 8,
        torch.device("cpu"),
    )  # fmt: skip
    if name in ("auto", "lsq", "lsq+", "lsq-mid-rise", "ewgs"):
        require_lowering(model, recipe)
        assert [q.kernels for q in quantizers] == before
        return
    with pytest.raises(UsageError, match=r"--lower-from: the bits of \w+ cannot") as caught:
        require_lowering(model, recipe)
    assert "use --quantizer auto, lsq, lsq+, lsq-mid-rise or ewgs, or" in str(caught.value)


def test_what_a_checkpoint_with_parts_takes_is_known_before(tmp_path: Path) -> None:
    one = trainer(tmp_path, max_steps=2, ema=0.9, freeze_oscillations=0.02)
    remembered = (*averaging.REMEMBERED, *oscillation.REMEMBERED)
    expected = state.expected_bytes(one.model, one.optimizer, remembered)
    one.train("")
    taken = state.checkpoints(tmp_path / "checkpoints")[-1].stat().st_size
    assert taken <= expected <= 1.2 * taken
