"""Group evidence: whole rows (inputs) and whole columns (outputs).

One entry says little, a line of N entries much: the scale of a row is known to ``1 / sqrt(2
N)``. Entries are turned into normal scores under the null; a line's p-value is then twice the
smaller of

- a chi-square test of the scale, two-sided (its sum of squared scores has N degrees of
  freedom), and
- a Kolmogorov-Smirnov test of the distribution (Stephens' approximation, 1970).

The two look at the same entries, so they are combined by Bonferroni, not by Fisher.
Benjamini-Hochberg runs over the lines of each axis, at half the level each. A line that is not
rejected is unsupported as a whole. An axis on which no line at all is rejected is no evidence
against the lines of the other: its lines hold too few touched entries each to show them.

Decay. Where a crowd of lines shows a common factor (see ``crowd``), the null is shrunk to it, and
the tests allow for the factor's error.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import special

from onnx_decompose.analysis import scan
from onnx_decompose.analysis.null import Normal, Null
from onnx_decompose.analysis.pi0 import LAMBDA, pi0_from_count
from onnx_decompose.analysis.selection import Selection, looser_level, proven
from onnx_decompose.analysis.sketch import Sketch

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from onnx_decompose.analysis.evidence import Evidence

    FloatArray = NDArray[np.floating[Any]]
    BoolArray = NDArray[np.bool_]

__all__ = ["Groups", "line_p_values", "step_up"]

_LOG_2 = math.log(2.0)
_ENTRIES_AT_A_TIME = 1 << 20
_DENSITY_TIMES_DEVIATION = 0.29
"""Largest shift of a distribution function per relative change of its scale: max |x| f(x),
0.242 for a normal, 0.289 for a uniform with its own standard deviation as the unit."""


@dataclasses.dataclass(frozen=True, slots=True)
class Groups:
    """Rows and columns as units, Benjamini-Hochberg over each axis at ``alpha``."""

    alpha: float

    @property
    def name(self) -> str:
        """Such as ``group(0.01)``."""
        return f"group({self.alpha:g})"

    def select(self, evidence: Evidence, *, rng: np.random.Generator) -> Selection:
        """The mask is the product of the supported rows and the supported columns.

        Where no row (or column) at all is supported, that axis does not count.
        """
        if evidence.untouched is not None:
            return _proven_lines(self.name, evidence)
        exact = proven(self.name, evidence)
        if exact is not None:
            return exact
        # Single entries are tested against the upper end of an estimated scale, which is the
        # safe side for them; a line can be too small as well as too large.
        error = evidence.error
        null = evidence.null.shrunk(1 / (1 + error))
        p_values = [
            line_p_values(values, null, rng=rng, error=error)
            for values in (evidence.values, evidence.values.T)
        ]
        rows, columns = (step_up(p, self.alpha / 2) for p in p_values)
        null_lines = [int(np.count_nonzero(p > LAMBDA)) for p in p_values]
        # Entries are null where their row or their column is: the larger share is a lower
        # bound.
        estimate = max(
            (pi0_from_count(n, p.size) for n, p in zip(null_lines, p_values, strict=True)),
            key=lambda pi0: pi0.value,
        )
        note = (
            f"{np.count_nonzero(~rows)} of {rows.size} rows and {np.count_nonzero(~columns)} of "
            f"{columns.size} columns unsupported"
            + (f"; {evidence.note}" if evidence.note else "")
        )
        if rows.any() and not columns.any():
            columns = ~columns
        elif columns.any() and not rows.any():
            rows = ~rows
        mask = (rows[:, None] & columns) & (evidence.weight != 0)
        return Selection(mask, self.name, None, estimate.value, estimate.interval, note)

    def looser(self) -> Groups | None:
        """Four times the level, up to 0.5."""
        level = looser_level(self.alpha)
        return None if level is None else Groups(level)


def line_p_values(
    values: FloatArray, null: Null, *, rng: np.random.Generator, error: float = 0.0
) -> FloatArray:
    """(K,) p-value of every row of ``values``, (K, N), under ``null``.

    Args:
        values: entries; those rounded coarser than float32 are spread over their rounding cells
            at random, which makes their scores exactly normal again.
        null: distribution of an untouched entry.
        rng: for that spreading only.
        error: relative error to allow the null's scale, where it was estimated.
    """
    lines, entries = values.shape
    result = np.ones(lines)
    grid = scan.resolution_of(values)
    step = max(1, _ENTRIES_AT_A_TIME // max(entries, 1))
    slack = 0.5 / len(null.magnitudes) if isinstance(null, Sketch) else 0.0
    slack += _DENSITY_TIMES_DEVIATION * error
    for start in range(0, lines, step):
        scores = _normal_scores(values[start : start + step], null, grid, rng, error)
        squares = np.einsum("ij,ij->i", scores, scores)
        upper = special.gammaincc(entries / 2, squares / 2 / (1 + error) ** 2)
        lower = special.gammainc(entries / 2, squares / 2 * (1 + error) ** 2)
        scale = 2 * np.minimum(upper, lower)
        shape = _kolmogorov_smirnov(scores, slack)
        if isinstance(null, Sketch):  # too coarse for a test that lives on the tails
            scale = shape
        result[start : start + step] = np.minimum(2 * np.minimum(scale, shape), 1.0)
    return result


def step_up(p_values: FloatArray, alpha: float) -> BoolArray:
    """Benjamini-Hochberg over few p-values, (n,): True where rejected, that is supported."""
    order = np.sort(p_values)
    passing = np.flatnonzero(order <= alpha * np.arange(1, order.size + 1) / max(order.size, 1))
    rejected: BoolArray = p_values <= (order[passing[-1]] if passing.size else -1.0)
    return rejected


def _normal_scores(
    values: FloatArray,
    null: Null,
    grid: scan.Resolution,
    rng: np.random.Generator,
    error: float,
) -> FloatArray:
    """Standard normal for untouched entries; infinite past a bounded null's edge."""
    deviation = values.astype(np.float64)
    if grid.bits < 24:
        deviation += rng.uniform(-1.0, 1.0, deviation.shape) * grid.half_cell(values)
    deviation -= null.location
    if isinstance(null, Normal):
        return deviation / null.scale
    log_p = null.logsf(np.abs(deviation))
    # Past a bounded null's edge, but within rounding and the error of the scale: at the edge.
    outside = np.isneginf(log_p)
    if outside.any():
        rounding = 2 * grid.half_cell(values[outside])
        nearest = (np.abs(deviation[outside]) - rounding) / (1 + error)
        at_edge = np.isfinite(null.logsf(np.maximum(nearest, 0.0)))
        log_p[outside] = np.where(at_edge, -math.log(2 * deviation.shape[1]), -np.inf)
    scores: FloatArray = np.copysign(-special.ndtri_exp(log_p - _LOG_2), deviation)
    return scores


def _kolmogorov_smirnov(scores: FloatArray, slack: float) -> FloatArray:
    """(K,) p-value of each row of ``scores`` against the standard normal, known to ``slack``."""
    n = scores.shape[1]
    uniform = special.ndtr(np.sort(scores.astype(np.float32), axis=1))
    steps = np.arange(n + 1) / n
    distance = np.maximum((steps[1:] - uniform).max(axis=1), (uniform - steps[:-1]).max(axis=1))
    distance = np.maximum(distance - slack, 0.0)
    root = math.sqrt(n)
    p_values: FloatArray = special.kolmogorov((root + 0.12 + 0.11 / root) * distance)
    return p_values


def _proven_lines(name: str, evidence: Evidence) -> Selection:
    assert evidence.untouched is not None
    touched = ~evidence.untouched
    rows = np.asarray(touched.any(axis=1))
    columns = np.asarray(touched.any(axis=0))
    mask = (rows[:, None] & columns) & (evidence.weight != 0)
    share = 1 - np.count_nonzero(touched) / max(touched.size, 1)
    note = (
        f"{np.count_nonzero(~rows)} of {rows.size} rows and {np.count_nonzero(~columns)} of "
        f"{columns.size} columns untouched"
    )
    return Selection(mask, name, None, share, (share, share), note)
