"""Two views' coding lengths and agreement at once, against the exact estimator on each."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mecq_cli.entropy import EntropyRegularizer, EntropySettings, exact_coding_length, normalise
from mecq_cli.entropy.pair import WIDEST_SIDE, PairTerms, pair_terms
from mecq_cli.entropy.representation import standardise

Shape = tuple[int, int]


def features(samples: int, width: int, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(2, samples, rank, generator=generator)
    first, second = left @ torch.randn(rank, width, generator=generator)
    return first.relu(), second


def said_of(one: Tensor, other: Tensor, distortion: float) -> list[Tensor]:
    """Of two prepared views, each length by the exact estimator."""
    both = torch.cat((one, other), 1) * 0.5**0.5
    lengths = [exact_coding_length(z, distortion) for z in (both, one, other)]
    return [*lengths, (one * other).sum(1).mean()]


def by_the_book(first: Tensor, second: Tensor, distortion: float) -> list[Tensor]:
    """What `pair_terms` says of one site, in float64 and by autograd."""
    one, other = (normalise(standardise(x.double())) for x in (first, second))
    return said_of(one, other, distortion)


def rounding(first: Tensor, second: Tensor, distortion: float) -> float:
    """What float32 may leave of a gradient that the preparation takes away, perhaps all of it.

    Short rows are what is left of a difference: they are as inexact as they are short, and the
    gradient is divided by their length once more.
    """
    standard = standardise(first.detach())
    view = normalise(standard).requires_grad_()
    terms = said_of(view, normalise(standardise(second.double())), distortion)
    (gradient,) = torch.autograd.grad(weighed(terms), view)
    norms = standard.norm(dim=1, keepdim=True).clamp(1e-6, 1.0)
    rate = (first.detach().var(0, correction=0) + 1e-5).rsqrt()
    return 1e-5 * float((gradient / norms.square() * rate).norm())


def weighed(terms: Sequence[Tensor]) -> Tensor:
    joint, first, _, agreement = terms
    return (joint - 0.3 * first - 2.0 * agreement).sum()


@settings(deadline=None)
@given(
    samples=st.integers(1, 150),
    widths=st.lists(st.integers(1, 200), min_size=1, max_size=4),
    rank=st.integers(1, 40),
    distortion=st.sampled_from([0.01, 0.06, 0.5, 1.0]),
    seed=st.integers(0, 1000),
)
def test_values_and_gradients_are_the_exact_ones(
    samples: int, widths: list[int], rank: int, distortion: float, seed: int
) -> None:
    sites = [features(samples, width, rank, seed + i) for i, width in enumerate(widths)]
    first = [one.requires_grad_() for one, _ in sites]
    found = pair_terms(first, [other for _, other in sites], distortion)
    if samples == 1:  # nothing is left of it
        assert found is None
        return
    assert found is not None
    exact = [one.detach().double().requires_grad_() for one in first]
    wanted = [
        by_the_book(one, other, distortion) for one, (_, other) in zip(exact, sites, strict=True)
    ]
    for values, goals in zip(found, zip(*wanted, strict=True), strict=True):
        assert values.dtype == torch.float32
        for value, goal in zip(values, goals, strict=True):
            assert value.item() == pytest.approx(goal.item(), rel=1e-3, abs=1e-4)
    got = torch.autograd.grad(weighed(found), first)
    true = torch.autograd.grad(torch.stack([weighed(w) for w in wanted]).sum(), exact)
    for one, goal, x, (_, other) in zip(got, true, exact, sites, strict=True):
        error = float((one.double() - goal).norm())
        assert error <= 0.02 * float(goal.norm()) + 1e-5 + rounding(x, other, distortion)


@pytest.mark.parametrize("shapes", [[(5, 3)], [(5, 8)], [(4, 4), (4, 6), (4, 2), (4, 6)]])
def test_the_gradient_is_that_of_the_values(shapes: list[Shape]) -> None:
    sites = [features(*shape, rank=4, seed=i) for i, shape in enumerate(shapes)]
    second = [other.double() for _, other in sites]

    def terms(*first: Tensor) -> PairTerms:
        found = pair_terms(first, second, 0.06)
        assert found is not None
        # Of the second view alone nothing flows to the first.
        return found._replace(second=found.second.detach())

    first = [(one + 0.1).double().requires_grad_() for one, _ in sites]
    assert torch.autograd.gradcheck(terms, first)


def test_short_rows_are_turned_and_stretched_by_their_gradient() -> None:
    """A row that `normalise` divides by its least length, beside others."""
    row = torch.arange(6.0)[:, None] * torch.tensor([[1e-9, 2e-9]]) + 3.0
    x = (torch.cat((row.double(), torch.zeros(6, 2).double()), 1)).requires_grad_()
    y = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = pair_terms([x], [y], 0.06)
    assert found is not None
    (got,) = torch.autograd.grad(found.agreement.sum(), x)
    (true,) = torch.autograd.grad(by_the_book(x, y, 0.06)[3], x)
    torch.testing.assert_close(got, true)


def test_rows_of_zeros_and_equal_rows() -> None:
    zero, (same, _) = torch.zeros(6, 4), features(6, 4, 3, 0)
    found = pair_terms([same], [same.clone()], 0.06)
    assert found is not None
    for alone in (found.first, found.second):
        assert float(found.joint) == pytest.approx(float(alone), rel=1e-5)
    assert float(found.agreement) == pytest.approx(1.0, rel=1e-5)
    assert pair_terms([zero], [zero], 0.06) is None  # nothing to code: the estimators know that


def test_a_site_of_which_nothing_is_coded_is_left_to_the_estimators() -> None:
    constant = torch.ones(6, 4)
    assert pair_terms([constant], [constant], 0.06) is None
    first, second = features(6, 4, 3, 0)
    assert pair_terms([first, constant], [second, constant], 0.06) is None


def test_what_float32_cannot_hold_is_left_to_the_estimators() -> None:
    first, second = features(20, 10, 3, 0)
    assert pair_terms([first], [second], 1e-9) is None
    assert pair_terms([first * torch.nan], [second], 0.06) is None
    wide = torch.randn(WIDEST_SIDE + 1, WIDEST_SIDE + 1)
    assert pair_terms([first, wide], [second, wide], 0.06) is None


@pytest.mark.parametrize("term", ["divergence", "entropy"])
@pytest.mark.parametrize(
    "shapes", [[(24, 10), (24, 30)], [(240, 230)], [(240, 30), (240, 230), (240, 20)]]
)
def test_the_loss_does_not_depend_on_the_way(shapes: list[Shape], term: str) -> None:
    sites = {f"{i}": features(*shape, rank=6, seed=i) for i, shape in enumerate(shapes)}
    losses, gradients = [], []
    for experts in ((), ("exact",)):  # with experts named, an estimator answers for each length
        settings = EntropySettings(term=term, experts=experts, warmup=0.0)
        first = {name: one.clone().requires_grad_() for name, (one, _) in sites.items()}
        second = {name: other for name, (_, other) in sites.items()}
        found = EntropyRegularizer(settings)(first, second)
        assert list(found.coding_lengths) == list(sites)
        losses.append(found.loss.item())
        gradients.append(torch.autograd.grad(found.loss, list(first.values())))
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    for one, other in zip(*gradients, strict=True):
        cosine = torch.nn.functional.cosine_similarity(one.flatten(), other.flatten(), dim=0)
        assert cosine > 0.999


@pytest.mark.parametrize("term", ["divergence", "alignment", "entropy"])
def test_features_that_are_constant_in_a_batch_have_no_gradient(term: str) -> None:
    regularizer = EntropyRegularizer(EntropySettings(term=term))
    one, other = features(2, 32, 8, 0)
    one = one.clone()
    one[:, :16] = one[0, :16]  # of two images half of the features are the same
    one.requires_grad_()
    term_of = regularizer({"site": one}, {"site": other}, progress=1.0)
    (gradient,) = torch.autograd.grad(term_of.loss, one)
    assert not gradient[:, :16].any()
    assert gradient[:, 16:].any()
    assert float(gradient.abs().max()) < 10.0


def test_a_divergence_of_many_rows_has_the_exact_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    other = torch.randn(768, 256, generator=generator).relu()
    one = other + 0.1 * torch.randn(768, 256, generator=generator)
    gradients: list[Tensor] = []
    for estimator in ("moe", "exact"):
        rows = one.clone().requires_grad_()
        settings_of = EntropySettings(term="divergence", align=0.0, estimator=estimator)
        for _ in range(3):  # the mixture learns of each step
            found = EntropyRegularizer(settings_of)({"site": rows}, {"site": other}, progress=1.0)
        gradients += torch.autograd.grad(found.loss, rows)
    mixed, exact = gradients
    assert float((mixed * exact).sum() / (mixed.norm() * exact.norm())) > 0.9999
