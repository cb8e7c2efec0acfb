"""The modules a quantized network is made of.

In training a site carries real values that lie on the grid of their quantizer (fake
quantization) and batch norm uses the batch. In evaluation it carries the integers themselves,
and every site runs the very operation that will be exported: `Site.node` describes it,
`mecq_cli.kernels` executes it. Nothing is rounded differently later.
"""

from __future__ import annotations

from mecq_cli.sites.base import Reference, Site, threshold
from mecq_cli.sites.grids import DequantizeSite, QuantizeSite
from mecq_cli.sites.moves import DropoutSite, PassSite
from mecq_cli.sites.pointwise import AddSite, ClipSite, FunctionSite, MulSite
from mecq_cli.sites.pools import AdaptivePoolSite, AveragePoolSite, GlobalAveragePoolSite
from mecq_cli.sites.products import ProductSite
from mecq_cli.sites.tokens import (
    ConstantSite,
    FloatSite,
    LogSoftmaxSite,
    MatmulSite,
    NormalizeSite,
    NormSite,
    ResizeSite,
    RmsNormSite,
    SoftmaxSite,
)

__all__ = [
    "AdaptivePoolSite",
    "AddSite",
    "AveragePoolSite",
    "ClipSite",
    "ConstantSite",
    "DequantizeSite",
    "DropoutSite",
    "FloatSite",
    "FunctionSite",
    "GlobalAveragePoolSite",
    "LogSoftmaxSite",
    "MatmulSite",
    "MulSite",
    "NormSite",
    "NormalizeSite",
    "PassSite",
    "ProductSite",
    "QuantizeSite",
    "Reference",
    "ResizeSite",
    "RmsNormSite",
    "Site",
    "SoftmaxSite",
    "threshold",
]
