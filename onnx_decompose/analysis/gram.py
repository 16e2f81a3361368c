"""Second moments of what a site reads, streamed: no activation is kept.

    shift s = mean of the first batch          kept for good, so that sums stay small
    sums   sum (x - s), sum (z - t)
    xx     sum (x - s)(x - s)^T    (K, K)
    xz     sum (x - s)(z - t)^T    (K, M)

Batches arrive as float32 (or whatever the model computes in) and are widened to float64 before they are multiplied: a
Gram matrix of float32 products is good to 1e-7 of its largest eigenvalue, and a solution of normal equations needs the
small ones. Memory: 8 (K^2 + K M) bytes per pair of values, whatever the number of samples.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    FloatArray = NDArray[np.float64]

__all__ = ["MomentAccumulator", "Moments"]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Moments:
    """Means and central second moments of x, (K,), together with z, (M,), over the same rows.

    Attributes:
        count: rows.
        mean_x: (K,) mean of x.
        mean_z: (M,) mean of z.
        xx: (K, K) covariance of x, divided by ``count``.
        xz: (K, M) covariance of x with z, divided by ``count``.
    """

    count: int
    mean_x: FloatArray
    mean_z: FloatArray
    xx: FloatArray
    xz: FloatArray

    @property
    def spread(self) -> FloatArray:
        """(K,) standard deviation of x."""
        return np.sqrt(np.maximum(np.diagonal(self.xx), 0.0))


class MomentAccumulator:
    """Adds up batches of x, and of z where z is another value; see the module's docstring."""

    def __init__(self) -> None:
        self._count = 0
        self._shift_x = self._shift_z = np.empty(0)
        self._sum_x = self._sum_z = np.empty(0)
        self._xx = np.empty((0, 0))
        self._xz: FloatArray | None = None

    def update(self, x: NDArray[Any], z: NDArray[Any] | None = None) -> None:
        """Add one batch.

        Args:
            x: (..., K).
            z: (..., M), row by row with ``x``; None where it is ``x`` itself, always or never.
        """
        x = _rows(x)
        z = None if z is None else _rows(z)
        if not x.shape[0]:
            return
        if not self._count:
            self._begin(x, z)
        self._count += x.shape[0]
        x -= self._shift_x
        self._sum_x += x.sum(axis=0)
        self._xx += x.T @ x
        if z is not None:
            assert self._xz is not None
            z -= self._shift_z
            self._sum_z += z.sum(axis=0)
            self._xz += x.T @ z

    def result(self) -> Moments:
        """The moments of everything so far; at least one row is needed."""
        assert self._count
        offset_x = self._sum_x / self._count
        mean_x = self._shift_x + offset_x
        xx = self._xx / self._count - np.outer(offset_x, offset_x)
        if self._xz is None:
            return Moments(self._count, mean_x, mean_x, xx, xx)
        offset_z = self._sum_z / self._count
        xz = self._xz / self._count - np.outer(offset_x, offset_z)
        return Moments(self._count, mean_x, self._shift_z + offset_z, xx, xz)

    def _begin(self, x: FloatArray, z: FloatArray | None) -> None:
        self._shift_x, self._sum_x = x.mean(axis=0), np.zeros(x.shape[1])
        self._xx = np.zeros((x.shape[1], x.shape[1]))
        if z is not None:
            self._shift_z, self._sum_z = z.mean(axis=0), np.zeros(z.shape[1])
            self._xz = np.zeros((x.shape[1], z.shape[1]))


def _rows(values: NDArray[Any]) -> FloatArray:
    """A copy as float64, (rows, units)."""
    return values.reshape(-1, values.shape[-1]).astype(np.float64)
