"""Constant folding on arrays: units that are the same in every run, and what they add to the sites that read them.

Constants are carried through a region in float64, one value at a time, and rounded once, when they become a bias.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    BoolArray = NDArray[np.bool_]
    FloatArray = NDArray[np.float64]

__all__ = ["Units", "anything", "fold_rows", "read_by", "settle"]

_ROWS_AT_A_TIME = 1024


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Units:
    """What is known of the units of one value before anything runs.

    Attributes:
        varies: (N,) bool, False where the unit is one number in every run and at every position.
        value: (N,) that number; 0 where the unit varies.
    """

    varies: BoolArray
    value: FloatArray

    @property
    def is_zero(self) -> BoolArray:
        """(N,) bool, the units that are always zero."""
        zero: BoolArray = ~self.varies & (self.value == 0)
        return zero


def anything(size: int) -> Units:
    """``size`` units of which nothing is known."""
    return Units(np.ones(size, dtype=bool), np.zeros(size))


def settle(values: FloatArray, varies: BoolArray, largest: float) -> Units:
    """The units of a computed value.

    Args:
        values: (..., N), computed with any finite number in the place of what varies.
        varies: (N,) bool, the units that depend on something that varies.
        largest: finite numbers of the value's type end here.

    Returns:
        As constant only those that are finite, and equal at every position.
    """
    positions = values.reshape(-1, values.shape[-1]) if values.ndim else values.reshape(1, 1)
    first = positions[0]
    steady = (positions == first).all(axis=0) & (np.abs(first) <= largest)
    varies = varies | ~steady
    return Units(varies, np.where(varies, 0.0, first))


def read_by(operands: Iterable[Units], size: int, *, product: bool) -> BoolArray:
    """Which units of an elementwise operator's output vary, (size,) bool.

    Args:
        operands: each of ``size`` units, or of one unit for all.
        size: units of the output.
        product: the operator multiplies; zero times anything finite is zero.
    """
    varies, zero = np.zeros(size, dtype=bool), np.zeros(size, dtype=bool)
    for operand in operands:
        varies |= operand.varies
        zero |= operand.is_zero
    return varies & ~zero if product else varies


def fold_rows(
    units: Units, weight: NDArray[Any], mask: BoolArray
) -> tuple[BoolArray, FloatArray]:
    """Take the rows of constant units out of a site.

    Args:
        units: of the value that the site reads, K of them.
        weight: (K, N).
        mask: (K, N) bool, the supported entries.

    Returns:
        The mask without those rows, and what they add to every output, (N,) float64. A constant costs nothing, so
        that unsupported entries of those rows count too.
    """
    total = np.zeros(weight.shape[1])
    constant = np.flatnonzero(~units.varies)
    if constant.size == 0:
        return mask, total
    for start in range(0, constant.size, _ROWS_AT_A_TIME):
        rows = constant[start : start + _ROWS_AT_A_TIME]
        total += units.value[rows] @ weight[rows].astype(np.float64)
    return mask & units.varies[:, None], total
