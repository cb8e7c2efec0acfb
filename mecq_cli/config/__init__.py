"""Settings: validated, frozen, and each one knows where it came from.

`resolve` puts those of a run together, `to_toml` writes them down so that the same file makes the
same run again.
"""

from mecq_cli.config.commands import (
    CompareConfig,
    DemoConfig,
    EvalConfig,
    ExportConfig,
    InspectConfig,
    PredictConfig,
    ReportConfig,
    from_flags,
)
from mecq_cli.config.file import from_toml, read_toml, to_toml
from mecq_cli.config.resolution import CHANGEABLE_ON_RESUME, explain, question, resolve
from mecq_cli.config.run import (
    FLAG_ONLY,
    OF_BOTH_VIEWS,
    TARGETS,
    Allotment,
    Allotted,
    LayerOverride,
    QuantizeConfig,
    whole_bits,
)

__all__ = [
    "CHANGEABLE_ON_RESUME",
    "FLAG_ONLY",
    "OF_BOTH_VIEWS",
    "TARGETS",
    "Allotment",
    "Allotted",
    "CompareConfig",
    "DemoConfig",
    "EvalConfig",
    "ExportConfig",
    "InspectConfig",
    "LayerOverride",
    "PredictConfig",
    "QuantizeConfig",
    "ReportConfig",
    "explain",
    "from_flags",
    "from_toml",
    "question",
    "read_toml",
    "resolve",
    "to_toml",
    "whole_bits",
]
