"""Permutation control: would the same entries in random places show as much structure?"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    BoolArray = NDArray[np.bool_]

__all__ = ["StructureControl", "p_structure"]


@dataclasses.dataclass(frozen=True, slots=True)
class StructureControl:
    """Outcome of a permutation control.

    Attributes:
        pvalue: P(chance gives at least as much structure).
        statistic: of the mask itself.
        draws: permutations that were tried.
        exceedances: those with at least the mask's statistic.
    """

    pvalue: float
    statistic: float
    draws: int
    exceedances: int


def p_structure(
    mask: BoolArray,
    statistic: Callable[[BoolArray], float],
    *,
    rng: np.random.Generator,
    most_draws: int = 199,
    enough: int = 10,
) -> StructureControl:
    """Sequential permutation test (Besag and Clifford, 1991), deterministic by the seed.

    The same number of supported entries is put in places drawn at random. Drawing stops once
    ``enough`` permutations reached the mask's statistic: the p-value is then ``enough /
    draws``, and hopeless cases cost a dozen draws. Otherwise it is ``(exceedances + 1) / (draws
    + 1)``.

    Args:
        mask: (K, N), True where supported.
        statistic: larger for more structure, such as the number of components with an edge.
        rng: source of the permutations.
        most_draws: limit on the permutations; the smallest p-value is ``1 / (most_draws + 1)``.
        enough: exceedances that settle the matter.
    """
    observed = float(statistic(mask))
    supported = int(np.count_nonzero(mask))
    if supported in {0, mask.size}:
        return StructureControl(1.0, observed, 0, 0)
    exceedances = 0
    for draw in range(1, most_draws + 1):
        if statistic(_scattered(mask.shape, supported, rng)) >= observed:
            exceedances += 1
            if exceedances == enough:
                return StructureControl(enough / draw, observed, draw, enough)
    return StructureControl(
        (exceedances + 1) / (most_draws + 1), observed, most_draws, exceedances
    )


def _scattered(shape: tuple[int, ...], supported: int, rng: np.random.Generator) -> BoolArray:
    """A mask with ``supported`` entries, every placement equally likely."""
    size = int(np.prod(shape))
    few = min(supported, size - supported)
    flat = np.full(size, few != supported)
    flat[rng.choice(size, few, replace=False, shuffle=False)] = few == supported
    return flat.reshape(shape)
