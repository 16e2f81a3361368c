"""Storey's estimate of the share of null entries, with a confidence interval.

Under the null p-values are uniform (or larger, where entries are rounded), so those above
``LAMBDA`` are nearly all null: pi0 = #{p > lambda} / (n (1 - lambda)) (Storey, 2002, equation
6). It never underestimates on average.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

from scipy import special

from onnx_decompose.analysis import scan

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from onnx_decompose.analysis.null import Null

__all__ = ["LAMBDA", "Pi0", "pi0_from_count", "storey_pi0"]

LAMBDA = 0.5
"""Storey's tuning parameter; 0.5 balances bias against variance for any share of signals."""


@dataclasses.dataclass(frozen=True, slots=True)
class Pi0:
    """Share of null entries and its confidence interval, both within [0, 1]."""

    value: float
    interval: tuple[float, float]


def storey_pi0(flat: NDArray[np.floating[Any]], null: Null, grid: scan.Resolution) -> Pi0:
    """Estimate from the entries themselves, (n,), in one pass."""
    cut = grid.cut(null.location, null.isf(math.log(LAMBDA)))
    return pi0_from_count(flat.size - scan.tail_count(flat, cut), flat.size)


def pi0_from_count(above: int, size: int, *, confidence: float = 0.95) -> Pi0:
    """Estimate from ``above`` p-values over ``LAMBDA`` among ``size`` (Wilson's interval)."""
    if size == 0:
        return Pi0(1.0, (0.0, 1.0))
    share = above / size
    z = -float(special.ndtri((1 - confidence) / 2))
    centre = (share + z * z / (2 * size)) / (1 + z * z / size)
    spread = (
        z
        / (1 + z * z / size)
        * math.sqrt(share * (1 - share) / size + z * z / (4 * size * size))
    )
    low, value, high = (
        min(max(x / (1 - LAMBDA), 0.0), 1.0) for x in (centre - spread, share, centre + spread)
    )
    return Pi0(value, (min(low, value), max(high, value)))  # but for rounding, no change
