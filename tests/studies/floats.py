"""Float training for studies of networks that no checkpoint is at hand for."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from timm.scheduler.cosine_lr import CosineLRScheduler
from torch import nn

from mecq_cli.data import ImageDataset, normalize, train_batches
from mecq_cli.tasks.base import Task


def adamw(parameters: Iterable[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    """What these networks are trained by where nothing else is said."""
    return torch.optim.AdamW(parameters, lr=lr, weight_decay=1e-2)


def train_in_float(
    net: nn.Module,
    task: Task,
    data: ImageDataset,
    *,
    epochs: int,
    batch_size: int,
    lr: float,
    bf16: bool = False,
    make_optimizer: Callable[[Iterable[nn.Parameter], float], torch.optim.Optimizer] = adamw,
) -> Iterator[dict[str, Any]]:
    """Along a cosine of the learning rate; after each epoch its number and its last loss."""
    steps = len(data) // batch_size
    optimizer = make_optimizer(net.parameters(), lr)
    schedule = CosineLRScheduler(optimizer, epochs * steps, warmup_t=steps, t_in_epochs=False)
    for epoch in range(epochs):
        net.train()
        for step, batch in enumerate(train_batches(data, batch_size=batch_size, epoch=epoch)):
            schedule.step_update(epoch * steps + step)
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                outputs = net(normalize(batch.images, data.preprocessing))
            loss = task.loss(outputs.float() if bf16 else outputs, batch.labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        yield {"epoch": epoch, "loss": float(loss.detach())}


def say(document: dict[str, Any]) -> None:
    """A line of JSON."""
    sys.stdout.write(json.dumps(document) + "\n")
    sys.stdout.flush()
