"""Weight decay without a snapshot: the scale that a crowd of whole lines shares.

Decay leaves every untouched entry ``s * w0``, so whole untouched rows (inputs) and columns
(outputs) all have the scale ``s`` times the null's, known to ``1 / sqrt(2 N)`` each, while
touched lines scatter. A crowd of lines at one scale under 1 is therefore what a common factor
looks like, if its entries are distributed as the shrunken null and no lines that fit the null
itself lie beside it. The bulk of single entries is not: training moves entries towards zero too.
So only a crowd shrinks a null; what the bulk looks like is an estimate to be reported.
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

__all__ = ["common_factor"]

_ENTRIES_AT_A_TIME = 1 << 20
_MOST_ENTRIES = 1 << 20
"""Entries that a crowd is looked for in; of a larger weight every line is read in part."""
_BULK_SAMPLE = 1 << 15
_CROWD_WIDTH = 6.0
"""Width, in standard errors of a line's scale, of the window that untouched lines fit in."""
_CROWD_SHARE = 0.02
_CROWD_LEAST = 4
_CROWD_ENTRIES = 256
"""Fewer entries look like any null."""
_CROWD_NEAR = 0.6
"""A crowd holds this share of the lines within half as much again to each side."""
_MISFIT = 0.03
"""Largest distance of the crowd's distribution function from the shrunken null's."""
_COMPARED = 1 << 15
"""Entries of the crowd that are compared with the shrunken null."""


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _Crowd:
    """Lines of one scale: positions in the weight, centre and standard error of the log scale."""

    members: NDArray[np.intp]
    centre: float
    error: float


def common_factor(values: FloatArray, null: Null) -> DecayEstimate:
    """The factor by which decay shrank the untouched entries of ``values``, (K, N).

    Returns:
        An estimate with basis ``lines`` where rows or columns crowd at one scale, from those that
        fit best where both do. Otherwise the estimate from the bulk of entries, basis
        ``bulk``: what it would be had training left the bulk alone, which nothing shows.
    """
    step = math.ceil(max(values.size / _MOST_ENTRIES, 1))
    axes = [
        (lines, _log_scales(lines, null)) for lines in (values[:, ::step], values.T[:, ::step])
    ]
    found = [
        (_misfit(lines[crowd.members], null.shrunk(math.exp(crowd.centre))), crowd)
        for lines, logs in axes
        if (crowd := _tightest(logs, lines.shape[1])) is not None
    ]
    found = [(misfit, crowd) for misfit, crowd in found if misfit <= 0]
    # Lines that fit the null itself are the untouched ones, and nothing decayed: a crowd is of
    # touched lines then, which training made smaller.
    if found and not any(_has_undecayed(lines, logs, null) for lines, logs in axes):
        # Of rows and columns, the purer crowd: touched entries inside it widen it, and show.
        _, crowd = min(found, key=lambda pair: pair[0])
        factor, spread = math.exp(crowd.centre), math.exp(3 * crowd.error)
        interval = (factor / spread, factor * spread)
        return DecayEstimate(factor, interval, members=crowd.members.size, basis="lines")
    magnitudes = sorted_magnitudes(values, null.location, most=_BULK_SAMPLE)
    return dataclasses.replace(bulk_decay(magnitudes, null), basis="bulk")


def _log_scales(lines: FloatArray, null: Null) -> FloatArray:
    """(K,) log of every row's scale over the null's; infinite for rows of zeros."""
    count, entries = lines.shape
    squares = np.zeros(count)
    step = max(1, _ENTRIES_AT_A_TIME // max(entries, 1))
    for start in range(0, count, step):
        block = lines[start : start + step].astype(np.float64)
        squares[start : start + step] = np.einsum("ij,ij->i", block, block)
    # E[W^2] shrinks by s^2, whatever the location.
    own = (null.std**2 + null.location**2) * max(entries, 1)
    logs = np.full(count, np.inf)
    np.log(squares / own, out=logs, where=squares > 0)
    return logs / 2


def _tightest(logs: FloatArray, entries: int) -> _Crowd | None:
    """The window with the most lines at or under the null's scale, if that is under it."""
    error = 1 / math.sqrt(2 * max(entries, 1))
    order = np.argsort(logs)
    order = order[: np.searchsorted(logs[order], 3 * error, side="right")]
    if not order.size:
        return None
    ascending = logs[order]
    ends = np.searchsorted(ascending, ascending + _CROWD_WIDTH * error, side="right")
    first = int(np.argmax(ends - np.arange(order.size)))
    members = order[first : ends[first]]
    if members.size * entries < _CROWD_ENTRIES:
        return None
    centre = float(np.median(logs[members]))
    of_centre = 1.25 * error / math.sqrt(members.size)  # of the median of normal draws
    near = np.count_nonzero(np.abs(logs - centre) <= 1.5 * _CROWD_WIDTH * error)
    if members.size < max(_least(logs), _CROWD_NEAR * near) or centre >= -3 * of_centre:
        return None
    return _Crowd(members, centre, of_centre)


def _has_undecayed(lines: FloatArray, logs: FloatArray, null: Null) -> bool:
    """Whether more than a few lines have the null's own scale, and its distribution."""
    own = np.flatnonzero(np.abs(logs) <= 3 / math.sqrt(2 * max(lines.shape[1], 1)))
    return own.size >= _least(logs) and _misfit(lines[own], null) <= 0


def _least(logs: FloatArray) -> float:
    return max(_CROWD_LEAST, _CROWD_SHARE * logs.size)


def _misfit(lines: FloatArray, null: Null) -> float:
    """How much farther from ``null`` the entries of ``lines`` are distributed than is allowed.

    A mixture of lines that training shrank by different factors has one scale too, seen across
    them, but not the null's distribution.
    """
    chosen = lines[:: math.ceil(lines.size / _COMPARED)]
    deviation = np.abs(chosen.astype(np.float64) - null.location)
    uniform = np.sort(-np.expm1(null.logsf(deviation)), axis=None)
    distance = float(np.abs(uniform - (np.arange(uniform.size) + 0.5) / uniform.size).max())
    return distance - _MISFIT - 1 / math.sqrt(uniform.size)
