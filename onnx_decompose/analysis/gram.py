"""Second moments of what a site reads and what it should make, streamed: no activation is kept.

    shift s, t = means of the first batch       kept for good, so that sums stay small
    sums   sum p (x - s), sum p (y - t)         p the weight of a row, 1 by default
    xx     sum p (x - s)(x - s)^T    (K, K)
    xy     sum p (x - s)(y - t)^T    (K, N)
    yy     sum p (y - t)^2           (N,)

Batches arrive as float32 (or whatever the model computes in) and are widened to float64 before they are multiplied: a
Gram matrix of float32 products is good to 1e-7 of its largest eigenvalue, and a solution of normal equations needs the
small ones. Memory: 8 (K^2 + K N) bytes per site, whatever the number of samples.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import sparse

if TYPE_CHECKING:
    from numpy.typing import NDArray

    FloatArray = NDArray[np.float64]

__all__ = ["MomentAccumulator", "Moments", "diagonal_blocks"]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Moments:
    """Means and central second moments of x, (K,), together with y, (N,), over the same rows.

    Attributes:
        count: rows, or their total weight; of rows that are not independent, how many they are worth.
        mean_x: (K,) mean of x.
        mean_y: (N,) mean of y.
        xx: (K, K) covariance of x, divided by ``count``.
        xy: (K, N) covariance of x with y, divided by ``count``.
        yy: (N,) variance of y.
    """

    count: float
    mean_x: FloatArray
    mean_y: FloatArray
    xx: FloatArray
    xy: FloatArray
    yy: FloatArray

    @property
    def spread(self) -> FloatArray:
        """(K,) standard deviation of x."""
        return np.sqrt(np.maximum(np.diagonal(self.xx), 0.0))

    def through(self, weight: NDArray[Any]) -> Moments:
        """The moments of x with x W, W of shape (K, N)."""
        wide = weight.astype(np.float64)
        xy = self.xx @ wide
        yy = np.maximum((xy * wide).sum(axis=0), 0.0)
        return Moments(self.count, self.mean_x, self.mean_x @ wide, self.xx, xy, yy)

    def of_outputs(self, outputs: slice) -> Moments:
        """The moments of x with some of the y."""
        mean, xy, yy = self.mean_y[outputs], self.xy[:, outputs], self.yy[outputs]
        return Moments(self.count, self.mean_x, mean, self.xx, xy, yy)

    def around(self, constants: FloatArray) -> Moments:
        """Moments about 0 and ``constants``, (N,), not the means: for a fit that adds just these."""
        x, y = self.mean_x, self.mean_y - constants
        return Moments(
            self.count,
            np.zeros_like(x),
            np.zeros_like(y),
            self.xx + np.outer(x, x),
            self.xy + np.outer(x, y),
            self.yy + y**2,
        )

    def each(self, weight: NDArray[Any], taps: int = 1) -> FloatArray:
        """(inputs, N) variance of what each input alone adds to x W, W (K, N): by ``taps`` rows one after another."""
        wide = weight.astype(np.float64)
        if taps == 1:
            alone: FloatArray = np.maximum(np.diagonal(self.xx), 0.0)[:, None] * wide**2
            return alone
        blocks = wide.reshape(-1, taps, wide.shape[1])
        own = diagonal_blocks(self.xx, taps)
        found: FloatArray = np.maximum(((own @ blocks) * blocks).sum(axis=1), 0.0)
        return found

    def added_up(self, labels: NDArray[np.intp]) -> Moments:
        """The moments of sums of x with y: of the x with one label, (K,), numbered from 0."""
        shape = (labels.size, int(labels.max()) + 1)
        sums = sparse.csr_array((np.ones(labels.size), (np.arange(labels.size), labels)), shape)
        mean: FloatArray = np.bincount(labels, self.mean_x).astype(np.float64)
        xx: FloatArray = sums.T @ (sums.T @ self.xx).T
        return Moments(self.count, mean, self.mean_y, xx, sums.T @ self.xy, self.yy)


class MomentAccumulator:
    """Adds up batches of x and y; see the module's docstring."""

    def __init__(self) -> None:
        self._begun = False
        self._count = 0.0
        self._shift_x = self._shift_y = np.empty(0)
        self._sum_x = self._sum_y = self._yy = np.empty(0)
        self._xx = self._xy = np.empty((0, 0))

    def update(
        self, x: NDArray[Any], y: NDArray[Any] | None = None, weight: FloatArray | None = None
    ) -> None:
        """Add one batch.

        Args:
            x: (..., K).
            y: (..., N), row by row with ``x``; none by default.
            weight: (rows,) weight of each row, 0 or more; 1 by default.
        """
        x = _rows(x)
        made = np.zeros((x.shape[0], 0)) if y is None else _rows(y)
        if not x.shape[0]:
            return
        if not self._begun:
            self._begin(x, made)
        x -= self._shift_x
        made -= self._shift_y
        # Of one array with itself BLAS computes half of the products.
        weighted = x if weight is None else x * weight[:, None]
        weight = np.ones(x.shape[0]) if weight is None else weight
        self._count += float(weight.sum())
        self._sum_x += weighted.sum(axis=0)
        self._sum_y += weight @ made
        self._xx += weighted.T @ x
        self._xy += weighted.T @ made
        self._yy += weight @ made**2

    def result(self) -> Moments:
        """The moments of everything so far; of nothing, all zero."""
        count = self._count or 1.0
        x, y = self._sum_x / count, self._sum_y / count
        return Moments(
            self._count,
            self._shift_x + x,
            self._shift_y + y,
            self._xx / count - np.outer(x, x),
            self._xy / count - np.outer(x, y),
            np.maximum(self._yy / count - y**2, 0.0),
        )

    def _begin(self, x: FloatArray, y: FloatArray) -> None:
        self._begun = True
        inputs, outputs = x.shape[1], y.shape[1]
        self._shift_x, self._sum_x = x.mean(axis=0), np.zeros(inputs)
        self._shift_y, self._sum_y = y.mean(axis=0), np.zeros(outputs)
        self._xx, self._xy = np.zeros((inputs, inputs)), np.zeros((inputs, outputs))
        self._yy = np.zeros(outputs)


def diagonal_blocks(square: FloatArray, size: int) -> FloatArray:
    """(blocks, size, size) those along the diagonal of (K, K)."""
    count = square.shape[0] // size
    numbers = np.arange(count)
    found: FloatArray = square.reshape(count, size, count, size)[numbers, :, numbers]
    return found


def _rows(values: NDArray[Any]) -> FloatArray:
    """A copy as float64, (rows, units)."""
    rows = math.prod(values.shape[:-1])
    return values.reshape(rows, values.shape[-1]).astype(np.float64)
