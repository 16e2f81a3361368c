"""Structural annealing: removing the entries that training never supported (arXiv 2601.15871, section 3)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

    from onnx_decompose.analysis.selection import SharedLines

__all__ = ["anneal", "fill", "unify"]


def anneal(
    weight: NDArray[Any], mask: NDArray[np.bool_], nothing: NDArray[Any] | None = None
) -> NDArray[Any]:
    """The dense weight with unsupported entries removed.

    Args:
        weight: (K, N).
        mask: (K, N) bool, True where an entry is supported.
        nothing: what stands for no dependency, of the weight's type, broadcast to (K, N); zero by default.

    Returns:
        (K, N), of the weight's type: the entry where it is supported, exactly ``nothing`` elsewhere.
    """
    return np.where(mask, weight, np.zeros((), weight.dtype) if nothing is None else nothing)


def fill(
    mask: NDArray[np.bool_],
    blocks: Iterable[tuple[NDArray[np.intp], NDArray[np.intp]]],
) -> NDArray[np.bool_]:
    """Also keep the unsupported entries that cost nothing: a dense block stores them in any case.

    The structure stays as it is, since they join units that supported entries have joined already; the annealed
    model only comes closer to the original.

    Args:
        mask: (K, N) bool, the entries that the structure was made from.
        blocks: input and output units of each dense block.

    Returns:
        (K, N) bool: ``mask``, and what the blocks hold beside it between units that have an entry in it.
    """
    rows, columns = np.asarray(mask.any(axis=1)), np.asarray(mask.any(axis=0))
    filled = mask.copy()
    for inputs, outputs in blocks:
        filled[np.ix_(inputs, outputs)] |= rows[inputs, None] & columns[outputs]
    return filled


def unify(weight: NDArray[Any], groups: Sequence[SharedLines]) -> NDArray[Any]:
    """The dense weight with the lines of each group replaced by the one that stands for them.

    Putting one row in place of several changes columns, so that equal columns may differ after it. Only
    one axis is unified, the one with the larger share of lines to spare; bitwise equal lines stay so on both.

    Args:
        weight: (K, N).
        groups: of its rows and of its columns; groups of one axis have no line in common.

    Returns:
        (K, N), of the weight's type; ``weight`` itself where nothing changes.
    """
    inexact = [group for group in groups if group.deviation > 0]
    if not inexact:
        return weight
    spare = [
        sum(group.members.size - 1 for group in inexact if group.axis == axis)
        / weight.shape[axis]
        for axis in (0, 1)
    ]
    axis = int(spare[1] >= spare[0])
    unified = weight.copy()
    lines = unified if axis == 0 else unified.T
    for group in inexact:
        if group.axis == axis:
            lines[group.members] = group.representative
    return unified
