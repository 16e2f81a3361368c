"""What a recurrent operator reads at each step: an input, and its own output of the step before.

    forward   h(t) = Y(t - 1), the initial state before the first step
    reverse   h(t) = Y(t + 1), the initial state after the last step of each sequence

Steps beyond the end of a sequence are none: their Y is zero and is read by nobody.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

__all__ = ["steps_read"]


def steps_read(
    x: Array,
    y: Array,
    initial: Array | None = None,
    lengths: NDArray[np.integer[Any]] | None = None,
    *,
    reverse: bool = False,
) -> tuple[Array, Array]:
    """The inputs, (rows, I), and the states, (rows, H), that one direction reads, over all steps of all sequences.

    Args:
        x: (steps, batch, I).
        y: (steps, batch, H), what it makes.
        initial: (batch, H), the state to begin with; None for zeros.
        lengths: (batch,), steps of each sequence; None for all.
        reverse: whether time runs backwards.
    """
    steps, batch, hidden = y.shape
    first = np.zeros((batch, hidden), y.dtype) if initial is None else initial
    ends = np.full(batch, steps) if lengths is None else np.asarray(lengths)
    states = np.empty_like(y)
    if reverse:
        states[:-1] = y[1:]
        there = np.flatnonzero(ends > 0)
        states[ends[there] - 1, there] = first[there]
    else:
        states[1:] = y[:-1]
        states[:1] = first
    counts = np.arange(steps)[:, None] < ends
    return x[counts], states[counts]
