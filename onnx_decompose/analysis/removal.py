"""Which units a model misses least, if what is left takes over: backward elimination on second moments.

Units h feed sites of weight W each. With V the least squares weight on the units that are left, and P the inverse of
their covariance, unit i costs |v_i|^2 / P_ii of the outputs' variance when it goes and the others are refitted, as in
optimal brain surgery (Hassibi and Stork 1993), here for whole rows of V. Then

    V <- V - P_i v_i / P_ii        P <- P - P_i P_i^T / P_ii

A channel of a convolution has a row for each of its taps, that go together: with V_i (taps, N) and P_ii (taps, taps)
its cost is tr(V_i^T P_ii^-1 V_i), and the rest is the same with P_ii^-1 in the place of 1 / P_ii.

One unit at a time, so that of two that say the same only one goes. Means take no part: they go into biases.

Of several sets of units, each in its order, as many go as are worth it at one price: the loss of all sets together,
plus the price times the share of the weights that stay, is least (``at_price``).
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.linalg

from onnx_decompose.analysis.gram import diagonal_blocks

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    FloatArray = NDArray[np.float64]
    IntArray = NDArray[np.intp]

__all__ = ["Product", "Reader", "Removal", "at_price", "removal_order"]

_RIDGE, _RIDGE_OF_FEW = 1e-10, 1e-6
"""Of the mean variance of a unit. Losses under it cannot be told; a covariance of few rows has no inverse."""
_ROWS_PER_UNIT = 2.0
"""Of fewer rows the small eigenvalues of a covariance are far too small: (1 - sqrt(1/2))^2 of the right ones here."""
_BLOCK = 64
"""Units that go before what is left of the others is written anew."""
_TRUSTED = 0.5
"""Of 1 / (variance of a unit), which P_ii cannot be under: what is, rounding has made. So with its covariance."""
_MORE_RIDGE = 10.0
_MOST_TURNS = 50
"""Of sets of units; a few are enough."""


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Reader:
    """A site that reads the units.

    Attributes:
        covariance: (H taps, H taps) of what it reads.
        weight: (H taps, N).
        rows: that the covariance is of; as many as it takes by default.
        taps: rows of the weight for each of H units, one after another.
    """

    covariance: FloatArray
    weight: FloatArray
    rows: float = float("inf")
    taps: int = 1


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


@dataclasses.dataclass(frozen=True, slots=True)
class Product:
    """Entries of a weight between two sets of units.

    Attributes:
        source: number of the set that is read; None for units that all stay.
        target: number of the set that is made; None for units that all stay.
        entries: for each pair of a unit that is read and one that is made, those that stay taken together as one.
    """

    source: int | None
    target: int | None
    entries: int

    @property
    def sides(self) -> tuple[int | None, int | None]:
        """Both sets: the same for a state that makes itself."""
        return self.source, self.target


def at_price(
    removals: Sequence[Removal],
    sizes: Sequence[int],
    products: Sequence[Product],
    price: float,
) -> list[IntArray]:
    """The units of each set that go where a loss of ``price`` for all of the weights is the most that is paid.

    A unit saves more where more others stay that it is joined with, so that the sets take turns until nothing changes:
    every turn makes the sum of loss and price less.

    Args:
        removals: the order of each set, and what is lost.
        sizes: units of each set.
        products: the weights that their units are rows and columns of.
        price: the share of the variance, of all sets together, that all of the weights are worth.
    """
    whole = sum(_entries(product, sizes) for product in products)
    losses = [np.concatenate([[0.0], removal.lost]) for removal in removals]
    counts = [0] * len(removals)
    for _ in range(_MOST_TURNS):
        before = list(counts)
        for number, lost in enumerate(losses):
            left = [size - count for size, count in zip(sizes, counts, strict=True)]
            staying = sizes[number] - np.arange(lost.size)
            work = sum(
                _entries(p, left, {number: staying}) for p in products if number in p.sides
            )
            counts[number] = int(np.argmin(lost + price * work / whole))
        if counts == before:
            break
    return [removal.order[:count] for removal, count in zip(removals, counts, strict=True)]


def _entries(
    product: Product, left: Sequence[int], tried: Mapping[int, IntArray] | None = None
) -> Any:
    """Entries of ``product`` where so many units of each set are left; beside a set that is all gone, as beside one.

    With ``tried``, so many each of some sets in place of those.
    """
    found: Any = product.entries
    for side in product.sides:
        if side is not None:
            found = found * (tried[side] if tried and side in tried else max(left[side], 1))
    return found


def removal_order(readers: Sequence[Reader], most: float = 0.5) -> Removal:
    """Units of least loss first, one at a time, until ``most`` of the outputs' variance would be lost.

    Args:
        readers: the sites that read the units.
        most: share of the variance.
    """
    states = [_State(reader) for reader in readers]
    power = sum(state.power for state in states)
    units = np.arange(readers[0].weight.shape[0] // readers[0].taps)
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

    What the last units changed is kept apart, V = V0 - U Z and P = P0 - U U^T, with the columns P_i P_ii^(-1/2) of U
    and the rows P_ii^(-1/2) V_i of Z for each of them, so that the large matrices are only read until they are brought
    up to date, for a block of units at once. Of every unit V_i V_i^T and P_ii are up to date. Where units say nearly
    the same, rounding adds up in P; as soon as it shows, V and P are worked out from the covariance again, with a
    larger ridge if that is not enough.
    """

    def __init__(self, reader: Reader) -> None:
        covariance = reader.covariance
        self.power = float(np.einsum("ij,ij->", reader.weight, covariance @ reader.weight))
        self._taps = reader.taps
        mean = float(np.diagonal(covariance).mean())
        enough = reader.rows >= _ROWS_PER_UNIT * covariance.shape[0]
        self._ridge = max((_RIDGE if enough else _RIDGE_OF_FEW) * mean, 1e-30)
        self._covariance, self._wanted = covariance, reader.weight
        self._units = np.arange(covariance.shape[0] // reader.taps)
        self._alive = np.ones(self._units.size, dtype=bool)
        self._least = self._bound()
        self._begin(np.array(reader.weight, np.float64), self._inverted(self._units))
        self._renew_if_needed()

    def _begin(self, weight: FloatArray, inverse: FloatArray) -> None:
        rows, outputs = weight.shape
        self._weight, self._inverse = weight, inverse
        self._columns = np.zeros((rows, _BLOCK * self._taps), order="F")
        self._rows = np.zeros((_BLOCK * self._taps, outputs))
        self._gone = 0
        blocks = weight.reshape(rows // self._taps, self._taps, outputs)  # outputs may be none
        self._squares = blocks @ blocks.transpose(0, 2, 1)
        self._diagonal = diagonal_blocks(inverse, self._taps)

    def costs(self) -> FloatArray:
        """What each unit would cost; of one that went nothing is left."""
        found = np.zeros(self._alive.size)
        squares, diagonal = self._squares[self._alive], self._diagonal[self._alive]
        if self._taps == 1:
            found[self._alive] = (squares / diagonal)[:, 0, 0]
        else:
            solved = np.linalg.solve(diagonal, squares)
            found[self._alive] = np.maximum(np.trace(solved, axis1=1, axis2=2), 0.0)
        return found

    def remove(self, unit: int) -> None:
        """Let the others take over."""
        columns, rows = self._columns[:, : self._gone], self._rows[: self._gone]
        own = slice(unit * self._taps, (unit + 1) * self._taps)
        column = self._inverse[own].T - columns @ columns[own].T
        self._alive[unit] = False
        if not _exceeds(column[None, own], self._least[None, unit]):
            self._renew()
            return
        scale = _inverse_root(column[own])
        column = column @ scale
        row = scale.T @ (self._weight[own] - columns[own] @ rows)
        along = self._weight @ row.T - columns @ (rows @ row.T)
        self._update(column, along, row @ row.T)
        last = self._gone + self._taps
        self._columns[:, self._gone : last], self._rows[self._gone : last] = column, row
        self._gone = last
        self._renew_if_needed()

    def _update(self, column: FloatArray, along: FloatArray, square: FloatArray) -> None:
        """V_i V_i^T and P_ii of all units, after V <- V - U Z and P <- P - U U^T.

        Args:
            column: (H taps, taps) U.
            along: (H taps, taps) V Z^T, V from before.
            square: (taps, taps) Z Z^T.
        """
        if self._taps == 1:
            column, along = column[:, 0], along[:, 0]
            self._squares[:, 0, 0] += column * (column * square[0, 0] - 2 * along)
            np.maximum(self._squares, 0, out=self._squares)
            self._diagonal[:, 0, 0] -= column * column
            return
        blocks, alongs = (a.reshape(-1, self._taps, self._taps) for a in (column, along))
        turned = blocks.transpose(0, 2, 1)
        cross = (alongs - blocks @ square / 2) @ turned
        self._squares -= cross + cross.transpose(0, 2, 1)
        self._diagonal -= blocks @ turned

    def keep(self, alive: NDArray[np.bool_]) -> None:
        """Forget the units that went, and bring the rest up to date."""
        kept = np.repeat(alive, self._taps)
        columns, rows = self._columns[kept, : self._gone], self._rows[: self._gone]
        weight, inverse = self._weight[kept], self._inverse[np.ix_(kept, kept)]
        weight -= columns @ rows
        inverse -= columns @ columns.T
        self._units, self._alive, self._least = (
            self._units[alive],
            self._alive[alive],
            self._least[alive],
        )
        self._begin(weight, inverse)
        self._renew_if_needed()

    def _bound(self) -> FloatArray:
        """(H, taps, taps) what the P_ii cannot be under, but for rounding."""
        own = diagonal_blocks(self._covariance, self._taps)[self._units]
        inverse = np.linalg.inv(own + self._ridge * np.eye(self._taps))
        least: FloatArray = np.asarray(_TRUSTED * inverse, np.float64)
        return least

    def _renew_if_needed(self) -> None:
        if not _exceeds(self._diagonal[self._alive], self._least[self._alive]):
            self._renew()

    def _renew(self) -> None:
        """V and P of the units that are left from the covariance, with as much ridge as it takes."""
        alive = self._alive
        units = self._units[alive]
        left = self._inverted(units)
        while not _exceeds(diagonal_blocks(left, self._taps), self._least[alive]):
            self._ridge *= _MORE_RIDGE
            self._least = self._bound()
            left = self._inverted(units)
        kept = np.repeat(alive, self._taps)
        weight = np.zeros_like(self._weight)
        weight[kept] = left @ (self._covariance[self._rows_of(units)] @ self._wanted)
        inverse = np.zeros_like(self._inverse)
        inverse[np.ix_(kept, kept)] = left
        self._begin(weight, inverse)

    def _inverted(self, units: IntArray) -> FloatArray:
        """P of these units."""
        rows = self._rows_of(units)
        ridged = self._covariance[np.ix_(rows, rows)] + self._ridge * np.eye(rows.size)
        inverse: FloatArray = scipy.linalg.inv(ridged)
        return inverse

    def _rows_of(self, units: IntArray) -> IntArray:
        return (units[:, None] * self._taps + np.arange(self._taps)).ravel()


def _exceeds(blocks: FloatArray, least: FloatArray) -> bool:
    """Whether every matrix of (units, taps, taps) is larger than another, in all directions."""
    if blocks.shape[-1] == 1:
        return bool((blocks >= least).all())
    try:
        np.linalg.cholesky(blocks - least)
    except np.linalg.LinAlgError:
        return False
    return True


def _inverse_root(square: FloatArray) -> FloatArray:
    """R with R R^T the inverse of a positive definite matrix."""
    if square.size == 1:
        return 1 / np.sqrt(square)
    values, vectors = np.linalg.eigh(square)
    root: FloatArray = np.asarray(vectors / np.sqrt(values), np.float64)
    return root
