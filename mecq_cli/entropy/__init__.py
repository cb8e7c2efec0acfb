"""Coding length of features: how much a batch of representations says."""

from __future__ import annotations

from mecq_cli.entropy.blocks import block_coding_lengths
from mecq_cli.entropy.coding import ESTIMATORS, coding_length, require_estimator
from mecq_cli.entropy.distributed import global_rows
from mecq_cli.entropy.exact import exact_coding_length
from mecq_cli.entropy.moe import EXPERTS, report, share_of_answers
from mecq_cli.entropy.regularizer import EntropyRegularizer, EntropySettings
from mecq_cli.entropy.representation import as_rows, centre, normalise, standardise
from mecq_cli.entropy.state import MoeState
from mecq_cli.entropy.values import value_coding_length

__all__ = [
    "ESTIMATORS",
    "EXPERTS",
    "EntropyRegularizer",
    "EntropySettings",
    "MoeState",
    "as_rows",
    "block_coding_lengths",
    "centre",
    "coding_length",
    "exact_coding_length",
    "global_rows",
    "normalise",
    "report",
    "require_estimator",
    "share_of_answers",
    "standardise",
    "value_coding_length",
]
