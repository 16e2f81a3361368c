"""Structural annealing: removing the entries that training never supported (arXiv 2601.15871, section 3)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["anneal"]


def anneal(weight: NDArray[Any], mask: NDArray[np.bool_]) -> NDArray[Any]:
    """The dense weight with unsupported entries removed.

    Args:
        weight: (K, N).
        mask: (K, N) bool, True where an entry is supported.

    Returns:
        (K, N), of the weight's type: the entry where it is supported, exactly zero elsewhere.
    """
    return np.where(mask, weight, np.zeros((), weight.dtype))
