"""Which of several candidates may be taken, when few samples tell what each of them costs.

A measured error is the error of those samples. The smallest of many measured errors is smaller than the true one, and
of a few samples even a single one is uncertain by more than a budget may allow. Therefore

- a candidate passes by an **upper bound** of its error, from the jackknife (Quenouille 1956; Tukey 1958): the error
  without one block of samples after the other shows how much it hangs on each of them. Any smooth function of the
  samples may be the error, a mean, a ratio of norms, a likelihood.
- candidates are tested **in a fixed order**, the safest first, until one fails (Maurer, Hothorn and Lehmacher 1995;
  as in Learn then Test, Angelopoulos et al. 2021): then the chance to accept any candidate that is beyond the budget
  is no larger than for one test, as the first such candidate has to pass for that.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np
from scipy import stats

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    FloatArray = NDArray[np.float64]

__all__ = ["Bounded", "bounded", "last_in_a_row", "risk_of_turn", "steps"]

_TELLING = 1e-9
"""Of the most that a block adds; less is rounding."""

SHARES = (0.25, 0.5)
"""Of the budget: what safer candidates are within."""


@dataclasses.dataclass(frozen=True, slots=True)
class Bounded:
    """A measured error with what the true one may be.

    Attributes:
        value: as measured.
        lower: one-sided bound from below.
        upper: the same from above.
    """

    value: float
    lower: float
    upper: float


def bounded(value: float, without: FloatArray, risk: float) -> Bounded:
    """Bounds of an error from what it is without each block of samples.

    Args:
        value: with all blocks.
        without: (blocks,) with all but one, two blocks at least.
        risk: probability that the true error is beyond one of the bounds: Student's, corrected for skewness
            (Johnson 1978; Hall 1992) where that makes a bound wider. Nothing is certain of samples of which the worst
            kind is still to come.
    """
    blocks = without.size
    if blocks < 2 or not (np.isfinite(value) and np.isfinite(without).all()):
        return Bounded(value, -np.inf, np.inf)
    # Pseudo-values: what each block adds, as if the error were a mean over blocks.
    added = (blocks - 1) * (value - without)
    second, third = (((added - added.mean()) ** k).mean() for k in (2, 3))
    if second <= 0:
        return Bounded(value, value, value)
    # Blocks that hold nothing of what is measured, such as samples of other tasks, tell nothing of its spread.
    telling = np.count_nonzero(np.abs(added) > _TELLING * np.abs(added).max())
    quantile = float(stats.t.isf(risk, max(telling - 1, 1)))
    spread = float(np.sqrt(second / (blocks - 1)))
    skew = float(third / (6 * second * blocks)) * (1 + 2 * quantile**2)
    # Skewness counts where it makes a bound wider, not where it would make it tighter.
    return Bounded(
        value,
        value - quantile * spread + min(skew, 0.0),
        value + quantile * spread + max(skew, 0.0),
    )


def risk_of_turn(risk: float, turn: int) -> float:
    """What of ``risk`` in all is left for each of any number of families that are searched one after the other.

    Half of it for the first, a quarter for the second: their sum is no larger, however many there are.
    """
    return risk * 0.5 ** (turn + 1)


def steps(costs: Sequence[float], used: Sequence[float]) -> list[int]:
    """The candidates to show to fresh samples, the safest first: the cheapest of all, and cheap ones with more room.

    Args:
        costs: of the candidates, what is to be small.
        used: the share of the budget that the error of each may take, its bound from above; at most 1.

    Returns:
        Indices, three at most; the last one is of the cheapest.
    """
    chosen: list[int] = []
    for share in (*SHARES, 1.0):
        safe = [number for number, one in enumerate(used) if one <= share]
        if not safe:
            continue
        best = min(safe, key=lambda number: (costs[number], used[number]))
        if best not in chosen:
            chosen.append(best)
    return chosen


def last_in_a_row(candidates: Sequence[int], passes: Callable[[int], bool]) -> int | None:
    """The last candidate before the first that does not pass; those behind that one are not looked at."""
    last = None
    for candidate in candidates:
        if not passes(candidate):
            break
        last = candidate
    return last
