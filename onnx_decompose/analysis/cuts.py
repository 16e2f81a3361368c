"""Cutting an order of things into runs at the least total price, and what a run of segments reads."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    BoolArray = NDArray[np.bool_]
    FloatArray = NDArray[np.float64]
    IntArray = NDArray[np.intp]

__all__ = ["cheapest_cuts", "hulls", "spans", "unions"]


def hulls(reads: BoolArray) -> tuple[IntArray, IntArray]:
    """First and last position that segments i to j read between them; ``(size, -1)`` where they read nothing.

    Args:
        reads: (segments, size) what each segment reads.

    Returns:
        Two arrays (segments, segments), meaningful for j >= i.
    """
    segments, size = reads.shape
    empty = ~reads.any(axis=1)
    first = np.where(empty, size, reads.argmax(axis=1))
    last = np.where(empty, -1, size - 1 - reads[:, ::-1].argmax(axis=1))
    lows, highs = (np.zeros((segments, segments), np.intp) for _ in range(2))
    for i in range(segments):
        lows[i, i:] = np.minimum.accumulate(first[i:])
        highs[i, i:] = np.maximum.accumulate(last[i:])
    return lows, highs


def spans(reads: BoolArray) -> FloatArray:
    """(segments, segments) length of the shortest run that segments i to j read, 1 at least; j >= i."""
    lows, highs = hulls(reads)
    found: FloatArray = np.maximum(highs - lows + 1.0, 1.0)
    return found


def unions(reads: BoolArray) -> FloatArray:
    """(segments, segments) positions that segments i to j read between them, 1 at least; j >= i."""
    segments, size = reads.shape
    padded = np.zeros((segments, -(-size // 64) * 64), bool)
    padded[:, :size] = reads
    bits = np.packbits(padded, axis=1).view(np.uint64)
    found = np.ones((segments, segments))
    for i in range(segments):
        together = np.bitwise_or.accumulate(bits[i:], axis=0)
        found[i, i:] = np.maximum(np.bitwise_count(together).sum(axis=1), 1)
    return found


def cheapest_cuts(price: FloatArray, least: int, most: int) -> IntArray:
    """Cut positions, from 0 to the number of segments, of the cheapest runs.

    Args:
        price: (segments, segments), ``price[i, j]`` of segments i to j as one run, j >= i; infinite where they cannot
            be one.
        least: runs that there are at least.
        most: and at most.

    Returns:
        Ascending positions; only the last one where no cut is possible.
    """
    segments = price.shape[0]
    price = np.where(np.tri(segments, k=-1, dtype=bool), np.inf, price)
    reach = np.full(segments + 1, np.inf)
    reach[0] = 0.0
    came_from: list[IntArray] = []
    best, best_runs = np.inf, 0
    for runs in range(1, min(most, segments) + 1):
        through = reach[:-1, None] + price
        origin = through.argmin(axis=0)
        came_from.append(origin)
        reach = np.concatenate([[np.inf], through[origin, np.arange(segments)]])
        if runs >= least and reach[-1] < best:
            best, best_runs = reach[-1], runs
    bounds = [segments]
    for origins in reversed(came_from[:best_runs]):
        bounds.append(int(origins[bounds[-1] - 1]))
    return np.array(bounds[::-1], dtype=np.intp)
