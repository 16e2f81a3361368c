"""What rounding can make of a few operators at most, whatever the order of additions: a running error bound.

A sum of n products in floating point with unit roundoff u, added in any order, is off by at most gamma_n |x| |W| with
gamma_n = n u / (1 - n u) (Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., eq. 3.5). Errors that come
in are carried along entry by entry.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

__all__ = ["Bounded", "activated", "added", "gamma", "multiplied", "product"]

_APPROXIMATED = 16.0
"""Units of roundoff of size 1 that an activation's approximation may be off by, beside its argument."""

LIPSCHITZ = {
    **dict.fromkeys(("Abs", "Identity", "LeakyRelu", "Neg", "Relu"), (1.0, 0.0)),
    "Sigmoid": (0.25, _APPROXIMATED),
    "Tanh": (1.0, _APPROXIMATED),
}
"""By operator: how much of an error of the argument gets through, and units of roundoff of its own."""


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Bounded:
    """A value in float64 and, entry by entry, how far a computed one may be from it."""

    value: Array
    error: Array


def gamma(terms: int, roundoff: float) -> float:
    """The bound's factor for sums of so many terms; infinite where it says nothing."""
    share = terms * roundoff
    return share / (1 - share) if share < 1 else float("inf")


def product(x: Bounded, weight: Bounded, roundoff: float) -> Bounded:
    """``x @ weight``, (..., K) and (K, N)."""
    size, other = np.abs(x.value) + x.error, np.abs(weight.value)
    factor = gamma(weight.value.shape[-2], roundoff)
    carried = x.error @ other + size @ weight.error
    return Bounded(x.value @ weight.value, carried + factor * (size @ (other + weight.error)))


def added(first: Bounded, second: Bounded, roundoff: float, sign: float = 1.0) -> Bounded:
    """``first + sign * second``."""
    value = first.value + sign * second.value
    carried = first.error + second.error
    return Bounded(value, carried + roundoff * (np.abs(value) + carried))


def multiplied(first: Bounded, second: Bounded, roundoff: float) -> Bounded:
    """``first * second``, entry by entry."""
    value = first.value * second.value
    carried = (
        np.abs(first.value) * second.error
        + np.abs(second.value) * first.error
        + first.error * second.error
    )
    return Bounded(value, carried + roundoff * (np.abs(value) + carried))


def activated(op_type: str, argument: Bounded, value: Array, roundoff: float) -> Bounded:
    """An activation of :data:`LIPSCHITZ`, whose exact value is known."""
    through, own = LIPSCHITZ[op_type]
    return Bounded(value, through * argument.error + own * roundoff)
