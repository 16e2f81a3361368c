"""Step-up and step-down multiplicity control without a p-value per entry or a full sort.

Both procedures are fixed points of ``k -> number of entries with p <= level(k)``, a
nondecreasing map: the largest fixed point is Benjamini-Hochberg's number of rejections, the
smallest is Holm's. A sample says where the threshold is likely to lie. One pass then marks what
is beyond that bracket, takes out the few entries inside it, and counts what proves that no
other fixed point matters. The result is exact; a sample that misleads costs a second pass,
never correctness.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from onnx_decompose.analysis import scan
from onnx_decompose.analysis.pi0 import LAMBDA, Pi0, pi0_from_count

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from onnx_decompose.analysis.null import Null

__all__ = ["StepDown", "StepUp", "stepwise_mask"]

_SAMPLE = 1 << 14
_MOST_STEPS = 100
_ERRORS = 4.0
"""Standard errors of a sampled share that the bracket allows for."""


@dataclasses.dataclass(frozen=True, slots=True)
class Sampled:
    """Where a share, seen in a sample, is likely to lie."""

    low: float
    high: float

    @classmethod
    def of(cls, share: float, size: int) -> Sampled:
        """``_ERRORS`` standard errors to each side, never less than a few entries."""
        error = _ERRORS * (math.sqrt(share * (1 - share) / size) + 1 / size)
        return cls(max(share - error, 0.0), min(share + error, 1.0))


@dataclasses.dataclass(frozen=True, slots=True)
class StepUp:
    """Benjamini-Hochberg: the largest k with k entries of p <= alpha k / n."""

    alpha: float

    def log_level(self, rejected: float, size: int) -> float:
        """Log of the level that ``rejected`` entries must meet."""
        return math.log(self.alpha) + math.log(rejected / size) if rejected else -math.inf

    def grid(self, size: int, first: Sampled, last: Sampled) -> list[float]:
        """Log levels to count at; the last two are to bracket the result.

        Args:
            size: n.
            first: sampled share of entries that meet the loosest level.
            last: sampled share of rejected entries.
        """
        loosest, likely = first.high * size, max(last.low * size, 1)
        return [math.log(self.alpha), *(self.log_level(k, size) for k in (loosest, likely))]

    def bracket(
        self, step: Callable[[float], float], t: list[float], counts: list[int], size: int
    ) -> tuple[int, int]:
        """Bounds (low, high) of the largest fixed point, given ``counts`` beyond each ``t``."""
        del size
        low = max((c for c, x in zip(counts, t, strict=True) if c and step(c) <= x), default=0)
        high = counts[0]
        while high > low:
            # count(step(high)) is at most the count at the nearest threshold below.
            bound = counts[max(bisect.bisect_right(t, step(high)) - 1, 0)]
            if bound >= high:
                break
            high = max(bound, low)
        return low, high

    def start(self, low: float, high: float) -> float:
        """The largest fixed point is reached from above."""
        del low
        return high


@dataclasses.dataclass(frozen=True, slots=True)
class StepDown:
    """Holm: reject in order of p while p_(i) <= alpha / (n - i + 1)."""

    alpha: float

    def log_level(self, rejected: float, size: int) -> float:
        """Log of the level that the next entry must meet after ``rejected`` ones."""
        return math.log(self.alpha) - math.log(max(size - rejected, 1))

    def grid(self, size: int, first: Sampled, last: Sampled) -> list[float]:
        """Log levels to count at: both bracket the result (see :meth:`StepUp.grid`)."""
        del first
        return [self.log_level(last.high * size, size), self.log_level(0, size)]

    def bracket(
        self, step: Callable[[float], float], t: list[float], counts: list[int], size: int
    ) -> tuple[int, int]:
        """Bounds (low, high) of the smallest fixed point, from ``counts`` beyond each ``t``."""
        high = min((c for c, x in zip(counts, t, strict=True) if step(c) >= x), default=size)
        low = counts[-1]
        while low < high:
            # count(step(low)) is at least the count at the nearest threshold above.
            bound = counts[min(bisect.bisect_left(t, step(low)), len(t) - 1)]
            if bound <= low:
                break
            low = min(bound, high)
        return low, high

    def start(self, low: float, high: float) -> float:
        """The smallest fixed point is reached from below."""
        del high
        return low


def stepwise_mask(
    flat: NDArray[np.floating[Any]],
    null: Null,
    grid: scan.Resolution,
    procedure: StepUp | StepDown,
) -> tuple[NDArray[np.bool_], float | None, Pi0]:
    """The entries of ``flat``, (n,), that ``procedure`` rejects.

    Returns:
        The (n,) mask, the deviation from which on entries are rejected (None if none is), and
        Storey's pi0.
    """
    size = flat.size
    if size == 0:
        return np.empty(0, dtype=bool), None, pi0_from_count(0, 0)

    def step(rejected: float) -> float:
        return null.isf(procedure.log_level(rejected, size))

    def cut(magnitude: float) -> scan.Cut:
        return grid.cut(null.location, magnitude)

    sample = np.sort(
        np.abs(scan.spread_sample(flat, _SAMPLE).astype(np.float64) - null.location)
    )
    first, last = _sampled_shares(sample, step, procedure.start(0.0, size), size)
    t = [null.isf(log_p) for log_p in procedure.grid(size, first, last)]
    # Storey's count comes along in the same pass.
    wider = [null.isf(math.log(LAMBDA)), *t[:-2]]
    mask, positions, (small, *counts) = scan.ring(
        flat, cut(t[-2]), cut(t[-1]), [cut(x) for x in wider]
    )
    outside = int(np.count_nonzero(mask))
    counts += [outside + positions.size, outside]
    low, high = procedure.bracket(step, t, counts, size)
    if step(high) < t[-2] or (outside and step(low) > t[-1]):  # the sample misled
        mask, positions, _ = scan.ring(flat, cut(step(high)), cut(step(low)))
        outside = int(np.count_nonzero(mask))
    taken = flat[positions]
    entries = np.sort(taken)

    def count(magnitude: float) -> int:
        edges = cut(magnitude)
        above = entries.size - int(np.searchsorted(entries, edges.upper, side="left"))
        return outside + above + int(np.searchsorted(entries, edges.lower, side="right"))

    rejected = int(procedure.start(low, high))
    while (found := count(step(rejected))) != rejected:
        rejected = found
    final = cut(step(rejected))
    mask[positions] = (taken >= final.upper) | (taken <= final.lower)
    return mask, step(rejected) if rejected else None, pi0_from_count(size - small, size)


def _sampled_shares(
    sample: NDArray[np.floating[Any]], step: Callable[[float], float], start: float, size: int
) -> tuple[Sampled, Sampled]:
    """The procedure's first and last share, guessed from ascending sampled magnitudes."""

    def share_beyond(magnitude: float) -> float:
        return 1.0 - int(np.searchsorted(sample, magnitude, side="left")) / sample.size

    first = share = share_beyond(step(start))
    for _ in range(_MOST_STEPS):
        found = share_beyond(step(share * size))
        if found == share:
            break
        share = found
    return Sampled.of(first, sample.size), Sampled.of(share, sample.size)
