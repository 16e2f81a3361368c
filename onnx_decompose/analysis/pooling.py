"""Inputs of a weight that hardly matter, added up before it: one row for many, the least costly first.

An input that is hardly ever active adds x_k w_k to the outputs, of variance var(x_k) |w_k|^2. In a pool its row is the
pool's, c, and what is lost is, but for what inputs have to do with each other,

    cost = sum over the pool  var(x_k) |w_k - c|^2

which is least for the mean of the rows, each weighted by its input's variance. Pools of several rows are made by Ward's
criterion with these weights (``analysis.merging``), on the rows' principal coordinates. Inputs that never vary cost
nothing wherever they are.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import sparse
from scipy.sparse import csgraph

from onnx_decompose.analysis.merging import ward_merges

if TYPE_CHECKING:
    from numpy.typing import NDArray

    FloatArray = NDArray[np.float64]
    IntArray = NDArray[np.intp]

__all__ = ["Pools", "least_telling", "pooled"]

_COORDINATES = 16


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Pools:
    """Inputs that get one row.

    Attributes:
        labels: (K,) the row of each input, numbered from 0 in the order of their first inputs.
        weights: (K,) how much each input counts in its row, 0 or more.
    """

    labels: IntArray
    weights: FloatArray

    @property
    def rows(self) -> int:
        """How many different rows there are."""
        return int(self.labels.max()) + 1

    def mean(self, weight: NDArray[np.floating[Any]]) -> FloatArray:
        """(rows, N) the mean of the rows of ``weight``, (K, N), in each pool; a plain one where none counts."""
        total = np.bincount(self.labels, self.weights)
        shares = np.where(total[self.labels] > 0, self.weights, 1.0)
        shares /= np.bincount(self.labels, shares)[self.labels]
        found = np.zeros((self.rows, weight.shape[1]))
        np.add.at(found, self.labels, weight * shares[:, None])
        return found


def least_telling(
    weight: NDArray[np.floating[Any]], variance: FloatArray
) -> tuple[IntArray, FloatArray]:
    """Inputs in the order of what they add to the outputs' variance, least first, and the running share of it.

    Args:
        weight: (K, N).
        variance: (K,) of each input.
    """
    wide = weight.astype(np.float64)
    adds = variance * np.einsum("ij,ij->i", wide, wide)
    order = np.argsort(adds, kind="stable")
    running = np.cumsum(adds[order])
    return order, running / max(float(running[-1]), 1e-300)


def pooled(
    weight: NDArray[np.floating[Any]], variance: FloatArray, members: IntArray, rows: int
) -> Pools:
    """Pools of ``members``, ``rows`` of them at most; every other input has a row of its own.

    Args:
        weight: (K, N).
        variance: (K,) of each input.
        members: the inputs to put into pools.
        rows: how many pools.
    """
    own = weight[members].astype(np.float64)
    sizes = variance[members]
    floor = float(sizes.max(initial=0.0)) * 1e-6 or 1.0
    group = np.zeros(members.size, dtype=np.intp)
    if rows > 1 and members.size > rows:
        merges = ward_merges(_principal(own, sizes), np.maximum(sizes, floor))
        cut = merges[np.argsort(merges[:, 2], kind="stable")][: members.size - rows]
        group = _components(members.size, cut[:, :2].astype(np.intp))
    elif rows > 1:
        group = np.arange(members.size)
    labels = np.arange(weight.shape[0])
    for number in range(int(group.max(initial=-1)) + 1):
        inside = members[group == number]
        labels[inside] = inside.min()
    weights = variance.astype(np.float64)
    return Pools(np.unique(labels, return_inverse=True)[1], weights)


def _principal(rows: FloatArray, sizes: FloatArray) -> FloatArray:
    """(n, r) the rows in their first principal coordinates."""
    if rows.shape[1] <= _COORDINATES:
        return rows
    _, vectors = np.linalg.eigh((rows * sizes[:, None]).T @ rows)
    found: FloatArray = rows @ vectors[:, -_COORDINATES:]
    return found


def _components(count: int, pairs: IntArray) -> IntArray:
    """(count,) labels of the components that ``pairs`` make."""
    graph = sparse.coo_array((np.ones(len(pairs)), (pairs[:, 0], pairs[:, 1])), (count, count))
    labels: IntArray = csgraph.connected_components(graph, directed=False)[1].astype(np.intp)
    return labels
