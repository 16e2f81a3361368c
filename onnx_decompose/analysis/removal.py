"""Which units a model misses least, if what is left takes over: backward elimination on second moments.

Units h feed sites of weight W each. With V the least squares weight on the units that are left, and P the inverse of
their covariance, unit i costs |v_i|^2 / P_ii of the outputs' variance when it goes and the others are refitted, as in
optimal brain surgery (Hassibi and Stork 1993), here for whole rows of V. Then

    V <- V - P_i v_i / P_ii        P <- P - P_i P_i^T / P_ii

One unit at a time, so that of two that say the same only one goes. Means take no part: they go into biases.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np
import scipy.linalg

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    FloatArray = NDArray[np.float64]
    IntArray = NDArray[np.intp]

__all__ = ["Removal", "Reader", "removal_order"]

_RIDGE, _RIDGE_OF_FEW = 1e-10, 1e-6
"""Of the mean variance of a unit. Losses under it cannot be told; a covariance of few rows has no inverse."""
_ROWS_PER_UNIT = 2.0
"""Of fewer rows the small eigenvalues of a covariance are far too small: (1 - sqrt(1/2))^2 of the right ones here."""
_BLOCK = 64
"""Units that go before what is left of the others is written anew."""
_TRUSTED = 0.5
"""Of 1 / (variance of a unit), which P_ii cannot be under: what is, rounding has made."""
_MORE_RIDGE = 10.0


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Reader:
    """A site that reads the units.

    Attributes:
        covariance: (H, H) of what it reads.
        weight: (H, N).
        rows: that the covariance is of; as many as it takes by default.
    """

    covariance: FloatArray
    weight: FloatArray
    rows: float = float("inf")


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Removal:
    """Units in the order in which they can go.

    Attributes:
        order: the units that went before the loss was too large, first to last.
        lost: after each of them, the variance lost over that of the outputs, of all readers together.
    """

    order: IntArray
    lost: FloatArray

    def within(self, loss: float) -> IntArray:
        """The units that go if ``loss`` of the variance may be lost."""
        return self.order[: np.searchsorted(self.lost, loss, side="right")]


def removal_order(readers: Sequence[Reader], most: float = 0.5) -> Removal:
    """Units of least loss first, one at a time, until ``most`` of the outputs' variance would be lost.

    Args:
        readers: the sites that read the units.
        most: share of the variance.
    """
    states = [_State(reader) for reader in readers]
    power = sum(state.power for state in states)
    units = np.arange(readers[0].weight.shape[0])
    order: list[int] = []
    lost: list[float] = []
    total = 0.0
    alive = np.ones(units.size, dtype=bool)
    while alive.any():
        costs = np.sum([state.costs() for state in states], axis=0)
        costs[~alive] = np.inf
        unit = int(np.argmin(costs))
        total += float(costs[unit])
        if total > most * power and power > 0:
            break
        order.append(int(units[unit]))
        lost.append(total / power if power > 0 else 0.0)
        for state in states:
            state.remove(unit)
        alive[unit] = False
        if len(order) % _BLOCK == 0:
            for state in states:
                state.keep(alive)
            units, alive = units[alive], alive[alive]
    return Removal(np.array(order, dtype=np.intp), np.array(lost))


class _State:
    """V and P of one reader while units go.

    What the last units changed is kept apart, V = V0 - U Z and P = P0 - U U^T, with a column p / sqrt(P_ii) of U and a
    row v / sqrt(P_ii) of Z for each of them, so that the large matrices are only read until they are brought up to
    date, for a block of units at once. Where units say nearly the same, rounding adds up in P; as soon as it shows,
    V and P are worked out from the covariance again, with a larger ridge if that is not enough.
    """

    def __init__(self, reader: Reader) -> None:
        covariance = reader.covariance
        self.power = float(np.einsum("ij,ij->", reader.weight, covariance @ reader.weight))
        mean = float(np.diagonal(covariance).mean())
        enough = reader.rows >= _ROWS_PER_UNIT * covariance.shape[0]
        self._ridge = max((_RIDGE if enough else _RIDGE_OF_FEW) * mean, 1e-30)
        self._covariance, self._wanted = covariance, reader.weight
        self._units = np.arange(covariance.shape[0])
        self._begin(np.array(reader.weight, np.float64), self._inverted(self._units))
        self._renew_if_needed()

    def _begin(self, weight: FloatArray, inverse: FloatArray) -> None:
        units, outputs = weight.shape
        self._weight, self._inverse = weight, inverse
        self._columns = np.zeros((units, _BLOCK), order="F")
        self._rows = np.zeros((_BLOCK, outputs))
        self._gone = 0
        self._squares = np.einsum("ij,ij->i", weight, weight)
        self._diagonal = np.diagonal(inverse).copy()
        self._alive = np.ones(units, dtype=bool)

    def costs(self) -> FloatArray:
        """What each unit would cost; of one that went nothing is left."""
        found: FloatArray = np.divide(
            self._squares, self._diagonal, out=np.zeros_like(self._squares), where=self._alive
        )
        return found

    def remove(self, unit: int) -> None:
        """Let the others take over."""
        columns, rows = self._columns[:, : self._gone], self._rows[: self._gone]
        column = self._inverse[unit] - columns @ columns[unit]
        self._alive[unit] = False
        if column[unit] < self._least()[unit]:
            self._renew()
            return
        scale = 1 / np.sqrt(column[unit])
        column *= scale
        row = (self._weight[unit] - columns[unit] @ rows) * scale
        along = self._weight @ row - columns @ (rows @ row)
        self._squares += column * (column * (row @ row) - 2 * along)
        np.maximum(self._squares, 0, out=self._squares)
        self._diagonal -= column * column
        self._squares[unit] = self._diagonal[unit] = 0
        self._columns[:, self._gone], self._rows[self._gone] = column, row
        self._gone += 1
        self._renew_if_needed()

    def keep(self, alive: NDArray[np.bool_]) -> None:
        """Forget the units that went, and bring the rest up to date."""
        columns, rows = self._columns[alive, : self._gone], self._rows[: self._gone]
        weight, inverse = self._weight[alive], self._inverse[np.ix_(alive, alive)]
        weight -= columns @ rows
        inverse -= columns @ columns.T
        self._units = self._units[alive]
        self._begin(weight, inverse)
        self._renew_if_needed()

    def _least(self) -> FloatArray:
        """What P_ii cannot be under, but for rounding."""
        variances = np.diagonal(self._covariance)[self._units] + self._ridge
        least: FloatArray = _TRUSTED / variances
        return least

    def _renew_if_needed(self) -> None:
        if (self._diagonal < self._least())[self._alive].any():
            self._renew()

    def _renew(self) -> None:
        """V and P of the units that are left from the covariance, with as much ridge as it takes."""
        alive = self._alive.copy()
        units = self._units[alive]
        left = self._inverted(units)
        while (np.diagonal(left) < self._least()[alive]).any():
            self._ridge *= _MORE_RIDGE
            left = self._inverted(units)
        weight = np.zeros_like(self._weight)
        weight[alive] = left @ (self._covariance[units] @ self._wanted)
        inverse = np.zeros_like(self._inverse)
        inverse[np.ix_(alive, alive)] = left
        self._begin(weight, inverse)
        self._alive = alive

    def _inverted(self, units: IntArray) -> FloatArray:
        """P of these units."""
        ridged = self._covariance[np.ix_(units, units)] + self._ridge * np.eye(units.size)
        inverse: FloatArray = scipy.linalg.inv(ridged)
        return inverse
