"""Maximum entropy coding as a term of the loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mecq_cli.entropy.coding import coding_length
from mecq_cli.entropy.representation import as_rows, centre, normalise, standardise
from mecq_cli.entropy.state import MoeState


@dataclass(frozen=True)
class EntropyTerm:
    """What the regularizer says of one batch.

    Attributes:
        loss: scalar, to be multiplied by the weight of the term.
        coding_lengths: nats of each site, detached; of quantized features alone or, with two
            views, of both together.
    """

    loss: Tensor
    coding_lengths: dict[str, Tensor]


class EntropyRegularizer(nn.Module):
    """Minus the coding length of quantized representations, averaged over the sites.

    One view: loss = - eps_d^2 * logdet(I + Z Z^T / (m eps_d^2)), which is the objective of MEC
    (arXiv 2210.11464) divided by m and multiplied by 1/lambda; Z are centred rows of unit
    length. Two views: Z = [Z_q, Z_fp] / sqrt(2), the features of the quantized and of the frozen
    FP network side by side, and minus their mean cosine, since the parent's objective has both
    parts in one: its two views must agree and the batch must spread.

    During the first ``warmup`` share of the training eps_d^2 falls from eight times its value,
    as the parent paper's code does with 1/lambda. That the term is applied to the quantized
    representations of a QAT network is MEC-Quant's idea (arXiv 2509.15514); which ones, and how
    they are prepared, is our reconstruction.

    Args:
        distortion: eps_d^2.
        warmup: share of the training over which the distortion falls to it.
        estimator: of the coding length: "moe", "exact" or "taylor" (which, where its series does
            not converge, is replaced by the exact value).
        align: weight of the cosine between the two views.
    """

    def __init__(
        self,
        distortion: float = 0.06,
        warmup: float = 0.1,
        estimator: str = "moe",
        align: float = 1.0,
    ) -> None:
        super().__init__()
        self.distortion = distortion
        self.warmup = warmup
        self.estimator = estimator
        self.align = align
        self.states: dict[str, MoeState] = {}

    def distortion_at(self, progress: float) -> float:
        """eps_d^2 after ``progress`` (0 to 1) of the training."""
        if progress >= self.warmup:
            return self.distortion
        return self.distortion * (8.0 - 7.0 * progress / self.warmup)

    def forward(
        self,
        sites: Mapping[str, Tensor],
        reference: Mapping[str, Tensor] | None = None,
        progress: float = 1.0,
    ) -> EntropyTerm:
        """The term for one batch.

        Args:
            sites: quantized features [N, d] or [N, d, H, W], or weights [O, ...], by name.
            reference: the FP network's features by the same names: two views. Sites without
                one (weights) are coded alone.
            progress: share of the training that is over.
        """
        distortion = self.distortion_at(progress)
        losses: list[Tensor] = []
        lengths: dict[str, Tensor] = {}
        for name, features in sites.items():
            other = None if reference is None else reference.get(name)
            if other is None:
                z = normalise(centre(as_rows(features)))
                length = self._length(name, z, distortion)
                losses.append(-distortion * length)
            else:
                length, loss = self._two_views(name, features, other, distortion)
                losses.append(loss)
            lengths[name] = length.detach()
        return EntropyTerm(torch.stack(losses).mean(), lengths)

    def _two_views(
        self, name: str, features: Tensor, other: Tensor, distortion: float
    ) -> tuple[Tensor, Tensor]:
        quantized = normalise(standardise(as_rows(features)))
        full = normalise(standardise(as_rows(other.detach())))
        joint = torch.cat([quantized, full], 1) * 0.5**0.5
        length = self._length(name, joint, distortion)
        cosine = (quantized * full).sum(1).mean()
        return length, -distortion * length - self.align * cosine

    def _length(self, name: str, z: Tensor, distortion: float) -> Tensor:
        options: dict[str, Any] = {}
        if self.estimator == "moe":
            options["state"] = self.states.setdefault(name, MoeState())
        elif self.estimator == "taylor":
            options["on_divergence"] = "exact"
        return coding_length(z, distortion=distortion, estimator=self.estimator, **options)

    def saved_states(self) -> dict[str, Any]:
        """What the mixture remembers of each site, for a checkpoint."""
        return {name: state.state_dict() for name, state in self.states.items()}

    def load_saved_states(self, stored: Mapping[str, Any]) -> None:
        """The inverse of `saved_states`.

        Raises:
            CheckpointError: it is not what `saved_states` gives.
        """
        for name, state in stored.items():
            self.states.setdefault(name, MoeState()).load_state_dict(state)
