"""Weights that only certain numbers can be: the multiples of a step that an integer type has room for.

    w = (code - zero) step        step and zero of the whole weight, of each row or of each column

A refit asks for floats between them. Rounded each by itself, they lose what one step is; but the errors that rounding
makes need not add up. Row by row, what a row's rounding misses on the inputs' covariance H is made up for by the rows
that are not rounded yet (as in optimal brain quantization and GPTQ, Frantar et al. 2022):

    W[i+1:] <- W[i+1:] + (q_i - w_i) U[i, i+1:]^T / U_ii        U upper triangular, U^T U = H^-1

Rows that vary most come first, when most of the others can still make up for them.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.linalg

from onnx_decompose.analysis.refit import kept_sets

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from onnx_decompose.analysis.gram import Moments

    BoolArray = NDArray[np.bool_]
    FloatArray = NDArray[np.float64]
    IntArray = NDArray[np.intp]

__all__ = ["Grid", "round_refit"]

_DAMPING = 0.01
"""Of the mean variance of an input, as in GPTQ: directions that hardly vary are not where errors may go."""

_BLOCK = 64
"""Rows that are rounded before what they miss is spread over all that are left."""


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Grid:
    """The numbers that stored integers can stand for.

    Attributes:
        step: (K, N), or 1 in the place of either; not 0 where anything but nothing is to be stored.
        zero: the same; the integer that stands for nothing.
        dtype: of the integers.
    """

    step: FloatArray
    zero: FloatArray
    dtype: np.dtype[Any]

    def codes(self, values: NDArray[Any]) -> NDArray[Any]:
        """The integers nearest to ``values``, (K, N)."""
        limits = np.iinfo(self.dtype)
        steps = np.divide(
            values, self.step, out=np.zeros(values.shape), where=np.asarray(self.step != 0)
        )
        found = np.clip(np.rint(steps) + self.zero, limits.min, limits.max)
        codes: NDArray[Any] = found.astype(self.dtype)
        return codes

    def values(self, codes: NDArray[Any]) -> FloatArray:
        """What integers, (K, N), stand for."""
        found: FloatArray = (codes.astype(np.float64) - self.zero) * self.step
        return found

    def nearest(self, values: FloatArray) -> FloatArray:
        """The numbers of the grid nearest to ``values``, (K, N)."""
        return self.values(self.codes(values))

    def part(self, rows: IntArray, columns: IntArray) -> Grid:
        """The grid of some rows and columns."""

        def taken(lines: FloatArray) -> FloatArray:
            lines = lines if lines.shape[0] == 1 else lines[rows]
            return lines if lines.shape[1] == 1 else lines[:, columns]

        return Grid(taken(self.step), taken(self.zero), self.dtype)


def round_refit(
    weight: FloatArray, mask: BoolArray, grid: Grid, fit: Moments, held_out: Moments
) -> FloatArray:
    """Round a refitted weight to what can be stored, so that as little as possible changes in what it makes.

    Args:
        weight: (K, N), zero outside the mask; the least squares fit, or near it.
        mask: (K, N) bool, the entries that may be used.
        grid: of the weight.
        fit: moments of its inputs with what it should make, to round on.
        held_out: the same of other rows: outputs that plain rounding leaves nearer there are rounded plainly.

    Returns:
        (K, N) numbers of the grid; zero outside the mask.
    """
    rounded = np.where(mask, grid.nearest(weight), 0.0)
    if np.array_equal(rounded, weight):
        return rounded
    for rows, outputs in kept_sets(mask):
        if not rows.size:
            continue
        square, block = np.ix_(rows, rows), np.ix_(rows, outputs)
        turned = _rounded_in_turn(weight[block], fit.xx[square], grid.part(rows, outputs))
        gram, wanted = held_out.xx[square], held_out.xy[block]
        missed = [
            ((gram @ each - 2 * wanted) * each).sum(axis=0) for each in (turned, rounded[block])
        ]
        rounded[block] = np.where(missed[0] < missed[1], turned, rounded[block])
    return rounded


def _rounded_in_turn(weight: FloatArray, covariance: FloatArray, grid: Grid) -> FloatArray:
    """(k, n) numbers of the grid; the module's docstring says how."""
    variances = np.diagonal(covariance)
    mean = float(variances.mean())
    if mean <= 0:
        return grid.nearest(weight)
    order = np.argsort(-variances, kind="stable")
    damped = covariance[np.ix_(order, order)] + _DAMPING * mean * np.eye(order.size)
    inverse = scipy.linalg.inv(damped)
    upper = scipy.linalg.cholesky((inverse + inverse.T) / 2)
    grid = grid.part(order, np.arange(weight.shape[1]))
    left = weight[order]
    found = np.empty_like(left)
    one = np.arange(weight.shape[1])
    for start in range(0, order.size, _BLOCK):
        stop = min(start + _BLOCK, order.size)
        missed = np.empty((stop - start, weight.shape[1]))
        for row in range(start, stop):
            found[row] = grid.part(np.array([row]), one).nearest(left[row : row + 1])[0]
            missed[row - start] = (left[row] - found[row]) / upper[row, row]
            left[row + 1 : stop] -= np.outer(upper[row, row + 1 : stop], missed[row - start])
        left[stop:] -= upper[start:stop, stop:].T @ missed
    result = np.empty_like(found)
    result[order] = found
    return result
