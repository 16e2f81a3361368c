"""Units in a given number of groups of equal size, so that as much as can be stays within them.

Layers of units are joined by blocks of *energy*, e_ij >= 0: how much unit i matters to unit j. Cutting the edges
between groups loses the energy between them.

    start     spectral co-clustering (Dhillon 2001), for any graph of layers: the leading eigenvectors of
              D^-1/2 E D^-1/2, rows of length 1, by k-means, and from there the nearest balanced groups
    refine    in the manner of Kernighan and Lin (1970): one layer after the other moves to where most of its energy is.
              With the others held, the best assignment under the capacities is a transport problem, solved exactly, so
              that what is kept never shrinks.

Balanced groups are what pays: G groups of equal size leave 1/G of a weight, whatever is in them.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import TYPE_CHECKING

import numpy as np
from scipy.optimize import linear_sum_assignment

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    FloatArray = NDArray[np.float64]
    IntArray = NDArray[np.intp]

__all__ = ["Energy", "Partition", "balanced", "kept_share", "partition"]

_POWER_STEPS = 100
_MOST_EXACT = 2048
"""Units of a layer: an assignment of that many to as many places takes seconds."""
_MEANS_STEPS = 20
_SWEEPS = 50
_WORTH_A_SWEEP = 1e-3
"""Of the energy: what the last sweeps gain, no refit would show."""


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Energy:
    """What one site carries.

    Attributes:
        source: layer of its inputs.
        target: layer of its outputs.
        entries: (K, N), 0 or more.
    """

    source: int
    target: int
    entries: FloatArray


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Partition:
    """Units in groups.

    Attributes:
        labels: per layer, (units,) the group of each.
        kept: share of the energy within groups; 1/G is what chance keeps.
    """

    labels: tuple[IntArray, ...]
    kept: float


def partition(
    sizes: Sequence[int], edges: Sequence[Energy], groups: int, *, rng: np.random.Generator
) -> Partition:
    """The units of all layers in groups that hold as many of each layer, but for one where it does not divide.

    Args:
        sizes: units of each layer.
        edges: energy between layers.
        groups: how many, 2 or more.
        rng: where the search starts.
    """
    labels = _spectral(sizes, edges, groups, rng)
    kept = kept_share(labels, edges)
    for _ in range(_SWEEPS):
        moved = list(labels)
        for layer in range(len(sizes)):
            moved[layer] = balanced(_pull(layer, moved, edges, groups))
        better = kept_share(moved, edges)
        gained = better - kept
        if gained > 0:  # a layer that is joined to itself may have moved past its best
            labels, kept = moved, better
        if gained < _WORTH_A_SWEEP:
            break
    return Partition(tuple(labels), kept)


def kept_share(labels: Sequence[IntArray], edges: Sequence[Energy]) -> float:
    """Share of the energy that stays within groups; 1 where there is none."""
    within = total = 0.0
    for edge in edges:
        inside = labels[edge.source][:, None] == labels[edge.target]
        within += float(edge.entries[inside].sum())
        total += float(edge.entries.sum())
    return within / total if total > 0 else 1.0


def balanced(scores: FloatArray) -> IntArray:
    """The assignment of the largest total score in which no group has more than units / groups, rounded up.

    For three groups or more of many units it is only nearly the best, as the best one takes the square of the units in
    memory, and more than that in time: the units that would lose most by their second choice go first.

    Args:
        scores: (units, groups).

    Returns:
        (units,) the group of each.
    """
    units, groups = scores.shape
    room = -(-units // groups)
    if groups == 2:
        # The units that gain most by the first group, as many as it has room for or as gain at all.
        gain = scores[:, 0] - scores[:, 1]
        first = min(max(int(np.count_nonzero(gain > 0)), units - room), room)
        labels = np.ones(units, dtype=np.intp)
        labels[np.argsort(-gain, kind="stable")[:first]] = 0
        return labels
    if units > _MOST_EXACT:
        return _clearest_first(scores, room)
    rows, places = linear_sum_assignment(np.repeat(scores, room, axis=1), maximize=True)
    labels = np.empty(units, dtype=np.intp)
    labels[rows] = places // room
    return labels


def _clearest_first(scores: FloatArray, room: int) -> IntArray:
    """Group after group that is full is closed, and what is left of the units has to choose anew."""
    units, groups = scores.shape
    labels = np.full(units, -1, dtype=np.intp)
    open_scores = scores.astype(np.float64)
    left = np.full(groups, room)
    waiting = np.arange(units)
    while waiting.size:
        among = open_scores[waiting]
        best = among.argmax(axis=1)
        chosen = among[np.arange(waiting.size), best]
        among[np.arange(waiting.size), best] = -np.inf
        second = among.max(axis=1)
        regret = np.where(np.isfinite(second), chosen - second, np.inf)
        order = np.argsort(-regret, kind="stable")
        # Up to the first unit that finds its group full, all have what they want.
        rank = np.empty(waiting.size, dtype=np.intp)
        for group in range(groups):
            mine = order[best[order] == group]
            rank[mine] = np.arange(mine.size)
        full = np.flatnonzero(rank[order] >= left[best[order]])
        taken = order[: full[0]] if full.size else order
        labels[waiting[taken]] = best[taken]
        left -= np.bincount(best[taken], minlength=groups)
        open_scores[:, left == 0] = -np.inf
        waiting = np.delete(waiting, taken)
    return labels


def _pull(
    layer: int, labels: Sequence[IntArray], edges: Sequence[Energy], groups: int
) -> FloatArray:
    """(units, groups) energy between each unit of a layer and what is in each group."""
    members = np.eye(groups)
    pull = np.zeros((labels[layer].size, groups))
    for edge in edges:
        if edge.source == layer:
            pull += edge.entries @ members[labels[edge.target]]
        if edge.target == layer:
            pull += edge.entries.T @ members[labels[edge.source]]
    return pull


def _spectral(
    sizes: Sequence[int], edges: Sequence[Energy], groups: int, rng: np.random.Generator
) -> list[IntArray]:
    """K-means of the rows of the leading eigenvectors, balanced at its end."""
    vectors = _leading(sizes, edges, groups, rng)
    rows = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-300)
    centres = _apart(rows, groups, rng)
    labels = np.full(len(rows), -1)
    for _ in range(_MEANS_STEPS):
        found = (rows @ centres.T).argmax(axis=1)
        if (found == labels).all():
            break
        labels = found
        sums = (labels == np.arange(groups)[:, None]) @ rows
        # A centre that lost all of its rows stays where it was.
        centres = np.where(sums.any(axis=1, keepdims=True), sums, centres)
        centres /= np.maximum(np.linalg.norm(centres, axis=1, keepdims=True), 1e-300)
    layers = np.split(rows, np.cumsum(sizes)[:-1])
    return [balanced(layer @ centres.T) for layer in layers]


def _leading(
    sizes: Sequence[int], edges: Sequence[Energy], groups: int, rng: np.random.Generator
) -> FloatArray:
    """(units, groups) the leading eigenvectors of D^-1/2 E D^-1/2, by subspace iteration."""
    total = sum(sizes)
    parts = [
        slice(end - size, end)
        for size, end in zip(sizes, itertools.accumulate(sizes), strict=True)
    ]

    def product(x: FloatArray) -> FloatArray:
        made = np.zeros_like(x)
        for edge in edges:
            source, target = parts[edge.source], parts[edge.target]
            made[source] += edge.entries @ x[target]
            made[target] += edge.entries.T @ x[source]
        return made

    degree = product(np.ones((total, 1)))
    scale = np.divide(1.0, np.sqrt(degree), out=np.zeros_like(degree), where=degree > 0)
    vectors, _ = np.linalg.qr(rng.normal(size=(total, min(groups, total))))
    for _ in range(_POWER_STEPS):
        # The spectrum of layers that alternate is symmetric: half of it is moved out of the way.
        vectors, _ = np.linalg.qr(vectors + scale * product(scale * vectors))
    leading: FloatArray = scale * vectors  # back from the normalized problem
    return leading


def _apart(rows: FloatArray, groups: int, rng: np.random.Generator) -> FloatArray:
    """(groups, ...) rows to begin with: one at random, then always the one least like those there are."""
    chosen = [int(rng.integers(rows.shape[0]))]
    nearest = rows @ rows[chosen[0]]
    while len(chosen) < groups:
        chosen.append(int(nearest.argmin()))
        nearest = np.maximum(nearest, rows @ rows[chosen[-1]])
    return rows[chosen]
