"""The term of the loss: what it rewards, what it leaves alone, and the global batch."""

from __future__ import annotations

import math
import multiprocessing
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mecq_cli import settings
from mecq_cli.entropy import (
    EXPERTS,
    EntropyRegularizer,
    EntropySettings,
    as_rows,
    centre,
    exact_coding_length,
    normalise,
)

BATCH, FEATURES = 16, 6


def rows(seed: int) -> Tensor:
    return as_rows(maps(seed))


def maps(seed: int, batch: int = BATCH) -> Tensor:
    return torch.randn(batch, FEATURES, 4, 4, generator=torch.Generator().manual_seed(seed))


def test_the_settings_know_every_expert() -> None:
    assert settings.EXPERTS == EXPERTS


def test_rows_are_images_or_cells() -> None:
    features = maps(0)
    assert torch.allclose(as_rows(features), features.mean((2, 3)))
    cells = as_rows(features, grid=2)
    assert cells.shape == (4 * BATCH, FEATURES)
    assert torch.allclose(cells.view(BATCH, 4, FEATURES).mean(1), as_rows(features), atol=1e-6)
    assert torch.allclose(cells[1], features[0, :, :2, 2:].mean((1, 2)))
    assert as_rows(features, grid=9).shape == (16 * BATCH, FEATURES)
    tokens = features.flatten(2).transpose(1, 2)
    assert torch.allclose(as_rows(tokens), as_rows(features), atol=1e-6)
    assert as_rows(features[:, :, 0, 0].bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("estimator", ["exact", "moe", "taylor"])
def test_one_view_is_the_coding_length_of_centred_unit_rows(estimator: str) -> None:
    regularizer = EntropyRegularizer(EntropySettings(estimator=estimator, warmup=0.0))
    term = regularizer({"a": rows(0), "b": rows(1)})
    lengths = [exact_coding_length(normalise(centre(rows(s))), 0.06) for s in (0, 1)]
    assert term.loss.item() == pytest.approx(-0.06 * sum(map(float, lengths)) / 2, rel=2e-3)
    assert list(term.coding_lengths) == ["a", "b"]
    assert float(term.coding_lengths["b"]) == pytest.approx(float(lengths[1]), rel=2e-3)


def test_two_views_reward_agreement_and_spread() -> None:
    settings = EntropySettings(warmup=0.0)
    regularizer = EntropyRegularizer(settings)
    same = regularizer({"a": rows(0)}, {"a": rows(0)}).loss
    other = regularizer({"a": rows(0)}, {"a": rows(1)}).loss
    assert same < other
    alone = EntropyRegularizer(EntropySettings(warmup=0.0, align=0.0))
    # Standardised, small noise is spread as widely as anything: what differs is the rank.
    flat = 1.0 + 1e-3 * rows(2)[:, :1].expand(-1, FEATURES)
    assert alone({"a": flat}, {"a": flat}).loss > alone({"a": rows(0)}, {"a": rows(0)}).loss


def test_the_controls_leave_the_coding_length_out() -> None:
    features, full = rows(0).requires_grad_(), rows(1)
    alignment = EntropyRegularizer(EntropySettings(term="alignment", warmup=0.0))
    term = alignment({"a": features}, {"a": full})
    assert term.coding_lengths == {}
    assert -1.0 <= term.loss.item() <= 1.0
    with_entropy = EntropyRegularizer(EntropySettings(warmup=0.0))({"a": features}, {"a": full})
    entropy = EntropyRegularizer(EntropySettings(warmup=0.0, align=0.0))
    assert with_entropy.loss.item() == pytest.approx(
        (term.loss + entropy({"a": features}, {"a": full}).loss).item(), abs=1e-5
    )
    centring = EntropyRegularizer(EntropySettings(term="centring"))
    assert centring({"a": full - full.mean(0) + 5.0}).loss > centring({"a": full}).loss
    divergence = EntropyRegularizer(EntropySettings(term="divergence", warmup=0.0, align=0.0))
    assert divergence({"a": full}, {"a": full}).loss.item() == pytest.approx(0.0, abs=1e-5)
    # Only the Gram matrix counts: features in another order are the same features.
    assert divergence({"a": full.flip(1)}, {"a": full}).loss.item() == pytest.approx(0.0, abs=1e-5)
    assert divergence({"a": features}, {"a": full}).loss.item() > 1e-3
    target = EntropyRegularizer(EntropySettings(term="target", warmup=0.0))
    assert target({"a": full}, {"a": full}).loss.item() == pytest.approx(0.0, abs=1e-5)
    term = target({"a": features}, {"a": 0 * full + full[:1]})
    term.loss.backward()
    assert features.grad is not None
    assert features.grad.abs().sum() > 0


def test_the_distortion_falls_to_its_value() -> None:
    settings = EntropySettings(distortion=0.1, warmup=0.5)
    assert [settings.distortion_at(p) for p in (0.0, 0.25, 0.5, 1.0)] == pytest.approx(
        [0.8, 0.45, 0.1, 0.1]
    )


def test_the_reference_gets_no_gradient() -> None:
    full = rows(1).requires_grad_()
    loss = EntropyRegularizer()({"a": rows(0).requires_grad_()}, {"a": full}).loss
    loss.backward()
    assert full.grad is None


class Network(nn.Module):
    """Two features of an image, one of them spatial, as taps give them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.conv = nn.Conv2d(FEATURES, FEATURES, 3)
        self.linear = nn.Linear(FEATURES, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        middle = self.conv(x).relu()
        return as_rows(middle), self.linear(middle.mean((2, 3)))


def trained(network: nn.Module, images: Tensor, full: Tensor) -> Iterator[Tensor]:
    """Loss and parameters after each of three steps of descent."""
    regularizer = EntropyRegularizer(EntropySettings(warmup=0.0))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.5)
    for _ in range(3):
        middle, last = network(images)
        # One site with two views, one alone.
        loss = regularizer({"middle": middle, "last": last}, {"middle": full}).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield torch.cat(
            [loss.detach()[None], *(p.detach().flatten() for p in network.parameters())]
        )


def _worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    part = slice(rank * BATCH // 2, (rank + 1) * BATCH // 2)
    network = DistributedDataParallel(Network())
    log = torch.stack(list(trained(network, maps(0)[part], rows(3)[part])))
    torch.save(log, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_code_the_global_batch(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_worker, args=(rank, str(tmp_path))) for rank in range(2)]
    for worker in workers:
        worker.start()
    single = torch.stack(list(trained(Network(), maps(0), rows(3))))
    for worker in workers:
        worker.join(timeout=120)
        assert worker.exitcode == 0
    for rank in range(2):
        both = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert torch.allclose(both, single, rtol=1e-4, atol=1e-6)
    # The test would see a Gram matrix of each process's own half.
    half = next(trained(Network(), maps(0)[: BATCH // 2], rows(3)[: BATCH // 2]))
    assert not math.isclose(half[0], single[0, 0], rel_tol=1e-2)


def test_sites_of_one_view_are_a_mean_of_their_own() -> None:
    """Two weights and one pair: neither kind takes a share of the other."""
    pair, weights = {"a": rows(0)}, {"w": rows(2), "v": rows(3)}
    settings = EntropySettings(warmup=0.0, term="divergence")
    plain = EntropyRegularizer(settings)
    of_pair = plain(pair, {"a": rows(1)}).loss
    of_weights = plain(weights).loss
    both = EntropyRegularizer(replace(settings, lone=0.01))
    found = both({**pair, **weights}, {"a": rows(1)})
    assert found.loss.item() == pytest.approx(float(of_pair + 0.01 * of_weights), rel=1e-5)
    assert found.coding_lengths.keys() == {"a", "w", "v"}
