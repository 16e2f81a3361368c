"""Empirical nulls: for weights whose initialization nobody recorded.

Where the magnitudes stay within a few decades, the central bulk is taken for a normal (Efron,
2004, central matching). Where weight decay has spread them over many decades, no common family
fits: the bulk is everything under the gap, valley or elbow of the density of log10 |w|, and the
null is the bulk's own distribution, which ends there.
Both say what the bulk looks like now, not what the initialization was: evidence of a weaker
kind than a record.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import ndimage

from onnx_decompose.analysis.decay import bulk_decay, sorted_magnitudes
from onnx_decompose.analysis.null import Normal, Null, Zero
from onnx_decompose.analysis.sketch import Sketch

if TYPE_CHECKING:
    from numpy.typing import NDArray

    FloatArray = NDArray[np.floating[Any]]

__all__ = ["bulk_edge", "empirical_null"]

_FEWEST = 256
_SPREAD_DECADES = 1.6
"""Decades between the 10 % and 90 % quantiles of |w| from which on the bulk is no family: a
normal has 1.1, a Laplace 1.3."""
_GAP_DECADES = 0.5
_BIN = 0.1
_SMOOTHING_BINS = 1.5
_DEEP = 0.9
"""A valley must be lower than this share of the smaller of its two summits."""
_LEAST_SHARE = 1e-3
_KNOTS = 200


def empirical_null(weight: FloatArray) -> tuple[Null, str]:
    """A null from the bulk of ``weight``, (K, N), and what was found, in words."""
    magnitudes = sorted_magnitudes(weight)
    if magnitudes.size < _FEWEST:
        return Zero(), "too few nonzero entries for an empirical null"
    low, high = (float(np.quantile(magnitudes, q)) for q in (0.1, 0.9))
    decades = math.log10(high / low)
    if decades > _SPREAD_DECADES:
        edge, kind = bulk_edge(magnitudes)
        if edge is not None:
            bulk = magnitudes[magnitudes < edge]
            note = (
                f"magnitudes spread over {decades:.1f} decades: the bulk ends at a {kind} at "
                f"{edge:.2g}, {bulk.size / magnitudes.size:.1%} of the nonzero entries below it"
            )
            return _bulk_sketch(bulk, edge), note
    # The widest normal that a scale can come from: its bulk cannot exceed the largest entry.
    widest = Normal(float(magnitudes[-1]))
    fitted = bulk_decay(magnitudes, widest)
    return Normal(widest.scale * fitted.interval[1]), "normal fitted to the central bulk"


def bulk_edge(magnitudes: FloatArray) -> tuple[float | None, str]:
    """Where the bulk of ascending positive ``magnitudes`` ends: the edge, and what marks it.

    Returns:
        The edge and ``gap``, ``valley`` or ``elbow``; None and ``nothing`` for a single
        population.
    """
    logs = np.log10(magnitudes)
    least = max(math.ceil(_LEAST_SHARE * logs.size), 8)
    steps = np.diff(logs)[least:-least]
    if steps.size and steps.max() >= _GAP_DECADES:
        at = int(np.argmax(steps)) + least
        return 10 ** float((logs[at] + logs[at + 1]) / 2), "gap"
    bins = np.arange(logs[0] - 1, logs[-1] + 1 + _BIN, _BIN)
    counts, _ = np.histogram(logs, bins)
    density = ndimage.gaussian_filter1d(counts.astype(np.float64), _SMOOTHING_BINS)
    centres = (bins[:-1] + bins[1:]) / 2
    above = np.cumsum(counts[::-1])[::-1]
    # Only the upper flank of the main summit, as far as enough entries lie above.
    summit = int(np.argmax(density))
    flank = slice(summit, int(np.count_nonzero(above >= least)))
    found = _valley(density[flank])
    if found is not None:
        return 10 ** float(centres[summit + found]), "valley"
    found = _elbow(density[flank])
    return (
        (None, "nothing") if found is None else (10 ** float(centres[summit + found]), "elbow")
    )


def _valley(density: FloatArray) -> int | None:
    """Deepest point between the first summit and a second one."""
    if density.size < 3:
        return None
    highest_after = np.maximum.accumulate(density[::-1])[::-1]
    depth = density / highest_after
    lowest = int(np.argmin(depth))
    return lowest if depth[lowest] < _DEEP else None


def _elbow(density: FloatArray) -> int | None:
    """Where the fall of the log density slows down most before it goes on."""
    if density.size < 7:
        return None
    bend = np.gradient(np.gradient(np.log(np.maximum(density, 1e-9))))
    bend = bend[2:-2]
    sharpest = int(np.argmax(bend))
    return sharpest + 2 if bend[sharpest] > 0.01 else None


def _bulk_sketch(bulk: FloatArray, edge: float) -> Sketch:
    """The bulk's own tail, dense towards its end, closed at ``edge``."""
    ranks = np.unique(np.geomspace(1, bulk.size, _KNOTS).astype(np.intp))[::-1]
    magnitudes = np.append(bulk[bulk.size - ranks], edge)
    log_p = np.log(np.append(ranks - 0.5, 0.25) / bulk.size)
    return Sketch.of_tail(magnitudes, log_p, bounded=True, label="bulk")
