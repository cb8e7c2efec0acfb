"""All estimators against float64: values, gradients, hostile input, invariances."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mecq_cli.entropy import EXPERTS, MoeState, coding_length, report
from mecq_cli.errors import CheckpointError, NumericError, UsageError
from mecq_cli.workflow.bench_entropy import FAMILIES, make

DISTORTIONS = (0.01, 0.06, 1.0)


def answer(z: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    z = z.detach().clone().requires_grad_()
    value = coding_length(z, **options)
    value.backward()
    assert z.grad is not None
    assert bool(torch.isfinite(value))
    assert bool(torch.isfinite(z.grad).all())
    return value.detach().double(), z.grad.double()


@lru_cache(maxsize=8)
def eigen(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of the smaller z z^T in float64, independent of the code under test."""
    turned = z.double() if z.shape[0] <= z.shape[1] else z.double().mT
    x, u = torch.linalg.eigh(turned @ turned.mT)
    return x.clamp(min=0.0), u, u.mT @ turned


def reference(z: Tensor, distortion: float) -> tuple[Tensor, Tensor]:
    lam = 1.0 / (z.shape[0] * distortion)
    x, u, rotated = eigen(z)
    gradient = 2.0 * lam * (u / (1.0 + lam * x)) @ rotated
    return (lam * x).log1p().sum(), gradient if gradient.shape == z.shape else gradient.mT


def check(z: Tensor, distortion: float, tolerance: float = 1e-3, **options: Any) -> None:
    true, gradient = reference(z, distortion)
    value, found = answer(z, distortion=distortion, **options)
    assert float((value - true).abs()) <= tolerance * float(true)
    if bool(gradient.any()):
        assert float(F.cosine_similarity(found.flatten(), gradient.flatten(), dim=0)) >= 0.999
        ratio = float(found.norm() / gradient.norm())
        assert abs(ratio - 1.0) <= 0.05
    else:
        assert not bool(found.any())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shape", [(32, 64), (64, 32), (200, 150), (512, 520), (600, 512)])
def test_exact_and_moe_hold_the_bars(family: str, shape: tuple[int, int]) -> None:
    z = make(family, *shape)
    state = MoeState()
    for distortion in DISTORTIONS:
        check(z, distortion, tolerance=3e-4, estimator="exact")
        check(z, distortion, state=state)  # cold at first, then warm from another distortion
    check(z, 0.06)


@pytest.mark.long
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "shape", [(512, 512), (1024, 512), (512, 2048), (1024, 2048), (2048, 2048), (4096, 4096)]
)
def test_the_full_grid(family: str, shape: tuple[int, int]) -> None:
    z = make(family, *shape, seed=1)
    state = MoeState()
    for distortion in DISTORTIONS:
        check(z, distortion)
        for _ in range(3):
            check(z, distortion, state=state)


@pytest.mark.parametrize("expert", [e for e in EXPERTS if e != "exact"])
@pytest.mark.parametrize("shape", [(520, 640), (640, 520)])
def test_each_expert_alone_answers_and_holds_the_bars(
    expert: str, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Rates with which every expert is cheaper than a factorisation.
    from mecq_cli.entropy import cost

    costs = cost.Costs(product=1e15, thin=1e15, factor=1e9, call=0.0)
    monkeypatch.setattr("mecq_cli.entropy.moe.costs_on", lambda device: costs)
    state = MoeState()
    for family in ("isotropic", "classes-10"):
        distortion = {"head": 0.06, "line": 2000.0}.get(expert[:4], 1.0)
        check(make(family, *shape), distortion, state=state, experts=(expert,))
    others = set(state.counts) - {expert}
    assert not others, state.counts


def test_long_tails_at_side_512_are_not_answered_by_cholesky() -> None:
    for family in ("relu", "relu-pooled", "classes-10", "power-1", "power-2", "rank-one"):
        state = MoeState()
        for seed in range(3):
            check(make(family, 512, 600, seed), 0.06, state=state)
        assert report(state) == {"calls": 3, "experts": {"head_order1": 1.0}}


def test_where_nothing_else_holds_exact_answers_and_the_others_pause() -> None:
    z = make("isotropic", 512, 512)
    state = MoeState()
    for _ in range(6):
        check(z, 0.01, state=state)
    assert state.counts == {"exact": 6}
    assert state.wait > 0


@pytest.mark.parametrize("estimator", ["exact", "moe"])
@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1e3, 1e6, 1e18, 1e37])
@pytest.mark.parametrize("shape", [(40, 30), (520, 512)])
def test_no_nan_for_any_finite_input(estimator: str, scale: float, shape: tuple[int, int]) -> None:
    for family in ("rank-one", "duplicated", "relu"):
        z = make(family, *shape) * scale
        value, _ = answer(z, estimator=estimator)
        lower = torch.as_tensor(scale).double() ** 2 / 0.06
        # logdet(I + K) >= log(1 + tr K)
        assert float(value) >= 0.99 * float(lower.log1p()) - 1e-38  # what float32 can hold


def test_rank_one_at_any_scale_is_its_closed_form() -> None:
    for scale in (1e-6, 1e-3, 1.0, 1e4, 1e10, 1e30):
        z = torch.ones(60, 50) * scale
        value, gradient = answer(z, distortion=0.06, estimator="exact")
        x = 50.0 * scale * scale / 0.06
        true = torch.tensor(x, dtype=torch.float64).log1p()
        torch.testing.assert_close(value, true, rtol=3e-4, atol=0.0)
        expected = 2.0 * scale / (60 * 0.06) / (1.0 + x)
        torch.testing.assert_close(
            gradient, torch.full_like(gradient, expected), rtol=2e-3, atol=0.0
        )


@pytest.mark.parametrize("estimator", ["exact", "moe", "taylor"])
def test_gradcheck(estimator: str) -> None:
    generator = torch.Generator().manual_seed(0)
    for shape in ((6, 9), (9, 6)):
        z = 0.3 * torch.randn(*shape, generator=generator, dtype=torch.float64)
        z.requires_grad_()
        options = {"tolerance": 1e9} if estimator == "taylor" else {}
        assert torch.autograd.gradcheck(
            lambda z, o=options: coding_length(z, distortion=1.0, estimator=estimator, **o), (z,)
        )


@pytest.mark.parametrize("side", [48, 520])
@pytest.mark.parametrize("estimator", ["exact", "moe"])
def test_invariant_under_permutation_and_rotation(side: int, estimator: str) -> None:
    generator = torch.Generator().manual_seed(3)
    z = make("classes-10", side, side + 40)
    value, gradient = answer(z, estimator=estimator)
    order = torch.randperm(side, generator=generator)
    rotation = torch.linalg.qr(torch.randn(side + 40, side + 40, generator=generator)).Q
    tolerance = 1e-5 if estimator == "exact" else 1e-3
    for changed, back in (
        (z[order], gradient[order]),
        (z @ rotation, gradient @ rotation.double()),
    ):
        other, found = answer(changed, estimator=estimator)
        torch.testing.assert_close(other, value, rtol=tolerance, atol=0.0)
        assert float(F.cosine_similarity(found.flatten(), back.flatten(), dim=0)) > 1 - tolerance


def test_precision_of_the_input_and_autocast() -> None:
    z = make("relu", 520, 530)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for estimator in ("exact", "moe"):
            value, gradient = answer(z, estimator=estimator)
            plain = answer(z, estimator=estimator)
            torch.testing.assert_close((value, gradient), plain)
            check(z, 0.06, estimator=estimator)
    half = z.bfloat16().requires_grad_()
    coding_length(half).backward()
    assert half.grad is not None
    assert half.grad.dtype == torch.bfloat16
    assert coding_length(z.double()).dtype == torch.float64
    assert coding_length(half).dtype == torch.float32


def test_taylor_is_right_or_says_that_it_is_not() -> None:
    held = 0
    for family in FAMILIES:
        for distortion in DISTORTIONS:
            z = make(family, 200, 300)
            try:
                check(z, distortion, tolerance=1e-2, estimator="taylor")
                held += 1
            except NumericError:
                options = {"estimator": "taylor", "on_divergence": "exact"}
                check(z, distortion, tolerance=1e-5, **options)
    assert 8 < held < 3 * len(FAMILIES)


def test_a_restored_state_goes_on_bit_for_bit() -> None:
    batches = [make("relu", 512, 512, seed) for seed in range(4)]
    state, other = MoeState(), MoeState()
    for z in batches[:2]:
        answer(z, state=state)
    saved = state.state_dict()
    assert set(saved) == {"tensors", "values"}
    other.load_state_dict(saved)
    for z in batches[2:]:
        one, two = answer(z, state=state), answer(z, state=other)
        assert torch.equal(one[0], two[0])
        assert torch.equal(one[1], two[1])
    assert state.state_dict()["values"] == other.state_dict()["values"]
    hostile: list[dict[str, Any]] = [
        {},
        {"values": {}, "tensors": {}},
        {"values": None, "tensors": {}},
    ]
    for broken in hostile:
        with pytest.raises(CheckpointError):
            other.load_state_dict(broken)


def test_the_global_random_state_is_left_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    coding_length(make("relu", 512, 512))
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize(
    ("z", "options"),
    [
        (torch.zeros(4), {}),
        (torch.zeros(0, 4), {}),
        (torch.zeros(4, 4, dtype=torch.long), {}),
        (torch.zeros(4, 4), {"distortion": 0.0}),
        (torch.zeros(4, 4), {"distortion": float("nan")}),
        (torch.zeros(4, 4), {"estimator": "best"}),
        (torch.zeros(4, 4), {"experts": ("oracle",)}),
        (torch.zeros(4, 4), {"tolerance": 2.0}),
        (torch.zeros(4, 4), {"estimator": "taylor", "order": 0}),
        (torch.zeros(4, 4), {"estimator": "taylor", "on_divergence": "hope"}),
    ],
)
def test_settings_that_make_no_sense(z: Tensor, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        coding_length(z, **options)


def test_not_a_number_stays_one() -> None:
    for estimator in ("exact", "moe"):
        z = make("relu", 520, 512)
        z[3, 4] = float("nan")
        assert bool(coding_length(z, estimator=estimator).isnan())
