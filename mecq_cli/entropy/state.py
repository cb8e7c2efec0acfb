"""What the mixture keeps from call to call, and saves with a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mecq_cli.entropy.head import Head
from mecq_cli.errors import CheckpointError

_VERSION = 1
# A rung that missed is left out for 8, 16, ... calls, no more than these.
_LONGEST_WAIT = 64


class MoeState:
    """A subspace to start from, the probes' seed, and who answered how often.

    The subspace is kept in feature space, where it means the same for the next batch. All that is
    random comes from the number of the call: runs repeat, and a restored run goes on as it was.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.basis: Tensor | None = None  # [d, width]
        self.rung = 0
        self.wait = 0
        self.misses = 0

    @property
    def calls(self) -> int:
        """Calls answered so far."""
        return sum(self.counts.values())

    def state_dict(self) -> dict[str, Any]:
        """Tensors under "tensors", plain JSON under "values"."""
        return {
            "tensors": {} if self.basis is None else {"basis": self.basis.detach().clone()},
            "values": {
                "version": _VERSION,
                "counts": dict(self.counts),
                "rung": self.rung,
                "wait": self.wait,
                "misses": self.misses,
            },
        }

    def load_state_dict(self, stored: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken.

        Raises:
            CheckpointError: it is not what `state_dict` gives.
        """
        try:
            values = stored["values"]
            if values["version"] != _VERSION:
                raise CheckpointError(
                    f"entropy state: version is {values['version']}, this program reads {_VERSION}"
                )
            counts = Counter({str(name): int(count) for name, count in values["counts"].items()})
            rung, wait, misses = (int(values[name]) for name in ("rung", "wait", "misses"))
            basis = stored["tensors"].get("basis")
            if basis is not None and (basis.dim() != 2 or not basis.is_floating_point()):
                raise TypeError("basis")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(
                f"entropy state: cannot be read ({error!r}); take another checkpoint"
            ) from error
        self.counts, self.rung, self.wait, self.misses = counts, rung, wait, misses
        self.basis = None if basis is None else basis.detach().clone()

    def record(self, expert: str) -> None:
        """Count an answer."""
        self.counts[expert] += 1

    def first_rung(self, rungs: int) -> int:
        """Where to start: at the rung of the last answer, or, after a while, again at the first."""
        if self.wait == 0:
            return 0
        self.wait -= 1
        return min(self.rung, rungs)

    def settled(self, first: int, rung: int) -> None:
        """Of the rungs tried from ``first`` on, ``rung`` held (one too many: none did)."""
        self.rung = rung
        if rung == 0:
            self.misses = 0
        elif first == 0:
            self.misses += 1
            self.wait = min(4 * 2**self.misses, _LONGEST_WAIT)

    def start(self, a: Tensor, rows_are_samples: bool, width: int) -> Tensor:
        """What is kept of the subspace, as at most ``width`` columns [s, ...] for a."""
        features = a.shape[1] if rows_are_samples else a.shape[0]
        if self.basis is None or self.basis.shape[0] != features:
            return a.new_zeros(a.shape[0], 0)
        basis = self.basis[:, -width:].to(a)
        return a @ basis if rows_are_samples else basis

    def keep(self, a: Tensor, head: Head, rows_are_samples: bool, width: int) -> None:
        """Keep the directions of the largest Ritz values."""
        _, vectors = torch.linalg.eigh(head.t)
        top = head.v @ vectors[:, -width:]
        basis = a.mT @ top if rows_are_samples else top
        size = torch.linalg.vector_norm(basis, dim=0, keepdim=True)
        self.basis = basis / size.clamp(min=torch.finfo(basis.dtype).tiny)

    def probes(self, a: Tensor, count: int) -> Tensor:
        """Signs [s, count] (Rademacher), other ones in each call."""
        signs = torch.randint(0, 2, (a.shape[0], count), generator=self._generator(1))
        return (2 * signs - 1).to(a)

    def normal(self, a: Tensor, count: int) -> Tensor:
        """Normal numbers [s, count]."""
        return torch.randn(a.shape[0], count, generator=self._generator(2)).to(a)

    def _generator(self, use: int) -> torch.Generator:
        # On the CPU, so that every device sees the same numbers.
        return torch.Generator().manual_seed(2 * self.calls + use)
