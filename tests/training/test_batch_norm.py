"""Batch norm over all processes, here of one: what two make of it is in test_distributed.py."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from mecq_cli.training.batch_norm import GlobalBatchNorm


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("tracks", [True, False])
def test_statistics_are_kept_where_the_norm_keeps_them(tracks: bool) -> None:
    """As PyTorch's own, of which calibration asks not to keep what it sees."""
    plain = nn.BatchNorm2d(3)
    both = GlobalBatchNorm(nn.BatchNorm2d(3))
    x = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0)) * 2 + 1
    for norm in (plain, both):
        norm.track_running_stats = tracks
        norm.train()
    torch.testing.assert_close(both(x), plain(x))
    torch.testing.assert_close(both.running_mean, plain.running_mean)
    torch.testing.assert_close(both.running_var, plain.running_var)
    assert both.running_mean is not None
    assert bool(both.running_mean.any()) is tracks
