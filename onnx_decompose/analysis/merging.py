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
from scipy import sparse
from scipy.sparse import csgraph

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    FloatArray = NDArray[np.float64]
    IntArray = NDArray[np.intp]

__all__ = ["Merging", "coordinates", "group_counts", "merge_levels", "ward_merges"]

_BUCKET = 256
_SHARES = tuple(2.0 ** (-k / 8) for k in range(1, 9))
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


def group_counts(total: int) -> tuple[int, ...]:
    """How many groups each level of ``total`` columns has."""
    counts: list[int] = []
    left = total
    while left > max(2, math.ceil(total * _FEWEST)):
        counts.extend(max(2, int(left * share)) for share in _SHARES)
        left = counts[-1]
    return tuple(counts)


def merge_levels(
    points: NDArray[np.float32], rng: np.random.Generator, weights: FloatArray | None = None
) -> Iterator[Merging]:
    """Nested groups of ``points``, (N, r), fewer from level to level: as many as :func:`group_counts` says.

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
    counts = group_counts(total)
    for start in range(0, len(counts), len(_SHARES)):
        merges = _bucket_merges(centres, sizes, rng)
        merges = merges[np.argsort(merges[:, 2], kind="stable")]
        lost = np.cumsum(merges[:, 2])
        joins, groups = 0, np.arange(centres.shape[0])
        for count in counts[start : start + len(_SHARES)]:
            joins = centres.shape[0] - count
            groups = _joined(centres.shape[0], merges[:joins, :2].astype(np.intp))
            yield Merging(groups[labels], cost + float(lost[joins - 1]))
        cost += float(lost[joins - 1])
        labels = groups[labels]
        weighted = np.zeros((groups.max() + 1, points.shape[1]))
        np.add.at(weighted, groups, centres * sizes[:, None])
        sizes = np.bincount(groups, sizes).astype(np.float64)
        centres = (weighted / sizes[:, None]).astype(np.float32)


def ward_merges(points: NDArray[np.floating], sizes: FloatArray) -> FloatArray:
    """Ward's tree of weighted points by chains of nearest neighbours: (n - 1, 3), a member of each side, the cost.

    A merge never costs less than those inside it, so that the merges up to any cost are a cut of the tree. What two
    groups cost that become one follows from what they cost before (Lance and Williams 1967):

        c(ij, k) = ((n_i + n_k) c(i, k) + (n_j + n_k) c(j, k) - n_k c(i, j)) / (n_i + n_j + n_k)

    Args:
        points: (n, r).
        sizes: (n,) how many columns each point stands for.
    """
    sizes = sizes.copy()
    count = points.shape[0]
    costs = _pair_costs(points, sizes)
    alive = np.ones(count, dtype=bool)
    merges = np.empty((max(count - 1, 0), 3))
    chain: list[int] = []
    for number in range(count - 1):
        if not chain:
            chain.append(int(np.argmax(alive)))
        while True:
            row = costs[chain[-1]]
            nearest = int(row.argmin())
            if len(chain) > 1 and row[chain[-2]] <= row[nearest]:
                nearest = chain[-2]
                break
            chain.append(nearest)
        gone = chain[-1]
        del chain[-2:]
        cost = costs[gone, nearest]
        merges[number] = gone, nearest, cost
        joined = (sizes + sizes[nearest]) * costs[nearest] + (sizes + sizes[gone]) * costs[gone]
        joined -= sizes * cost
        joined /= sizes + (sizes[nearest] + sizes[gone])
        joined[nearest] = np.inf
        costs[nearest] = costs[:, nearest] = joined
        costs[gone] = costs[:, gone] = np.inf
        sizes[nearest] += sizes[gone]
        alive[gone] = False
    return merges


def _pair_costs(points: NDArray[np.floating], sizes: FloatArray) -> FloatArray:
    """(n, n) what every two points cost that become one; infinite for one with itself."""
    points = np.asarray(points, np.float64)
    norms = np.einsum("ij,ij->i", points, points)
    squared = np.maximum(norms[:, None] + norms - 2 * (points @ points.T), 0.0)
    costs: FloatArray = squared * (sizes[:, None] * sizes / (sizes[:, None] + sizes))
    np.fill_diagonal(costs, np.inf)
    return costs


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
    edges = (np.ones(len(pairs), dtype=bool), (pairs[:, 0], pairs[:, 1]))
    graph = sparse.coo_array(edges, shape=(count, count))
    _, found = csgraph.connected_components(graph, directed=False)
    _, firsts, labels = np.unique(found, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(firsts))[labels]
