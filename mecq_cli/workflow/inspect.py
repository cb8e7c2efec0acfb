"""`mecq inspect`: the site table of an artifact."""

from __future__ import annotations

from typing import Any

from mecq_cli.config import InspectConfig
from mecq_cli.errors import UsageError
from mecq_cli.events import Listener
from mecq_cli.export import safetensors
from mecq_cli.runs import resolve_target
from mecq_cli.sizes import site_rows, totals
from mecq_cli.workflow.targets import require_artifact


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
    model = safetensors.load(path)
    fp32 = int(model.metadata.get("fp32_bytes", 0))
    return {
        "target": target.name,
        "model": model.metadata.get("model"),
        "wbits": model.metadata.get("wbits"),
        "abits": model.metadata.get("abits"),
        "input_shape": list(model.input_shape),
        "sites": site_rows(model),
        "totals": totals(model, fp32, path.stat().st_size),
    }
