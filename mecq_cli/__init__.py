"""mecq: low-bit quantization-aware training of vision models, down to integers in ONNX.

`quantize(model, data)` quantizes a torch module, and gives a `Quantized`; `load` reads an integer
artifact back as a torch module. `progress` shows what a long call does.

The calls behind the commands take their settings as one object: `quantize_config`, `evaluate`,
`export_artifact`, `predict`, `inspect`, `demo`. Each name is loaded when it is first used.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

from mecq_cli.errors import (
    ArtifactError,
    CheckpointError,
    DataError,
    EnvironmentFailure,
    InputError,
    Interrupted,
    MecqError,
    NumericError,
    UsageError,
    VerificationError,
)
from mecq_cli.events import Listener

if TYPE_CHECKING:
    from mecq_cli.cli.common import progress
    from mecq_cli.config import (
        DemoConfig,
        EvalConfig,
        ExportConfig,
        InspectConfig,
        LayerOverride,
        PredictConfig,
        QuantizeConfig,
        resolve,
    )
    from mecq_cli.models.preprocessing import Preprocessing
    from mecq_cli.workflow.api import Quantized, quantize
    from mecq_cli.workflow.demo import demo
    from mecq_cli.workflow.evaluate import evaluate
    from mecq_cli.workflow.export import export as export_artifact
    from mecq_cli.workflow.inspect import inspect
    from mecq_cli.workflow.load import Classifier, load
    from mecq_cli.workflow.predict import predict
    from mecq_cli.workflow.quantize import quantize as quantize_config

# onnxruntime's, which would report its use otherwise; whoever sets the variable is heard.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__version__ = "0.1.0"

__all__ = [
    "ArtifactError",
    "CheckpointError",
    "Classifier",
    "DataError",
    "DemoConfig",
    "EnvironmentFailure",
    "EvalConfig",
    "ExportConfig",
    "InputError",
    "InspectConfig",
    "Interrupted",
    "LayerOverride",
    "Listener",
    "MecqError",
    "NumericError",
    "PredictConfig",
    "Preprocessing",
    "QuantizeConfig",
    "Quantized",
    "UsageError",
    "VerificationError",
    "__version__",
    "demo",
    "evaluate",
    "export_artifact",
    "inspect",
    "load",
    "predict",
    "progress",
    "quantize",
    "quantize_config",
    "resolve",
]

# torch takes a second and more to import, and pydantic a tenth: neither before it is needed.
_LAZY = {
    **dict.fromkeys(
        [
            "DemoConfig",
            "EvalConfig",
            "ExportConfig",
            "InspectConfig",
            "LayerOverride",
            "PredictConfig",
            "QuantizeConfig",
            "resolve",
        ],
        ("mecq_cli.config", ""),
    ),
    "Preprocessing": ("mecq_cli.models.preprocessing", ""),
    "Quantized": ("mecq_cli.workflow.api", ""),
    "Classifier": ("mecq_cli.workflow.load", ""),
    "demo": ("mecq_cli.workflow.demo", ""),
    "evaluate": ("mecq_cli.workflow.evaluate", ""),
    # `export` itself is the package of the formats.
    "export_artifact": ("mecq_cli.workflow.export", "export"),
    "inspect": ("mecq_cli.workflow.inspect", ""),
    "load": ("mecq_cli.workflow.load", ""),
    "predict": ("mecq_cli.workflow.predict", ""),
    "progress": ("mecq_cli.cli.common", ""),
    "quantize": ("mecq_cli.workflow.api", ""),
    "quantize_config": ("mecq_cli.workflow.quantize", "quantize"),
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _LAZY[name]
    return getattr(import_module(module), attribute or name)


def __dir__() -> list[str]:
    return sorted(__all__)
