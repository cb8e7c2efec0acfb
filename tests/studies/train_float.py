"""Float networks that tables of docs/results.md start from and nobody gives weights of.

    python -m tests.studies.train_float NAME DATA [--threads N]

vit          `cifar_vit`: 30 epochs of the train set by AdamW.
without      ResNet-20 without the images that tables hold out of the train set to choose on: 30
             epochs of the others by SGD. For a network that has seen them, what generalises and
             what is known by heart look alike.

Both with random crops and flips, batches of 128, bf16. The weights go to docs/results/.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import nn

from mecq_cli.data import dataset_of
from mecq_cli.evaluation import evaluate
from mecq_cli.models.loading import load_model
from mecq_cli.models.order import channels_last
from mecq_cli.storage import atomic_write
from mecq_cli.tasks.registry import task_of
from tests.studies import cifar_vit
from tests.studies.floats import adamw, say, train_in_float
from tests.studies.results.queue import FOLDER, parts

BATCH = 128


@dataclass(frozen=True)
class Plan:
    """How one is trained; ``file`` is the name of its weights."""

    model: str
    file: str
    epochs: int
    lr: float
    optimizer: Callable[[Iterable[nn.Parameter], float], torch.optim.Optimizer]
    without_held_out: bool = False


def sgd(parameters: Iterable[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    """As CIFAR's ResNets are trained."""
    return torch.optim.SGD(parameters, lr, momentum=0.9, nesterov=True, weight_decay=5e-4)


PLANS: Mapping[str, Plan] = {
    "vit": Plan(cifar_vit.NAME, "cifar_vit.float.safetensors", 30, 1e-3, adamw),
    "without": Plan(
        "resnet20_cifar", "resnet20_cifar-without-held-out.float.safetensors", 30, 0.1, sgd,
        without_held_out=True,
    ),
}  # fmt: skip


def main() -> None:
    """Train, say the loss of each epoch and the figure, keep the weights."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("name", choices=PLANS)
    parser.add_argument("data", type=Path, help="folder with cifar10/")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--epochs", type=int, help="for a first try")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    plan = PLANS[given.name]
    loaded = load_model(plan.model, pretrained=False)
    net, task = loaded.module, task_of(loaded)
    channels_last(net)
    train, measured = parts(str(given.data / "cifar10"), tune=plan.without_held_out)
    data = dataset_of(train, loaded.preprocessing, train=True)
    epochs = given.epochs or plan.epochs
    for epoch in train_in_float(
        net, task, data, epochs=epochs, batch_size=BATCH, lr=plan.lr, bf16=True,
        make_optimizer=plan.optimizer,
    ):  # fmt: skip
        say(epoch)
    held = dataset_of(measured, loaded.preprocessing)
    with torch.no_grad():
        found = evaluate(net.eval(), held, batch_size=250, device=torch.device("cpu"), task=task)
    weights = {name: tensor.contiguous() for name, tensor in net.state_dict().items()}
    atomic_write(FOLDER / plan.file, safetensors.torch.save(weights), force=True)
    say({"name": given.name, "epochs": epochs, **found.figures})


if __name__ == "__main__":
    main()
