"""Maximum entropy coding as a term of the loss."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mecq_cli.entropy.coding import coding_length
from mecq_cli.entropy.distributed import global_rows
from mecq_cli.entropy.pair import PairTerms, is_small, pair_terms
from mecq_cli.entropy.representation import normalise, standardise, varied
from mecq_cli.entropy.state import MoeState


@dataclass(frozen=True)
class EntropySettings:
    """What the term is.

    Attributes:
        distortion: eps_d^2.
        warmup: share of the training over which the distortion falls to it, from 8 times as much.
        estimator: of the coding length: "moe", "exact" or "taylor" (which, where its series does
            not converge, is replaced by the exact value).
        experts: those the mixture may use; empty: all.
        order: of the series of "taylor".
        align: weight of the cosine between two views, beside the coding length.
        term: "entropy"; or "divergence", with two views the nats that coding both jointly costs
            more than the mean of coding each alone; or a control that tells what does the work:
            "target" pulls the coding length of the quantized features to that of the FP features
            instead of upwards; "alignment" is the cosine between the views without a coding
            length; "centring" only removes what all rows have in common.
        lone: beside sites of two views, factor of those that have one.
    """

    distortion: float = 0.06
    warmup: float = 0.1
    estimator: str = "moe"
    experts: tuple[str, ...] = ()
    order: int = 4
    align: float = 1.0
    term: str = "entropy"
    lone: float = 1.0

    def distortion_at(self, progress: float) -> float:
        """eps_d^2 after ``progress`` (0 to 1) of the training."""
        if progress >= self.warmup:
            return self.distortion
        return self.distortion * (8.0 - 7.0 * progress / self.warmup)


@dataclass(frozen=True)
class EntropyTerm:
    """What the regularizer says of one batch.

    Attributes:
        loss: scalar, to be multiplied by the weight of the term.
        coding_lengths: nats of each site, detached; of quantized features alone or, with two
            views, of both together. Empty for terms without one.
    """

    loss: Tensor
    coding_lengths: dict[str, Tensor]


class EntropyRegularizer(nn.Module):
    """Minus the coding length of quantized representations, averaged over the sites.

    Where some sites have two views and others, such as weights, one, each kind is averaged for
    itself.

    One view: loss = - eps_d^2 * logdet(I + Z Z^T / (m eps_d^2)), which is the objective of MEC
    (arXiv 2210.11464) divided by m and multiplied by 1/lambda; Z are centred rows of unit
    length. Two views: Z = [Z_q, Z_fp] / sqrt(2), the features of the quantized and of the frozen
    FP network side by side, and minus their mean cosine, since the parent's objective has both
    parts in one: its two views must agree and the batch must spread.

    During the first ``warmup`` share of the training eps_d^2 falls from eight times its value,
    as the parent paper's code does with 1/lambda. That the term is applied to the quantized
    representations of a QAT network is MEC-Quant's idea (arXiv 2509.15514); which ones, and how
    they are prepared, is our reconstruction.

    In a distributed run the rows are those of all processes (`global_rows`).
    """

    def __init__(self, settings: EntropySettings | None = None) -> None:
        super().__init__()
        self.settings = settings or EntropySettings()
        self.states: dict[str, MoeState] = {}

    def forward(
        self,
        sites: Mapping[str, Tensor],
        reference: Mapping[str, Tensor] | None = None,
        progress: float = 1.0,
    ) -> EntropyTerm:
        """The term for one batch.

        Args:
            sites: quantized features as rows [N, d] (`as_rows`) by name.
            reference: the FP network's features by the same names: two views. Sites without
                one (weights) are coded alone, and have the factor ``settings.lone``.
            progress: share of the training that is over.
        """
        distortion = self.settings.distortion_at(progress)
        losses: list[Tensor] = []
        lengths: dict[str, Tensor] = {}
        pairs: dict[str, tuple[Tensor, Tensor]] = {}
        for name, features in sites.items():
            other = None if reference is None else reference.get(name)
            rows = global_rows(features.float())
            if other is not None:
                pairs[name] = rows, global_rows(other.detach().float())
                continue
            loss, length = self._one_view(name, rows, distortion)
            losses.append(loss)
            if length is not None:
                lengths[name] = length.detach()
        # A single layer reads images and puts out logits: nothing is in between.
        loss = torch.stack(losses).mean() if losses else torch.zeros(())
        if pairs:
            of_pairs, found = self._two_views(pairs, distortion)
            lengths |= found
            loss = of_pairs.mean() + (self.settings.lone * loss if losses else 0.0)
        return EntropyTerm(loss, lengths)

    def _one_view(self, name: str, rows: Tensor, distortion: float) -> tuple[Tensor, Tensor | None]:
        if self.settings.term == "centring":
            return normalise(rows).mean(0).square().sum(), None
        length = self._length(name, normalise(varied(rows)), distortion)
        return -distortion * length, length

    def _two_views(
        self, pairs: Mapping[str, tuple[Tensor, Tensor]], distortion: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Losses [S] of the sites, and their coding lengths by name."""
        settings = self.settings
        if settings.term in ("target", "alignment"):
            found = {name: self._control(name, *views, distortion) for name, views in pairs.items()}
            losses = torch.stack([loss for loss, _ in found.values()])
            return losses, {
                n: length.detach() for n, (_, length) in found.items() if length is not None
            }
        terms = self._terms(pairs, distortion)
        if settings.term == "divergence":
            # Jensen's gap of the concave logdet: the Jensen-Bregman LogDet divergence of the two
            # Gram matrices, zero where they are the same, whatever rotation lies between.
            losses = distortion * (terms.joint - 0.5 * (terms.first + terms.second))
        else:
            losses = -distortion * terms.joint
        losses = losses - settings.align * terms.agreement
        return losses, dict(zip(pairs, terms.joint.detach().unbind(), strict=True))

    def _control(
        self, name: str, rows: Tensor, fp_rows: Tensor, distortion: float
    ) -> tuple[Tensor, Tensor | None]:
        if self.settings.term == "alignment":
            return -_agreement(*_prepared(rows, fp_rows)), None
        length = self._length(name, normalise(varied(rows)), distortion)
        goal = self._length(f"{name}.fp", normalise(varied(fp_rows)), distortion)
        return distortion * (length - goal).abs(), length

    def _terms(self, pairs: Mapping[str, tuple[Tensor, Tensor]], distortion: float) -> PairTerms:
        """Of all sites; at once those where an exact value is the mixture's answer anyway."""
        settings = self.settings
        exact = settings.estimator in ("moe", "exact") and not settings.experts
        small = {name: views for name, views in pairs.items() if exact and is_small(views[0])}
        found = None
        if small:
            quantized, full = _columns(small.values())
            found = pair_terms(quantized, full, distortion)
        terms: dict[str, tuple[Tensor, ...]] = {}
        if found is not None:
            terms = dict(zip(small, zip(*(c.unbind() for c in found), strict=True), strict=True))
            for name in small if settings.estimator == "moe" else ():
                for each in _names(name, settings.term):
                    self.states.setdefault(each, MoeState()).record("exact")
        for name, views in pairs.items():
            if name not in terms:
                terms[name] = self._term(name, *views, distortion)
        return PairTerms(*(torch.stack(c) for c in _columns(terms[name] for name in pairs)))

    def _term(
        self, name: str, rows: Tensor, fp_rows: Tensor, distortion: float
    ) -> tuple[Tensor, ...]:
        """One site by the estimator that was asked for, as `PairTerms` names the numbers."""
        quantized, full = _prepared(rows, fp_rows)
        views = (_side_by_side(quantized, full), quantized, full)
        names = _names(name, self.settings.term)
        of_difference = self.settings.term == "divergence"
        found = [
            self._length(each, z, distortion, of_difference=of_difference)
            for each, z in zip(names, views, strict=False)
        ]
        found += [quantized.new_zeros(())] * (3 - len(found))  # not asked for
        return (*found, _agreement(quantized, full))

    def _length(
        self, name: str, z: Tensor, distortion: float, *, of_difference: bool = False
    ) -> Tensor:
        settings, options = self.settings, dict[str, Any]()
        if of_difference and settings.estimator == "moe" and not settings.experts:
            # A small difference of three lengths: bounds of each say nothing of it.
            self.states.setdefault(name, MoeState()).record("exact")
            return coding_length(z, distortion=distortion, estimator="exact")
        if settings.estimator == "moe":
            options["state"] = self.states.setdefault(name, MoeState())
            options["experts"] = settings.experts or None
        elif settings.estimator == "taylor":
            options |= {"on_divergence": "exact", "order": settings.order}
        return coding_length(z, distortion=distortion, estimator=settings.estimator, **options)

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


def _columns(rows: Iterable[tuple[Tensor, ...]]) -> Iterator[tuple[Tensor, ...]]:
    return zip(*rows, strict=True)


def _names(site: str, term: str) -> tuple[str, ...]:
    """What the lengths that a term consists of are remembered by: joint, first, second."""
    return (site,) if term == "entropy" else (site, f"{site}.quantized", f"{site}.fp")


def _prepared(rows: Tensor, fp_rows: Tensor) -> tuple[Tensor, Tensor]:
    """Both views, of which the second has no gradient."""
    quantized, full = normalise(standardise(torch.stack((rows, fp_rows)))).unbind()
    return quantized, full.detach()


def _agreement(quantized: Tensor, full: Tensor) -> Tensor:
    """Mean cosine of rows of length one."""
    return (quantized * full).sum(1).mean()


def _side_by_side(quantized: Tensor, full: Tensor) -> Tensor:
    """Rows [m, 2 d] of both views; at length one if theirs are."""
    both: Tensor = torch.cat([quantized, full], 1) * 0.5**0.5
    return both
