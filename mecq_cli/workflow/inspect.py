"""`mecq inspect`: the site table of an artifact, and the entropy of a run over time."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from mecq_cli.config import InspectConfig
from mecq_cli.errors import UsageError
from mecq_cli.events import Listener
from mecq_cli.integer.ir import IntegerModel
from mecq_cli.sizes import site_rows, totals
from mecq_cli.target import resolve_target
from mecq_cli.training.metrics import read_rows
from mecq_cli.workflow.allot import with_sensitivities
from mecq_cli.workflow.artifacts import load_artifact
from mecq_cli.workflow.targets import require_artifact, settings_of

ENTROPY_STEPS = 20
"""Steps at either end whose coding lengths are averaged."""


def inspect(config: InspectConfig, listener: Listener) -> dict[str, Any]:
    """Layers, bits, scales and bytes of a run's artifact or of an artifact file.

    Raises:
        UsageError: the target is neither.
        ArtifactError: it cannot be read.
    """
    target = resolve_target(config.target)
    if target.run is not None:
        path = require_artifact(target.run)
    elif target.kind == "artifact" and target.path is not None:
        path = target.path
    else:
        raise UsageError(
            f"{target.name}: nothing to inspect; give a run folder or an integer .safetensors file"
        )
    model = load_artifact(path)
    fp32 = int(model.metadata.get("fp32_bytes", 0))
    sizes = totals(model, fp32, path.stat().st_size)
    return {
        "target": target.name,
        "model": model.metadata.get("model"),
        "wbits": model.metadata.get("wbits"),
        "abits": model.metadata.get("abits"),
        "input_shape": list(model.input_shape),
        "sites": with_sensitivities(site_rows(model), settings_of(target.run)),
        **_allotment(model, sizes["ideal_bytes"]),
        "totals": sizes,
        "entropy": [] if target.run is None else coding_lengths(target.run.metrics),
    }


def _allotment(model: IntegerModel, size: int) -> dict[str, Any]:
    """What a target for the bits of the weights came to; empty without one."""
    known, average = model.metadata.get("allotment"), model.metadata.get("wbits")
    if not isinstance(known, dict) or not isinstance(average, (int, float)):
        return {}
    told = {key: known.get(key) for key in ("sensitivity", "target_avg_bits", "target_size")}
    return {"allotment": {**told, "average_bits": average, "weight_bytes": size}}


def coding_lengths(metrics: Path) -> list[dict[str, Any]]:
    """The coding length of each coded site at the begin and at the end of a training.

    Args:
        metrics: a metrics.jsonl.

    Returns:
        A row a site: its name, and the means of the first and of the last `ENTROPY_STEPS` steps
        in nats. Empty where nothing was trained or coded.
    """
    steps = [row.get("coding_length") or {} for row in read_rows(metrics)]
    first, last = steps[:ENTROPY_STEPS], steps[-ENTROPY_STEPS:]
    return [
        {
            "site": site,
            "first": statistics.fmean(step[site] for step in first),
            "last": statistics.fmean(step[site] for step in last),
        }
        for site in (steps[0] if steps else {})
    ]
