"""Many coding lengths at once: all layers, or the channel groups of one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from mecq_cli.entropy import exact, series
from mecq_cli.entropy.base import Answer, Operator, coded, eager, gram, largest_eigenvalue_bound
from mecq_cli.entropy.coding import coding_length
from mecq_cli.entropy.cost import costs_on
from mecq_cli.entropy.state import MoeState
from mecq_cli.errors import UsageError

# Larger matrices fill the machine one by one.
_LARGEST_BATCHED = 384
_TOLERANCE = 1e-3


@eager
def block_coding_lengths(
    blocks: Sequence[Tensor],
    *,
    distortion: float = 0.06,
    states: Sequence[MoeState] | None = None,
) -> Tensor:
    """The coding length of each block [m_g, d_g], as [len(blocks)] in nats.

    Blocks of one shape are coded together; each goes to its own expert by its own bound. Their sum
    over groups of columns of one matrix is an upper bound of its coding length (Fischer), not the
    same number.

    Args:
        blocks: samples in rows; on one device.
        distortion: eps_d^2.
        states: one for each block, for the large ones to start warm.

    Raises:
        UsageError: no blocks, a shape that makes no sense, or not one state for each block.
    """
    if not blocks:
        raise UsageError("coding lengths of blocks: there are no blocks")
    if states is not None and len(states) != len(blocks):
        raise UsageError(f"coding lengths of blocks: {len(states)} states for {len(blocks)} blocks")
    lengths: list[Tensor] = [blocks[0]] * len(blocks)
    for members in _alike(blocks):
        if min(blocks[members[0]].shape) > _LARGEST_BATCHED:
            for index in members:
                state = None if states is None else states[index]
                lengths[index] = coding_length(blocks[index], distortion=distortion, state=state)
        else:
            own = None if states is None else [states[index] for index in members]
            stacked = torch.stack([blocks[index] for index in members])
            together = coded(stacked, distortion, partial(solve_batch, states=own))
            for index, length in zip(members, together.unbind(), strict=True):
                lengths[index] = length
    return torch.stack(lengths)


def _alike(blocks: Sequence[Tensor]) -> list[list[int]]:
    groups: dict[tuple[object, ...], list[int]] = {}
    for index, block in enumerate(blocks):
        if block.dim() != 2:
            raise UsageError(
                f"coding lengths of blocks: block {index} has the shape {list(block.shape)}; "
                "give [samples, features]"
            )
        groups.setdefault((block.shape, block.dtype, block.device), []).append(index)
    return list(groups.values())


@dataclass(frozen=True)
class _Parts:
    """Operators for parts of a batch: [(indices, operator), ...]."""

    parts: list[tuple[Tensor, Operator]]

    def apply(self, a: Tensor) -> Tensor:
        result = torch.empty_like(a)
        for indices, operator in self.parts:
            result[indices] = operator.apply(a[indices])
        return result


def solve_batch(a: Tensor, lam: float, *, states: Sequence[MoeState] | None = None) -> Answer:
    """A batch [g, s, n]: those with a narrow spectrum by a polynomial, the others exactly."""
    k = gram(a, lam)
    highest = costs_on(a.device.type).highest_degree(a.shape[-2])
    groups: dict[tuple[str, int], list[int]] = {}
    bounds = largest_eigenvalue_bound(k).tolist()
    for index, bound in enumerate(bounds):
        usable = 0.0 < bound < float("inf")
        found = series.smallest_degree(bound, _TOLERANCE / 2, highest) if usable else None
        groups.setdefault(found or ("exact", 0), []).append(index)
    values = a.new_zeros(a.shape[0])
    parts: list[tuple[Tensor, Operator]] = []
    for (kind, degree), members in groups.items():
        indices = torch.tensor(members, device=a.device)
        if kind == "exact":
            answer = exact.from_gram(k[indices], a[indices], lam)
        else:
            bound = max(bounds[index] for index in members)
            answer = series.solve_from_gram(k[indices], kind, degree, bound)
        values[indices] = answer.value
        parts.append((indices, answer.operator))
        for state in () if states is None else [states[index] for index in members]:
            state.record(kind)
    return Answer(values, _Parts(parts))
