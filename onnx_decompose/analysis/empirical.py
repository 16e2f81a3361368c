"""Empirical nulls: for weights whose initialization nobody recorded.

A null fitted to the very entries that it then tests rejects nothing where their tails are as
light as its own, and that says nothing about them. So there is an empirical null only where the
density of log10 |w| shows an edge: a gap, a valley or an elbow past which a minority of the
entries stands out. **No edge means no null.** Where there is one, the bulk under it is taken for
a normal if a normal describes it (Efron, 2004, central matching); otherwise, as where weight
decay spread it over decades, the null is the bulk's own distribution, which ends at the edge.
Both say what the bulk looks like now, not what the initialization was: evidence of a weaker
kind than a record.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import ndimage

from onnx_decompose.analysis.decay import bulk_decay
from onnx_decompose.analysis.null import Normal, Null
from onnx_decompose.analysis.sketch import Sketch

if TYPE_CHECKING:
    from numpy.typing import NDArray

    FloatArray = NDArray[np.floating[Any]]

__all__ = ["BulkNull", "bulk_edge", "bulk_null"]

_FEWEST = 256
_FEWEST_DISTINCT = 128
"""Quantized weights have gaps between their levels, which separate nothing."""
_LEAST_BULK = 0.5
"""Share of the entries under the edge; Efron's null is one of the majority."""
_MISFIT = 0.03
"""Largest distance of distribution functions at which a normal still describes the bulk."""
_GAP_DECADES = 0.5
_BIN = 0.1
_SMOOTHING_BINS = 1.5
_EFFECTIVE_BINS = 2 * math.sqrt(math.pi) * _SMOOTHING_BINS
"""Bins whose counts a smoothed one averages: its variance is the count over this number."""
_BEND_DEVIATION = 0.275
"""Of a twofold central difference of such counts, relative to that of one of them."""
_SIGNIFICANT = 4.0
"""Standard errors of counting that a valley's depth, or an elbow's bend, must have."""
_DEEP = 0.9
"""A valley must be lower than this share of the smaller of its two summits."""
_LEAST_SHARE = 1e-3
_KNOTS = 200


@dataclasses.dataclass(frozen=True, slots=True)
class BulkNull:
    """What the bulk of some magnitudes follows.

    Attributes:
        null: centred at zero; None where no bulk is set apart from a minority above it.
        note: what was found, in words.
        error: relative error of the null's scale, three standard errors, which ``null`` has
            already been widened by.
    """

    null: Null | None
    note: str
    error: float = 0.0


def bulk_null(magnitudes: FloatArray) -> BulkNull:
    """The distribution of the bulk of ascending positive ``magnitudes``, if there is one."""
    if magnitudes.size < _FEWEST:
        return BulkNull(None, "too few nonzero entries for an empirical null")
    if np.count_nonzero(np.diff(magnitudes)) < _FEWEST_DISTINCT:
        return BulkNull(None, "too few distinct magnitudes for an empirical null")
    edge, kind = bulk_edge(magnitudes)
    if edge is None:
        nothing = "no gap, valley or elbow sets large entries apart: no empirical null"
        return BulkNull(None, nothing)
    bulk = magnitudes[magnitudes < edge]
    share = bulk.size / magnitudes.size
    if share < _LEAST_BULK:
        few = f"only {share:.1%} of the nonzero entries lie below {kind} at {edge:.2g}"
        return BulkNull(None, f"{few}: no empirical null")
    low, high = (float(np.quantile(magnitudes, q)) for q in (0.1, 0.9))
    note = (
        f"magnitudes spread over {math.log10(high / low):.1f} decades: the bulk ends at {kind} "
        f"at {edge:.2g}, {share:.1%} of the nonzero entries below it"
    )
    normal = _fitted_normal(bulk, edge)
    if normal is None:
        return BulkNull(_bulk_sketch(bulk, edge), note)
    return dataclasses.replace(normal, note=f"{note}; normal fitted to it")


def _fitted_normal(bulk: FloatArray, edge: float) -> BulkNull | None:
    """A normal for ascending ``bulk``, all below ``edge``; None where it does not describe it."""
    # The widest normal that a scale can come from: its bulk cannot exceed the largest entry.
    widest = Normal(edge)
    scale = bulk_decay(bulk, widest)
    fitted = widest.shrunk(scale.interval[1])
    inside = -np.expm1(fitted.logsf(bulk)) / -math.expm1(float(fitted.logsf(np.array(edge))))
    distance = float(np.abs(inside - (np.arange(bulk.size) + 0.5) / bulk.size).max())
    if distance > _MISFIT + 1 / math.sqrt(bulk.size):
        return None
    return BulkNull(fitted, "", scale.interval[1] / scale.factor - 1)


def bulk_edge(magnitudes: FloatArray) -> tuple[float | None, str]:
    """Where the bulk of ascending positive ``magnitudes`` ends: the edge, and what marks it.

    Returns:
        The edge and ``a gap``, ``a valley`` or ``an elbow``; None and ``nothing`` for a single
        population.
    """
    logs = np.log10(magnitudes)
    least = max(math.ceil(_LEAST_SHARE * logs.size), 8)
    steps = np.diff(logs)[least:-least]
    if steps.size and steps.max() >= _GAP_DECADES:
        at = int(np.argmax(steps)) + least
        return 10 ** float((logs[at] + logs[at + 1]) / 2), "a gap"
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
        return 10 ** float(centres[summit + found]), "a valley"
    found = _elbow(density[flank])
    return (
        (None, "nothing")
        if found is None
        else (10 ** float(centres[summit + found]), "an elbow")
    )


def _valley(density: FloatArray) -> int | None:
    """Deepest point between the first summit and a second one, deeper than counting explains."""
    if density.size < 3:
        return None
    highest_after = np.maximum.accumulate(density[::-1])[::-1]
    depth = density / highest_after
    lowest = int(np.argmin(depth))
    fall = highest_after[lowest] - density[lowest]
    error = math.sqrt((highest_after[lowest] + density[lowest]) / _EFFECTIVE_BINS)
    return lowest if depth[lowest] < _DEEP and fall > _SIGNIFICANT * error else None


def _elbow(density: FloatArray) -> int | None:
    """Where the fall of the log density slows down most, more than counting explains."""
    if density.size < 7:
        return None
    counts = np.maximum(density, 1.0)
    bend = np.gradient(np.gradient(np.log(counts)))
    error = _BEND_DEVIATION / np.sqrt(_EFFECTIVE_BINS * counts)
    clear = (bend / error)[2:-2]
    sharpest = int(np.argmax(clear))
    return sharpest + 2 if clear[sharpest] > _SIGNIFICANT else None


def _bulk_sketch(bulk: FloatArray, edge: float) -> Sketch:
    """The bulk's own tail, dense towards its end, closed at ``edge``."""
    ranks = np.unique(np.geomspace(1, bulk.size, _KNOTS).astype(np.intp))[::-1]
    magnitudes = np.append(bulk[bulk.size - ranks], edge)
    log_p = np.log(np.append(ranks - 0.5, 0.25) / bulk.size)
    return Sketch.of_tail(magnitudes, log_p, bounded=True, label="bulk")
