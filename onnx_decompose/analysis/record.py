"""What is known of a parameter's initialization before its weight is looked at.

``InitRecord`` travels inside the ONNX model (metadata key ``METADATA_KEY``): the exporter writes it, evidence reads it.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from numpy.typing import NDArray

METADATA_KEY = "onnx_decompose.init_records"
"""Model metadata: JSON, ``{initializer name: InitRecord.to_json()}``."""

QUANTILE_LEVELS = tuple((2 * i + 1) / 130 for i in range(65))
"""Probabilities of the quantile sketch: 65 midpoints, so that 0.5 is one of them."""


@dataclasses.dataclass(frozen=True, slots=True)
class InitRecord:
    """One parameter as it was right after construction.

    Attributes:
        parameter: the torch name, such as ``layers.0.weight``; also its key in a snapshot file.
        shape: the torch shape, usually (fan_out, fan_in).
        family: ``normal``, ``uniform``, ``constant`` or ``other``.
        location: mean of the fitted family.
        scale: standard deviation (normal, other), half width (uniform), 0 (constant).
        quantiles: values at ``QUANTILE_LEVELS``.
        fan_in: inputs that one unit sums over.
        fan_out: units that one input feeds.
        transposed: whether the ONNX weight holds the torch parameter transposed.
    """

    parameter: str
    shape: tuple[int, ...]
    family: str
    location: float
    scale: float
    quantiles: tuple[float, ...]
    fan_in: int
    fan_out: int
    transposed: bool = False

    def to_json(self) -> dict[str, Any]:
        """Plain values for ``json.dumps``."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> InitRecord:
        """Inverse of :meth:`to_json`; raises ``TypeError`` or ``ValueError`` on foreign fields."""
        tuples = {
            name: tuple(fields[name]) for name in ("shape", "quantiles") if name in fields
        }
        return cls(**{**fields, **tuples})


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Prior:
    """Everything known about one site's weight besides the weight itself.

    Arrays are oriented like the weight: (K inputs, N outputs).
    """

    fan_in: int
    fan_out: int
    record: InitRecord | None = None
    snapshot: NDArray[np.floating[Any]] | None = None
    second_moment: NDArray[np.floating[Any]] | None = None
