"""Directions of an axis that its readers need, the most telling first.

Units x feed sites of weight W_l each. Of x only what x W_l says of the readers' outputs matters: with C the covariance
of x and M = sum W_l W_l^T / |W_l|^2, the spread of x M^(1/2) is the spread of all readers' outputs. Its principal
directions V give

    z = x E,  E = M^(1/2) V      the coordinates, as large as what they do
    x ~ z D,  D = V^T M^(-1/2)   so that z D W_l stands in for x W_l

and the variance along a direction is the share of the readers' variance that is lost without it.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    FloatArray = NDArray[np.float64]

__all__ = ["Subspace", "telling_directions"]

_RANK = 1e-10
"""Directions that the readers see less than this share of the largest are none."""


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Subspace:
    """Coordinates of units, the most telling first.

    Attributes:
        encode: (K, R) from units to coordinates.
        decode: (R, K) from coordinates back, as far as readers see it.
        lost: (R + 1,) share of the readers' variance that is lost where only the first r coordinates stay.
    """

    encode: FloatArray
    decode: FloatArray
    lost: FloatArray

    def within(self, loss: float) -> int:
        """How many coordinates are needed for a loss of ``loss`` of the variance at most."""
        return int(np.argmax(self.lost <= loss))


def telling_directions(
    covariances: Sequence[FloatArray], weights: Sequence[FloatArray]
) -> Subspace:
    """Directions by what the readers see of them.

    Args:
        covariances: (K, K) of what each reader reads.
        weights: (K, N) of each reader.
    """
    size = weights[0].shape[0]
    metric, covariance = np.zeros((size, size)), np.zeros((size, size))
    for own, weight in zip(covariances, weights, strict=True):
        power = float(np.einsum("ij,ij->", weight, own @ weight))
        if power > 0:
            metric += weight @ weight.T / power
        covariance += own / len(weights)
    values, vectors = np.linalg.eigh(metric)
    seen = values > max(values[-1], 0.0) * _RANK
    root, basis = np.sqrt(values[seen]), vectors[:, seen]
    spread = (basis * root).T @ covariance @ (basis * root)
    variances, directions = np.linalg.eigh(spread)
    variances, directions = np.maximum(variances[::-1], 0.0), directions[:, ::-1]
    total = float(variances.sum())
    lost = np.concatenate([[total], total - np.cumsum(variances)]) / max(total, 1e-300)
    lost[-1] = 0.0
    return Subspace(
        (basis * root) @ directions, directions.T @ (basis / root).T, np.maximum(lost, 0.0)
    )
