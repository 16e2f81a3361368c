"""Weight decay without a snapshot: the scale that a crowd of whole lines shares.

Decay leaves every untouched entry ``s * w0``, so whole untouched rows (inputs) and columns
(outputs) all have the scale ``s`` times the null's, known to ``1 / sqrt(2 N)`` each, while
touched lines scatter. A crowd of lines at one scale under 1 is therefore what a common factor
looks like. The bulk of single entries is not: training moves entries towards zero too. So only
a crowd shrinks a null; what the bulk looks like is an estimate to be reported.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from onnx_decompose.analysis.decay import DecayEstimate, bulk_decay, sorted_magnitudes

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from onnx_decompose.analysis.null import Null

    FloatArray = NDArray[np.floating[Any]]

__all__ = ["common_factor", "line_factor"]

_ENTRIES_AT_A_TIME = 1 << 20
_MOST_ENTRIES = 1 << 22
"""Entries that a crowd is looked for in; of a larger weight every line is read in part."""
_BULK_SAMPLE = 1 << 15
_CROWD_WIDTH = 6.0
"""Width, in standard errors of a line's scale, of the window that untouched lines fit in."""
_CROWD_SHARE = 0.02
_CROWD_LEAST = 4


def common_factor(values: FloatArray, null: Null) -> DecayEstimate:
    """The factor by which decay shrank the untouched entries of ``values``, (K, N).

    Returns:
        An estimate with basis ``lines`` where rows or columns crowd at one scale, the more precise of the
        two where both do and agree. Otherwise the estimate from the bulk of entries, basis
        ``bulk``: what it would be had training left the bulk alone, which nothing shows.
    """
    step = math.ceil(math.sqrt(max(values.size / _MOST_ENTRIES, 1)))
    found = [
        crowd
        for lines in (values[:, :: step * step], values.T[:, :: step * step])
        if (crowd := line_factor(lines, null)) is not None
    ]
    if found:
        best = min(found, key=lambda crowd: crowd.interval[1] / crowd.interval[0])
        low = max(crowd.interval[0] for crowd in found)
        high = min(crowd.interval[1] for crowd in found)
        if low <= high:  # rows and columns that contradict each other share no factor
            return best
    magnitudes = sorted_magnitudes(values, null.location, most=_BULK_SAMPLE)
    return dataclasses.replace(bulk_decay(magnitudes, null), basis="bulk")


def line_factor(values: FloatArray, null: Null) -> DecayEstimate | None:
    """The factor s < 1 that the scales of untouched rows of ``values``, (K, N), share.

    Returns:
        s with three standard errors to each side; None where no crowd of rows stands out, or
        some rows beside the crowd have the null's own scale.
    """
    lines, entries = values.shape
    if not entries:
        return None
    # E[W^2] shrinks by s^2, whatever the location.
    own = math.hypot(null.std, null.location)
    scales = np.sqrt(_mean_squares(values)) / own
    scales = np.sort(scales[scales > 0])
    error = 1 / math.sqrt(2 * entries)
    logs = np.log(scales[scales <= math.exp(3 * error)])
    ends = np.searchsorted(logs, logs + _CROWD_WIDTH * error, side="right")
    counts = ends - np.arange(logs.size)
    if not counts.size:
        return None
    first = int(np.argmax(counts))
    crowd = logs[first : ends[first]]
    centre = float(np.median(crowd))
    centre_error = 1.25 * error / math.sqrt(crowd.size)  # of the median of normal draws
    least = max(_CROWD_LEAST, _CROWD_SHARE * lines)
    near = np.count_nonzero(np.abs(np.log(scales) - centre) <= 1.5 * _CROWD_WIDTH * error)
    if crowd.size < max(least, 0.6 * near) or centre >= -3 * centre_error:
        return None
    # Lines of the null's own scale beside the crowd: they are the untouched ones, and nothing
    # decayed. The crowd is of touched lines that training made smaller.
    others = np.concatenate([logs[:first], logs[ends[first] :]])
    if np.count_nonzero(np.abs(others) <= 3 * error) >= least:
        return None
    spread = math.exp(3 * centre_error)
    factor = math.exp(centre)
    interval = (factor / spread, factor * spread)
    return DecayEstimate(factor, interval, members=crowd.size, basis="lines")


def _mean_squares(values: FloatArray) -> FloatArray:
    """(K,) mean square of every row, a bounded number of entries widened at a time."""
    lines, entries = values.shape
    squares = np.zeros(lines)
    step = max(1, _ENTRIES_AT_A_TIME // entries)
    for start in range(0, lines, step):
        block = values[start : start + step].astype(np.float64)
        squares[start : start + step] = np.einsum("ij,ij->i", block, block)
    return squares / entries
