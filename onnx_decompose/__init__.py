"""Find the independent substructures that training left in an ONNX model's weights, and rewrite the model into
smaller parallel operators, with the same inputs and outputs, verified in onnxruntime.

    torch module --export--> ONNX + init records
        --> evidence      null distribution, p-values, supported entries      analysis.evidence, analysis.criteria
        --> annealing     the largest removal inside the error budget         pipeline
        --> structure     components of each region's state graph             analysis.structure
        --> plan          dense, shrink, split, grouped, triangular, shared   plan
        --> rewrite       the region's nodes, once per branch or stack        passes
        --> verify        claim A: rewritten == annealed; claim B: error against the original
        --> bench         not faster? then the original stays

    >>> import onnx_decompose
    >>> result = onnx_decompose.rewrite("model.onnx", "small.onnx")  # doctest: +SKIP
    >>> print(result.report.summary.reason)  # doctest: +SKIP

Functions take an ``onnx.ModelProto`` or a path. Errors form one tree under ``DecomposeError``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from onnx_decompose.errors import (
    AnnealingError,
    ClaimError,
    DataError,
    DecomposeError,
    InputError,
    ModelError,
    OptionError,
    OutputError,
    PassError,
    ProviderError,
    StructuralError,
)
from onnx_decompose.options import Options
from onnx_decompose.pipeline import Rewrite, analyze, bench, rewrite, validate
from onnx_decompose.reporting.report import Report
from onnx_decompose.timing.bench import Timing
from onnx_decompose.verification.verify import Tolerance, Validation
from onnx_decompose.version import VERSION as __version__

if TYPE_CHECKING:
    from onnx_decompose.exporter import export
    from onnx_decompose.records.init_recorder import InitRecorder

__all__ = [
    # the five verbs
    "analyze",
    "bench",
    "export",
    "rewrite",
    "validate",
    # what they take
    "InitRecorder",
    "Options",
    "Tolerance",
    # what they return
    "Report",
    "Rewrite",
    "Timing",
    "Validation",
    # what they raise
    "AnnealingError",
    "ClaimError",
    "DataError",
    "DecomposeError",
    "InputError",
    "ModelError",
    "OptionError",
    "OutputError",
    "PassError",
    "ProviderError",
    "StructuralError",
    "__version__",
]


def __getattr__(name: str) -> Any:
    """Load the exporter when it is asked for: it needs torch, which nothing else does."""
    if name == "export":
        from onnx_decompose.exporter import export

        return export
    if name == "InitRecorder":
        from onnx_decompose.records.init_recorder import InitRecorder

        return InitRecorder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
