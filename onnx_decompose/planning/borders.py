"""How the units of several branches lie on an axis at a region's border: in runs, in a common order, or anyhow."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    IntArray = NDArray[np.intp]

__all__ = ["Layout", "common_order", "gathered_order", "is_run", "layout_of"]

Layout = Literal["whole", "runs", "scattered"]
"""How the branches' units lie on an axis: runs that are all units in turn, other contiguous runs, or anyhow."""


def layout_of(positions: Sequence[IntArray], size: int) -> Layout:
    """How the branches' units, at ascending ``positions`` of an axis of ``size``, lie."""
    if not all(map(is_run, positions)):
        return "scattered"
    runs = sorted(positions, key=lambda run: int(run[0]))
    starts = [0, *(int(run[-1]) + 1 for run in runs)]
    in_turn = all(run[0] == start for run, start in zip(runs, starts, strict=False))
    return "whole" if in_turn and starts[-1] == size else "runs"


def common_order(positions: Sequence[IntArray]) -> IntArray | None:
    """An order of scattered positions in which every branch has a contiguous run; None where none is known."""
    if all(map(is_run, positions)):
        return None
    units = np.concatenate(positions)
    distinct = np.unique(units)
    place = np.searchsorted(distinct, units)
    sizes = np.array([run.size for run in positions])
    # Bands follow each other in the branches' order, nested sets in that of their sizes.
    for turns in (np.arange(sizes.size), np.argsort(np.argsort(sizes, kind="stable"))):
        reader = np.repeat(turns, sizes)
        first = np.full(distinct.size, sizes.size)
        last = np.full(distinct.size, -1)
        np.minimum.at(first, place, reader)
        np.maximum.at(last, place, reader)
        order = np.lexsort((distinct, last, first))
        position = np.argsort(order)
        if all(is_run(np.sort(position[np.searchsorted(distinct, run)])) for run in positions):
            return distinct[order]
    return None


def gathered_order(positions: Sequence[IntArray]) -> IntArray | None:
    """The common order, where gathering all units once and cutting that into runs is worth it.

    It is not where branches overlap little: a run is copied only about twice as fast as it is gathered.
    """
    read = sum(run.size for run in positions)
    if read < 2 * np.unique(np.concatenate(positions)).size:
        return None
    return common_order(positions)


def is_run(units: IntArray) -> bool:
    """Whether units follow each other without a gap."""
    return bool(units[-1] - units[0] + 1 == units.size and (np.diff(units) == 1).all())
