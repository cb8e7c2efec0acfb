"""Each bound and identity that the estimators stand on, on random spectra in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mecq_cli.entropy import bulk, head, series, taylor
from mecq_cli.entropy.base import gram, largest_eigenvalue_bound, lower_gram, trace_of_gram

quick = settings(max_examples=30, deadline=None)
seeds = st.integers(0, 2**31)
decays = st.floats(0.0, 3.0)
sizes = st.floats(0.01, 30.0)


def data(seed: int, side: int, length: int, decay: float, trace: float) -> Tensor:
    """A [side, length] with K = A A^T of this trace and eigenvalues falling as i^-decay."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(side, length, generator=generator, dtype=torch.float64)
    left: Tensor
    right: Tensor
    left, _, right = torch.linalg.svd(a, full_matrices=False)
    x = torch.arange(1, side + 1, dtype=torch.float64).pow(-decay)
    return left * (x * trace / x.sum()).sqrt() @ right


def logdet(k: Tensor) -> Tensor:
    x: Tensor = torch.linalg.eigvalsh(k)
    return x.clamp(min=0).log1p().sum()


@quick
@given(seeds, decays, sizes)
def test_bounds_of_the_largest_eigenvalue_and_blocks_of_the_gram_matrix(
    seed: int, decay: float, trace: float
) -> None:
    a = data(seed, 30, 40, decay, trace)
    k = a @ a.mT
    top = float(torch.linalg.eigvalsh(k)[-1])
    assert float(largest_eigenvalue_bound(k)) >= top * (1 - 1e-9)
    assert float(trace_of_gram(a, 1.0)) == pytest.approx(trace)


@pytest.mark.parametrize("side", [7, 384, 401])
def test_the_gram_matrix_by_blocks(side: int) -> None:
    a = torch.randn(side, side + 5, dtype=torch.float64)
    torch.testing.assert_close(gram(a, 2.0), 2.0 * a @ a.mT)
    torch.testing.assert_close(lower_gram(a, 2.0).tril(), (2.0 * a @ a.mT).tril())


@quick
@given(st.sampled_from(series.KINDS), st.integers(1, 8), st.floats(1e-3, 50.0))
def test_the_series_hold_their_bounds_on_the_whole_interval(
    kind: str, half: int, bound: float
) -> None:
    degree = 2 * half
    x = torch.linspace(0.0, bound, 120, dtype=torch.float64)
    k = torch.diag(x)
    error = series.gradient_error(kind, degree, bound)
    answer = series.solve_from_gram(k, kind, degree, bound)
    derivative = answer.operator.apply(torch.eye(120, dtype=torch.float64)).diagonal()
    off = (derivative * (1.0 + x) - 1.0).abs().max()
    assert float(off) <= error * (1 + 1e-9) + 1e-10
    total = float(x.log1p().sum())
    assert abs(float(answer.value) - total) <= error * total * (1 + 1e-9) + 1e-9


@quick
@given(st.integers(1, 12), st.floats(1e-3, 50.0))
def test_the_published_error_of_each_series_per_eigenvalue(degree: int, bound: float) -> None:
    x = torch.linspace(0.0, bound, 500, dtype=torch.float64)
    centre = bound / 2
    y = (x - centre) / (1 + centre)
    partial = math.log1p(centre) + sum((-1) ** (k + 1) * y**k / k for k in range(1, degree + 1))
    rho = bound / (2 + bound)
    limit = rho ** (degree + 1) / ((degree + 1) * (1 - rho))
    assert float((partial - x.log1p()).abs().max()) <= limit + 1e-12
    derivative = (1 - (-y) ** degree) / (1 + x)
    assert float((derivative * (1 + x) - 1).abs().max()) <= rho**degree + 1e-12
    assert bool((derivative > 0).all())
    r = series.radius(bound)
    u = 2 * x / bound - 1
    constant = 2 * math.log((1 + math.sqrt(1 + bound)) / 2)
    terms = (
        2 * (-1) ** (k + 1) * r**k / k * torch.cos(k * torch.arccos(u.clamp(-1, 1)))
        for k in range(1, degree + 1)
    )
    limit = 2 * r ** (degree + 1) / ((degree + 1) * (1 - r))
    assert float((constant + sum(terms) - x.log1p()).abs().max()) <= limit + 1e-12


@quick
@given(seeds, decays, sizes, st.integers(1, 6))
def test_the_error_that_taylor_admits_to_is_not_exceeded(
    seed: int, decay: float, trace: float, order: int
) -> None:
    a = data(seed, 20, 30, decay, trace)
    k = a @ a.mT
    powers = [k]
    while len(powers) < (order + 1) // 2:
        powers.append(powers[-1] @ k)
    true = torch.linalg.solve(torch.eye(20, dtype=torch.float64) + k, a)
    answer = taylor.expand(powers, order)
    error = torch.linalg.matrix_norm(answer.operator.apply(a) - true) / torch.linalg.matrix_norm(
        true
    )
    assert float(error) <= float(taylor.gradient_error(powers, order)) * (1 + 1e-9) + 1e-12
    expected = sum(
        (-1) ** (j + 1) / j * torch.linalg.matrix_power(k, j).trace() for j in range(1, order + 1)
    )
    torch.testing.assert_close(answer.value, torch.as_tensor(expected))


@quick
@given(seeds, decays, sizes, st.sampled_from([1, 2, 3]), st.sampled_from([1, 40]))
def test_head_and_schur_complement_are_exact_for_any_subspace(
    seed: int, decay: float, trace: float, steps: int, rank: int
) -> None:
    a = data(seed, 60, 70, decay, trace)
    if rank == 1:  # where a Krylov space has to be filled up
        a = a[:1].expand(60, 70)
    k = a @ a.mT
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(60, 4, generator=generator, dtype=torch.float64)
    noise = torch.randn(60, 12, generator=generator, dtype=torch.float64)
    product = head.Product(a, 1.0)
    found = head.build(product, start, noise, steps)
    assert found is not None
    identity = torch.eye(60, dtype=torch.float64)
    projector = found.project(identity)
    s = projector @ found.bulk_product(product, projector)
    assert float(torch.linalg.eigvalsh(s)[0]) > -1e-4 * trace  # PSD up to the random filling
    torch.testing.assert_close(found.logdet + logdet(s), logdet(k), rtol=2e-4, atol=1e-6)
    assert float(s.trace()) == pytest.approx(float(k.trace()) - found.trace, abs=2e-4 * trace)
    # With (I + S)^-1 on the range of P a multiple of it, the operator is the whole inverse.
    exact = torch.linalg.solve(identity + k, a)
    if rank == 1 and steps > 1:
        torch.testing.assert_close(head.Deflated(found, 1.0).apply(a), exact, rtol=1e-3, atol=1e-4)
    # Both ways through the operator are one.
    one = head.Deflated(found, 0.7).apply(a)
    torch.testing.assert_close(one, head.Deflated(found, 0.7, 0.0, k).apply(a))


@quick
@given(seeds, decays, sizes)
def test_deflated_inverse_with_the_true_bulk_is_the_inverse(
    seed: int, decay: float, trace: float
) -> None:
    """With a bulk of two eigenvalues the line through them is no approximation."""
    a = data(seed, 24, 24, decay, trace)
    left, x, right = torch.linalg.svd(a)
    x[8:16], x[16:] = x[8], x[8] / 2
    a = (left * x) @ right
    k = a @ a.mT
    product = head.Product(a, 1.0)
    found = head.build(product, left[:, :8].contiguous(), torch.zeros(24, 8).double(), 1)
    assert found is not None
    t, u = float(x[8] ** 2), float(x[16] ** 2)
    scale = 1 / ((1 + t) * (1 + u))
    operator = head.Deflated(found, (1 + t + u) * scale, -scale, k)
    exact = torch.linalg.solve(torch.eye(24, dtype=torch.float64) + k, a)
    torch.testing.assert_close(operator.apply(a), exact)


@quick
@given(
    st.lists(st.floats(1e-4, 5.0), min_size=1, max_size=40),
    st.sampled_from([4, 6]),
)
def test_quadrature_brackets_the_bulk_and_bounds_its_derivative(
    spectrum: list[float], count: int
) -> None:
    x = torch.tensor(spectrum, dtype=torch.float64)
    moments = [float(x.pow(k).sum()) for k in range(1, count + 1)]
    nodes = bulk.gauss(moments)
    truth = float(x.log1p().sum())
    lower = sum(w * math.log1p(t) / t for t, w in nodes)
    assert lower <= truth * (1 + 1e-6)
    assert bulk.upper(moments) >= truth * (1 - 1e-6)
    for k, moment in enumerate(moments[:4]):
        assert sum(w * t**k for t, w in nodes) == pytest.approx(moment, rel=1e-4)
    known = bulk.Bulk(truth, 0.0, nodes, moments)
    c0, wrong = bulk.order_one(known)
    true = float((x * (1 / (1 + x) - c0).square()).sum())
    assert true <= wrong * (1 + 1e-6) + 1e-12
    if count == 6:
        c0, c1, wrong = bulk.order_two(known)
        true = float((x * (1 / (1 + x) - c0 - c1 * x).square()).sum())
        assert true <= wrong * (1 + 1e-5) + 1e-7 * float(x.sum())


@quick
@given(seeds, decays, sizes)
def test_probes_estimate_the_bulk_within_the_error_they_state(
    seed: int, decay: float, trace: float
) -> None:
    a = data(seed, 150, 160, decay / 2, trace / 2)
    k = a @ a.mT
    generator = torch.Generator().manual_seed(seed)
    signs = 2.0 * torch.randint(0, 2, (150, 16), generator=generator).double() - 1.0
    images = [signs]
    for _ in range(3):
        images.append(k @ images[-1])
    for squares in (None, float(k.square().sum())):
        found = bulk.estimate(bulk.probe_moments(images), float(k.trace()), squares)
        # Three standard errors of 16 probes: twice them leaves no more than one in 10^4 out.
        assert abs(found.logdet - float(logdet(k))) <= 2.0 * found.error + 1e-9


@quick
@given(seeds, decays, sizes)
def test_fischer_a_partition_is_an_upper_bound(seed: int, decay: float, trace: float) -> None:
    a = data(seed, 24, 30, decay, trace)
    k = a @ a.mT
    parts = sum(logdet(k[i : i + 6, i : i + 6]) for i in range(0, 24, 6))
    assert float(parts) >= float(logdet(k)) * (1 - 1e-9)
