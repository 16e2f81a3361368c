"""Columns of a weight that data hardly tells apart, merged: from none to few, the least costly first.

A column w of a weight makes the output w.x. In the coordinates s = C^(1/2) w, C the covariance of x, the squared
distance of two columns is the variance of the difference of their outputs. What a group of columns costs that share
their mean is the variance that is left of each output,

    cost = sum over members |s_j - mean of s|^2,

and two groups of n and m columns that become one cost n m / (n + m) |difference of their means|^2 more: Ward's
criterion. What differs in the mean goes into biases.

Ward's tree is exact and quadratic in the number of columns. Beyond a few hundred, columns are dealt into buckets of
neighbours by their principal direction, and merged inside buckets only, with fresh buckets whenever half of the groups
are left.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    FloatArray = NDArray[np.float64]
    IntArray = NDArray[np.intp]

__all__ = ["Merging", "coordinates", "merge_levels", "ward_merges"]

_BUCKET = 256
_SHARES = tuple(2.0 ** (-k / 4) for k in range(1, 5))
"""How many groups levels leave of those that buckets were made of."""
_FEWEST = 1 / 16
_POWER_STEPS = 6


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Merging:
    """Columns in groups.

    Attributes:
        labels: (N,) the group of each column, numbered from 0 in the order of their first columns.
        cost: variance that is lost, summed over the outputs.
    """

    labels: IntArray
    cost: float

    @property
    def groups(self) -> int:
        """How many different columns stay."""
        return int(self.labels.max()) + 1


def coordinates(weight: NDArray[np.floating], covariance: FloatArray) -> NDArray[np.float32]:
    """(N, r) points whose squared distances are the variances of differences of outputs.

    Args:
        weight: (K, N).
        covariance: (K, K) of the inputs.
    """
    values, vectors = np.linalg.eigh(covariance)
    kept = values > values[-1] * np.finfo(np.float32).eps if values[-1] > 0 else values > 0
    root = vectors[:, kept] * np.sqrt(values[kept])
    points: NDArray[np.float32] = weight.T.astype(np.float32) @ root.astype(np.float32)
    return points


def merge_levels(
    points: NDArray[np.float32], rng: np.random.Generator, weights: FloatArray | None = None
) -> Iterator[Merging]:
    """Nested groups of ``points``, (N, r), fewer from level to level.

    Args:
        points: of :func:`coordinates`.
        rng: for the first guess of principal directions.
        weights: (N,) positive, how much each output's error counts; all the same if None.
    """
    total = points.shape[0]
    labels = np.arange(total)
    centres = points
    sizes: FloatArray = np.ones(total) if weights is None else weights
    cost = 0.0
    while centres.shape[0] > max(2, math.ceil(total * _FEWEST)):
        merges = _bucket_merges(centres, sizes, rng)
        merges = merges[np.argsort(merges[:, 2], kind="stable")]
        lost = np.cumsum(merges[:, 2])
        count, groups = 0, np.arange(centres.shape[0])
        for share in _SHARES:
            count = centres.shape[0] - max(2, int(centres.shape[0] * share))
            groups = _joined(centres.shape[0], merges[:count, :2].astype(np.intp))
            yield Merging(groups[labels], cost + float(lost[count - 1]))
        cost += float(lost[count - 1])
        labels = groups[labels]
        weighted = np.zeros((groups.max() + 1, points.shape[1]))
        np.add.at(weighted, groups, centres * sizes[:, None])
        sizes = np.bincount(groups, sizes).astype(np.float64)
        centres = (weighted / sizes[:, None]).astype(np.float32)


def ward_merges(points: NDArray[np.floating], sizes: FloatArray) -> FloatArray:
    """Ward's tree of weighted points by chains of nearest neighbours: (n - 1, 3), a member of each side, the cost.

    A merge never costs less than those inside it, so that the merges up to any cost are a cut of the tree.

    Args:
        points: (n, r).
        sizes: (n,) how many columns each point stands for.
    """
    points, sizes = np.array(points, np.float64), sizes.copy()
    count = points.shape[0]
    norms = np.einsum("ij,ij->i", points, points)
    alive = np.ones(count, dtype=bool)
    merges = np.empty((max(count - 1, 0), 3))
    chain: list[int] = []
    for number in range(count - 1):
        if not chain:
            chain.append(int(np.argmax(alive)))
        while True:
            last = chain[-1]
            squared = np.maximum(norms - 2 * (points @ points[last]) + norms[last], 0.0)
            costs = squared * (sizes * sizes[last] / (sizes + sizes[last]))
            costs[~alive] = np.inf
            costs[last] = np.inf
            nearest = int(np.argmin(costs))
            if len(chain) > 1 and costs[chain[-2]] <= costs[nearest]:
                nearest = chain[-2]
                break
            chain.append(nearest)
        del chain[-2:]
        merges[number] = last, nearest, costs[nearest]
        size = sizes[last] + sizes[nearest]
        points[nearest] = (points[last] * sizes[last] + points[nearest] * sizes[nearest]) / size
        norms[nearest] = points[nearest] @ points[nearest]
        sizes[nearest] = size
        alive[last] = False
    return merges


def _bucket_merges(
    points: NDArray[np.float32], sizes: FloatArray, rng: np.random.Generator
) -> FloatArray:
    """Merges inside buckets of neighbours, (merges, 3)."""
    found = []
    for bucket in _buckets(points, np.arange(points.shape[0]), rng):
        merges = ward_merges(points[bucket], sizes[bucket])
        merges[:, :2] = bucket[merges[:, :2].astype(np.intp)]
        found.append(merges)
    return np.concatenate(found)


def _buckets(
    points: NDArray[np.float32], members: IntArray, rng: np.random.Generator
) -> Iterator[IntArray]:
    """Halves of halves along principal directions, none larger than a bucket."""
    if members.size <= _BUCKET:
        yield members
        return
    centred = points[members] - points[members].mean(axis=0)
    direction: Any = rng.standard_normal(points.shape[1], dtype=np.float32)
    for _ in range(_POWER_STEPS):
        direction = centred.T @ (centred @ direction)
        direction = direction / max(float(np.linalg.norm(direction)), 1e-30)
    order = np.argsort(centred @ direction, kind="stable")
    for half in (order[: order.size // 2], order[order.size // 2 :]):
        yield from _buckets(points, members[half], rng)


def _joined(count: int, pairs: IntArray) -> IntArray:
    """(count,) labels of the components that ``pairs`` make, numbered by their first members."""
    parent = np.arange(count)

    def root(unit: int) -> int:
        while parent[unit] != unit:
            parent[unit] = parent[parent[unit]]
            unit = int(parent[unit])
        return unit

    for first, second in pairs:
        one, other = root(int(first)), root(int(second))
        parent[max(one, other)] = min(one, other)
    roots = np.array([root(unit) for unit in range(count)])
    return np.unique(roots, return_inverse=True)[1]
