"""What each table compares: its arms, bits and seeds.

Within a table everything but what an arm names is equal: images, epochs, batches, optimizer,
first and last layer of 8 bits, the checkpoint it starts from, and the seeds, which are paired.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tests.studies import cifar_vit

Bits = tuple[float, int]
"""Of weights, on average where that is not a whole number, and of activations."""


@dataclass(frozen=True)
class Arm:
    """One row of a table.

    Attributes:
        name: as the table shows it.
        settings: of `mecq quantize`, over its defaults.
        peer: another tool that trains instead.
    """

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    peer: str = ""


@dataclass(frozen=True)
class Table:
    """A table of docs/results.md.

    Attributes:
        name: of its marks in the page, and of its runs.
        model, checkpoint, data: the network, the file name of its weights, the data set.
        arms: by their bits.
        seeds: runs of each.
        epochs: of every run.
        longer: epochs of the bits that get more.
        per_class: training images of each class; None: all.
        keep_artifact: the integer model of the first seed is kept in docs/results.
        finely: the table says how far the outputs are from the float model's, and how large the
            weights are, too.
        tune: what is reported on are images held out of train, so that choices can be made.
        settings: of all arms, of ours and of those they are compared with.
    """

    name: str
    model: str
    checkpoint: str
    data: str
    arms: Mapping[Bits, Sequence[Arm]]
    seeds: Sequence[int]
    epochs: int
    longer: Mapping[Bits, int] = field(default_factory=dict)
    per_class: int | None = None
    keep_artifact: bool = False
    finely: bool = False
    tune: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """One run."""

    table: Table
    bits: Bits
    arm: Arm
    seed: int

    @property
    def epochs(self) -> int:
        """Of this run."""
        return self.table.longer.get(self.bits, self.table.epochs)

    @property
    def key(self) -> str:
        """Name of its record and of its folder."""
        w, a = self.bits
        arm = "".join(c if c.isalnum() else "_" for c in self.arm.name)
        return f"{self.table.name}-w{w:g}a{a}-{arm}-{self.seed}"


PLAIN = {
    "quantizer": "lsq", "mec_weight": 0.0, "distill": False, "residual_bits": 32,
    "freeze_oscillations": 0.0,
}  # fmt: skip
"""A quantizer and the task loss, as its paper trains; no stream of 8 bits between the blocks."""

DEFAULT = Arm("mecq")
WITHOUT = Arm("mecq without MEC", {"mec_weight": 0.0})
LSQ = Arm("plain LSQ", PLAIN)
THREE = (DEFAULT, WITHOUT, LSQ)
PEERS = (
    Arm("PACT", {**PLAIN, "quantizer": "pact"}),
    Arm("DoReFa", {**PLAIN, "quantizer": "dorefa"}),
    Arm("Brevitas", peer="brevitas"),
)

RESNET20 = ("resnet20_cifar", "cifar10-resnet20-12fca82f.pth", "cifar10")

WITHOUT_HELD_OUT = (RESNET20[0], "resnet20_cifar-without-held-out.float.safetensors", RESNET20[2])
"""One that has not seen the images that choices are made on (`tests.studies.train_float`)."""

COMPARE = Table(
    "compare",
    *RESNET20,
    arms={
        (2, 2): (*THREE, *PEERS),
        (1, 1): THREE,
        (1, 2): THREE,
        (4, 4): (*THREE, *PEERS),
        (3, 3): THREE,
        (2, 4): THREE,
    },
    seeds=(0, 1, 2),
    epochs=20,
    per_class=1000,
)

FINAL_BITS: Sequence[Bits] = ((2, 2), (4, 4), (1, 1), (1, 2), (3, 3), (2, 4))

FINAL = Table(
    "final",
    *RESNET20,
    arms=dict.fromkeys(FINAL_BITS, (DEFAULT,)),
    seeds=(0,),
    epochs=20,
    longer={(2, 2): 60, (4, 4): 60, (1, 2): 40, (1, 1): 60},
    keep_artifact=True,
)

FEATURES = {"mec_term": "alignment", "mec_weight": 30.0, "mec_align": 1.0}
"""The cosine to the FP network's features, with the weight it has in the default."""

PARTS = (
    DEFAULT,
    WITHOUT,
    Arm("no distillation of logits", {"distill": False}),
    Arm("features by cosine alone", FEATURES),
    Arm("neither", {"distill": False, "mec_weight": 0.0}),
    Arm("one learning rate for weights and a tenth for steps", {"scale_lr": 0.1}),
    Arm("weight decay 1e-4 at all bits", {"weight_decay": 1e-4}),
    Arm("no new batch norm statistics", {"bn_images": 0}),
    Arm("average of the weights, 0.99", {"ema": 0.99}),
    Arm("oscillations frozen at 0.02", {"freeze_oscillations": 0.02}),
    Arm("bits lowered from 4", {"lower_from": 4}),
    Arm("gradients of activations as LSQ's", {"quantizer": "lsq-mid-rise"}),
    Arm("LSQ's quantizers", {"quantizer": "lsq"}),
    Arm("LSQ's weights, thresholds learned", {"quantizer": "lsq-thresholds"}),
    Arm("entropy-preserving weights and thresholds", {"quantizer": "n2uq"}),
    Arm("gradients by EWGS", {"quantizer": "ewgs"}),
    Arm("learning rate 0.05", {"lr": 0.05}),
)

ABLATION = Table(
    "ablation",
    *WITHOUT_HELD_OUT,
    arms={(2, 2): PARTS},
    seeds=(0, 1, 2),
    # Few passes over all images tell arms apart that many over some do not: of those the networks
    # differ by what they learn by heart.
    epochs=2,
    tune=True,
)

_FRONT = ("layer[12].*", "layer3.0.*")
"""All layers of ResNet-20 but the last two blocks: 44.8 % of the weights between first and last
layer."""

_FRONT_OF_LITE0 = ("blocks.[0-4].*", "blocks.5.[01].*", "blocks.5.2.conv_pw", "blocks.5.2.conv_dw")
"""48.9 % of those of EfficientNet-Lite0."""


def _allotted(average: float) -> tuple[Arm, ...]:
    """Bits by each sensitivity, for the same number of bits in all."""
    return tuple(
        Arm(f"by {name}", {"target_avg_bits": average, "sensitivity": name})
        for name in ("coding", "hessian", "loss")
    )


def _split(name: str, front: int, back: int, patterns: Sequence[str] = _FRONT) -> Arm:
    """Two whole numbers of bits, the weight decay that of the lower one as of the other arms."""
    rules = [{"pattern": pattern, "wbits": front} for pattern in patterns]
    return Arm(name, {"wbits": back, "layers": rules, "weight_decay": 2.5e-5})


MIXED = Table(
    "mixed",
    *WITHOUT_HELD_OUT,
    # Activations of 4 bits, so that weights are what the arms differ by and what hurts.
    arms={
        (2, 4): (*_allotted(2), Arm("uniform")),
        (2.5, 4): (
            *_allotted(2.5),
            # 2.448 and 2.552 bits a weight: their mean is what 2.5 bits without a measurement give.
            _split("the front at 3 bits, the back at 2", 3, 2),
            _split("the front at 2 bits, the back at 3", 2, 3),
        ),
        (3, 4): (*_allotted(3), Arm("uniform")),
    },
    seeds=(0, 1, 2),
    epochs=2,
    finely=True,
    tune=True,
)

RESNET56 = ("resnet56_cifar", "cifar10-resnet56-4bfd9763.pth", "cifar10")

DEEPER = Table(
    "resnet56",
    *RESNET56,
    arms={(2, 2): THREE},
    seeds=(0, 1, 2),
    epochs=20,
    per_class=1000,
)

FINAL56 = Table(
    "final56", *RESNET56, arms={(2, 2): (DEFAULT,)}, seeds=(0,), epochs=20, keep_artifact=True
)

LITE0 = Table(
    "lite0",
    "tf_efficientnet_lite0",
    "timm-tf_efficientnet_lite0-imagenette10.pth",
    "imagenette224",
    # The fourth arm tells what the recipe of its family adds.
    arms={
        (4, 4): THREE,
        (2, 4): THREE,
        (2, 2): (*THREE, Arm("no oscillations frozen", {"freeze_oscillations": 0.0})),
    },
    seeds=(0, 1, 2),
    epochs=10,
    settings={"img_size": 96, "crop_pct": 1.0, "batch_size": 32},
)

MIXED_LITE0 = replace(
    LITE0,
    name="mixed_lite0",
    arms={
        (2, 4): (_allotted(2)[0], Arm("uniform")),
        (2.5, 4): (
            _allotted(2.5)[0],
            # 2.489 and 2.511 bits a weight.
            _split("the front at 3 bits, the back at 2", 3, 2, _FRONT_OF_LITE0),
            _split("the front at 2 bits, the back at 3", 2, 3, _FRONT_OF_LITE0),
        ),
        (3, 4): (_allotted(3)[0], Arm("uniform")),
    },
    finely=True,
    epochs=5,
    # By the bits that --wbits says it would be another one in some arms.
    settings={**LITE0.settings, "lr": 0.05},
)

VIT = Table(
    "vit",
    cifar_vit.NAME,
    "cifar_vit.float.safetensors",
    "cifar10",
    arms={(4, 4): THREE, (2, 2): THREE},
    seeds=(0, 1, 2),
    # As many steps as 20 of 1,000 images a class, of which it learns by heart.
    epochs=4,
    # Of so few steps they would be said to be too few to compile for, but the program is the same
    # in all runs of an arm.
    settings={"compile": "model"},
)

_ALL = (COMPARE, ABLATION, MIXED, MIXED_LITE0, FINAL, DEEPER, FINAL56, LITE0, VIT)

TABLES: Mapping[str, Table] = {table.name: table for table in _ALL}


def jobs(table: Table) -> Iterator[Job]:
    """All runs, those of the first seed first: an unfinished table is still paired."""
    for seed in table.seeds:
        for bits, arms in table.arms.items():
            for arm in arms:
                yield Job(table, bits, arm, seed)
