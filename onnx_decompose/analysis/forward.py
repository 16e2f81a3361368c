"""Which units a group of outputs needs first: forward selection on second moments, several groups at a time.

Units h feed outputs y = h W. Of the units that are chosen, least squares takes over for the rest, so that the next one
is the one that explains most of what is still missing (orthogonal least squares; Chen, Billings and Luo 1989):

    gain_i = |cov(h_i, r)|^2 / var(h_i | chosen)        r = y - its projection on the chosen

for all outputs together. Groups that share a pool of units take turns: the one that lacks most, as a share of its
outputs' variance, takes its best unit that is still free. What is chosen up to one loss is a part of what is chosen up
to a smaller one. Means take no part: they go into biases.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from onnx_decompose.analysis.support import APART

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    FloatArray = NDArray[np.float64]
    IntArray = NDArray[np.intp]

__all__ = ["Draft", "Need", "draft_units"]

_LEAST_LEFT = 1e-9
"""Of a unit's variance: with less of it left, the chosen units say all that it says."""


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Need:
    """What one site makes of the units for one group.

    Attributes:
        covariance: (H, H) of the units, in the rows of the group.
        weight: (H, N) to the outputs of the group, each as far as it counts.
    """

    covariance: FloatArray
    weight: FloatArray


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Draft:
    """Units in the order in which groups chose them.

    Attributes:
        order: (chosen,) units.
        groups: (chosen,) whose each is.
        lacking: (chosen,) the largest share of variance that any group lacks once it is chosen.
        size: number of units that there are.
    """

    order: IntArray
    groups: IntArray
    lacking: FloatArray
    size: int

    def within(self, loss: float) -> IntArray:
        """(H,) group of each unit if no group may lack more than ``loss``; ``APART`` for the others."""
        enough = np.flatnonzero(self.lacking <= loss)
        count = int(enough[0]) + 1 if enough.size else self.order.size
        labels = np.full(self.size, APART, dtype=np.intp)
        labels[self.order[:count]] = self.groups[:count]
        return labels


def draft_units(
    needs: Sequence[Sequence[Need]], least: float, belongs: FloatArray | None = None
) -> Draft:
    """Choose until no group lacks more than ``least`` of its outputs' variance.

    Args:
        needs: by group, of each site that reads the units.
        least: share of the variance.
        belongs: (H, groups) how much of what a unit does it does for each group, 0 to 1. What it would explain counts
            that much, so that no group takes as a makeshift what another one needs; by default all units are anyone's.
    """
    size = next(need.covariance.shape[0] for group in needs for need in group)
    states = [[_State(need) for need in group] for group in needs]
    powers = [sum(state.left for state in group) for group in states]
    free = np.ones(size, dtype=bool)
    order: list[int] = []
    groups: list[int] = []
    lacking: list[float] = []
    lacks = np.array([1.0 if power > 0 else 0.0 for power in powers])
    lagging = lacks > least
    while lagging.any() and free.any():
        group = int(np.argmax(np.where(lagging, lacks, -1.0)))
        gains = np.where(free, np.sum([state.gains() for state in states[group]], axis=0), 0.0)
        if belongs is not None:
            gains *= belongs[:, group]
        unit = int(np.argmax(gains))
        if gains[unit] <= 0:
            lagging[group] = False
            continue
        for state in states[group]:
            state.choose(unit)
        free[unit] = False
        left = sum(state.left for state in states[group])
        lacks[group] = max(left, 0.0) / powers[group]
        lagging[group] = lacks[group] > least
        order.append(unit)
        groups.append(group)
        lacking.append(float(lacks.max()))
    return Draft(
        np.array(order, dtype=np.intp),
        np.array(groups, dtype=np.intp),
        np.array(lacking),
        size,
    )


class _State:
    """What is still missing from the outputs of one site while units are chosen."""

    def __init__(self, need: Need) -> None:
        self._covariance = need.covariance
        self._missing = need.covariance @ need.weight
        self.left = float(np.einsum("ij,ij->", need.weight, self._missing))
        self._variance = np.diagonal(need.covariance).copy()
        self._least = _LEAST_LEFT * self._variance
        # (chosen, H) their covariances with all units, each without what the earlier ones explain.
        self._columns = np.empty((8, self._variance.size))
        self._chosen = 0

    def gains(self) -> FloatArray:
        """(H,) variance of the outputs that each unit would explain."""
        squares = np.einsum("ij,ij->i", self._missing, self._missing)
        live = self._variance > self._least
        found: FloatArray = np.divide(
            squares, self._variance, out=np.zeros_like(squares), where=live
        )
        return found

    def choose(self, unit: int) -> None:
        """Let ``unit`` explain what it can."""
        left = self._variance[unit]
        if left <= self._least[unit]:
            return
        earlier = self._columns[: self._chosen]
        column = (self._covariance[unit] - earlier[:, unit] @ earlier) / np.sqrt(left)
        explained = self._missing[unit] / np.sqrt(left)
        self._missing -= np.outer(column, explained)
        self._variance -= column**2
        self.left -= float(explained @ explained)
        if self._chosen == len(self._columns):
            self._columns = np.concatenate([self._columns, np.empty_like(self._columns)])
        self._columns[self._chosen] = column
        self._chosen += 1
