"""Compensation in closed form: what is left of a weight takes over what was removed, as far as data shows it.

A site of the original makes y = z W of its input z. The annealed model gives the site x in the place of z, and may use
the entries in a mask only. Per output j with kept inputs S, and moments over the calibration rows,

    minimize  var(y_j - x_S w)  +  ridge * mean(var x_S) * |w - w0|^2        w0: the start, the original's own entries

and the constant that is left, mean(y_j) - mean(x) w, goes into the bias. The ridge pulls towards the original's
entries and not towards zero: where the data says nothing, a direction keeps what training gave it. Its limits are the
two simpler compensations: 0 is least squares, infinity folds the mean of what was removed.

One eigendecomposition per set of kept inputs serves every ridge; the one with the least error on other rows is taken
(``held_out``), for all outputs of the set together, each output's error relative to its variance.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import scipy.linalg
from scipy import sparse

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from onnx_decompose.analysis.gram import Moments

    BoolArray = NDArray[np.bool_]
    FloatArray = NDArray[np.float64]
    IntArray = NDArray[np.intp]

__all__ = [
    "RIDGES",
    "Compensation",
    "Groups",
    "RefitWeight",
    "degrees_of_freedom",
    "kept_sets",
    "refit_weight",
]

Compensation = Literal["none", "mean", "ridge"]
"""What makes up for removed entries: nothing, their mean in the bias, or a refit of what is kept."""

RIDGES = (np.inf, *(10.0**k for k in range(2, -13, -1)))
"""Tried from the strongest on: a weaker one has to be better."""

_TINY = 1e-300
_EXACT = 1e-12
"""Of covariances that are sums of thousands of products: what is below is rounding."""


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class RefitWeight:
    """A refitted site.

    Attributes:
        weight: (K, N), zero outside the mask.
        added: (N,) what is added to the product x W, so that means agree.
        error: (N,) variance of what is still missing from each output over its own variance, on the held-out rows;
            0 for an output that is constant there and right, NaN for one that keeps no input.
        ridges: the ridge of each set of kept inputs, in the order of their first output.
    """

    weight: FloatArray
    added: FloatArray
    error: FloatArray
    ridges: tuple[float, ...]

    @property
    def relative_error(self) -> float:
        """Root mean square over the outputs, each relative to its own spread."""
        kept = self.error[~np.isnan(self.error)]
        return float(np.sqrt(kept.mean())) if kept.size else 0.0


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Groups:
    """Outputs that get one column.

    Attributes:
        labels: (N,) the group of each output, numbered from 0.
        weights: (N,) positive, how much each counts in its group's mean; all the same if None.
    """

    labels: IntArray
    weights: FloatArray | None = None

    def mean(self, weight: NDArray[np.floating[Any]]) -> FloatArray:
        """(K, groups) the mean column of each group."""
        shares = np.ones(self.labels.size) if self.weights is None else self.weights
        # Row by row, every output's column goes into its group's: far less than sorting columns.
        dealt = sparse.csc_array(
            (shares, self.labels, np.arange(self.labels.size + 1)),
            shape=(int(self.labels.max()) + 1, self.labels.size),
        )
        sums: FloatArray = np.ascontiguousarray((dealt @ weight.T.astype(np.float64)).T)
        return sums / np.bincount(self.labels, shares)

    @property
    def firsts(self) -> IntArray:
        """(groups,) an output of each group."""
        return np.unique(self.labels, return_index=True)[1]


def refit_weight(
    start: NDArray[np.floating[Any]],
    mask: BoolArray,
    fit: Moments,
    held_out: Moments,
    compensation: Compensation = "ridge",
) -> RefitWeight:
    """Refit one site, or the part of one that reads some of its inputs and makes some of its outputs.

    Args:
        start: (K, N) what the entries are before, w0.
        mask: (K, N) bool, the entries that may be used.
        fit: moments of x with y, to fit on.
        held_out: the same of other rows, to choose the ridge on.
        compensation: ``none`` leaves the entries and the bias, ``mean`` changes the bias alone.
    """
    weight = np.where(mask, start, 0.0).astype(np.float64)
    error = np.full(mask.shape[1], np.nan)
    ridges: list[float] = []
    for rows, outputs in kept_sets(mask):
        if not rows.size:
            continue
        square, block = np.ix_(rows, rows), np.ix_(rows, outputs)
        first = weight[block]
        problem = _Problem(
            fit.xx[square],
            fit.xy[block],
            held_out.xx[square],
            held_out.xy[block],
            held_out.yy[outputs],
        )
        if compensation == "ridge":
            best, ridge, left = problem.solve(first)
        else:
            best, ridge = first, np.inf
            left = problem.relative(problem.missing(first))
        weight[block] = best
        error[outputs] = left
        ridges.append(ridge)
    added = fit.mean_y - fit.mean_x @ weight
    if compensation == "none":
        added = np.zeros_like(added)
    return RefitWeight(weight, added, error, tuple(ridges))


def degrees_of_freedom(covariance: FloatArray, ridge: float) -> float:
    """Directions that data decides more than a ridge does: sum of e / (e + ridge * mean e) over the eigenvalues e."""
    values = np.maximum(np.linalg.eigvalsh(covariance), 0.0)
    mean = float(values.mean()) if values.size else 0.0
    if mean <= 0:
        return 0.0
    return float((values / (values + ridge * mean)).sum())


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _Problem:
    """Outputs that keep the same inputs, k of them and n outputs.

    Attributes:
        gram: (k, k) covariance of the kept inputs.
        wanted: (k, n) their covariance with the outputs.
        held_gram: the same on the held-out rows.
        held_wanted: the same on the held-out rows.
        power: (n,) variance of the outputs on the held-out rows.
    """

    gram: FloatArray
    wanted: FloatArray
    held_gram: FloatArray
    held_wanted: FloatArray
    power: FloatArray

    def missing(self, weight: FloatArray) -> FloatArray:
        """(n,) variance of the outputs that is missing on the held-out rows."""
        products = (self.held_gram @ weight - 2 * self.held_wanted) * weight
        # What is lost in the subtraction is of the size of the last bits of the variance.
        missing: FloatArray = np.maximum(self.power + products.sum(axis=0), 0.0)
        return missing

    def solve(self, start: FloatArray) -> tuple[FloatArray, float, FloatArray]:
        """The weight of the best ridge, that ridge, and its error, relative to the outputs' variance."""
        mean = float(np.diagonal(self.gram).mean())
        missing, slope = self.missing(start), self.wanted - self.gram @ start
        best, ridge, left = np.zeros(start.shape), np.inf, self.relative(missing)
        # Where nothing was removed and nothing changed before it, the start is the best for every ridge.
        if mean <= 0 or np.abs(slope).max() <= _EXACT * np.abs(self.wanted).max():
            return start, ridge, left
        values, vectors = scipy.linalg.eigh(self.gram)
        residual = vectors.T @ slope
        # Seen from the start and along the eigenvectors, w = start + vectors c: one product for each ridge.
        turned = dataclasses.replace(
            self,
            held_gram=vectors.T @ self.held_gram @ vectors,
            held_wanted=vectors.T @ (self.held_wanted - self.held_gram @ start),
            power=missing,
        )
        for candidate in RIDGES[1:]:
            step = residual / (np.maximum(values, 0.0)[:, None] + candidate * mean)
            error = self.relative(turned.missing(step))
            if error.sum() < left.sum():
                best, ridge, left = step, candidate, error
        return start + vectors @ best, ridge, left

    def relative(self, missing: FloatArray) -> FloatArray:
        """(n,) share of each output's variance."""
        return np.where(missing <= _TINY, 0.0, missing / np.maximum(self.power, _TINY))


def kept_sets(mask: BoolArray) -> Iterator[tuple[IntArray, IntArray]]:
    """Kept inputs, and the outputs that keep just those, in the order of the first of them."""
    packed = np.packbits(mask, axis=0)
    groups: dict[bytes, list[int]] = {}
    for output in range(mask.shape[1]):
        groups.setdefault(packed[:, output].tobytes(), []).append(output)
    for outputs in groups.values():
        yield np.flatnonzero(mask[:, outputs[0]]), np.array(outputs, dtype=np.intp)
