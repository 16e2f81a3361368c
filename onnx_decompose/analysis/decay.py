"""Weight decay: the common factor by which every untouched entry has shrunk.

Decoupled decay multiplies each entry by the same ``1 - lr * wd`` at every step, and so does L2
under plain or momentum SGD; an entry without any gradient is then ``s * w0`` (Loshchilov and
Hutter, 2019). L2 inside Adam is normalized per entry and leaves no common factor.

Rounding. One step rounds a float32 entry by at most half a unit in the last place, 2**-24
relative, so T steps leave ``|w / (s * w0) - 1| <= T * 2**-24``. As a step's decrement is nearly
the same number of units each time, the errors do not average out, and T is unknown: the
tolerance is taken from the data instead, as the width past which the cluster of ratios stops
growing.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from onnx_decompose.analysis import scan

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from onnx_decompose.analysis.null import Null

    FloatArray = NDArray[np.floating[Any]]
    BoolArray = NDArray[np.bool_]

__all__ = [
    "DecayEstimate",
    "Displacement",
    "bulk_decay",
    "displacement_from",
    "sorted_magnitudes",
]

_SAMPLE = 1 << 18
_FEWEST = 64
"""Entries under which no scale is estimated."""
_TRIM = 0.002
_REACH = 1.1
_Z = 3.0
"""Standard errors of the reported interval."""
_DOUBLINGS = 14
_WIDEST = 2.0**-6
_STRAGGLERS = 0.01
_MOST_STRAGGLERS = 0.1
_FEWEST_MEMBERS = 8
_FINE_BITS = 24
_RIDGE_MEMBERS = 32
_MOST_BINS = 4096
_RIDGE_WIDTHS = 2.0
_RIDGE_ROUNDINGS = 4 * 2.0**-24
_ROWS_AT_A_TIME = 256


@dataclasses.dataclass(frozen=True, slots=True)
class DecayEstimate:
    """The common factor of untouched entries.

    Attributes:
        factor: estimate of s; 1 means no decay.
        interval: where s lies, three standard errors to each side.
        tolerance: relative deviation within which an entry equals ``s * w0`` (snapshots only).
        members: sampled entries, or lines, that the estimate rests on.
        basis: ``snapshot``; ``lines``, a crowd of rows or columns of one scale; ``stated``, by
            the user; ``bulk``, the bulk of entries, which training may have moved: such an
            estimate is reported, and no null is shrunk by it.
    """

    factor: float
    interval: tuple[float, float]
    tolerance: float = 0.0
    members: int = 0
    basis: str = "snapshot"

    @property
    def used(self) -> bool:
        """Whether the null, or the displacement, is corrected by it."""
        return self.basis != "bulk"


NO_DECAY = DecayEstimate(1.0, (1.0, 1.0))


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Displacement:
    """How far training moved a weight.

    Attributes:
        values: (K, N) ``w - s * w0``.
        untouched: (K, N) True where that is within rounding.
        decay: s; None where no common factor shows, because hardly any entry is untouched.
    """

    values: FloatArray
    untouched: BoolArray
    decay: DecayEstimate | None


def sorted_magnitudes(
    values: FloatArray, location: float = 0.0, *, most: int = _SAMPLE
) -> FloatArray:
    """Ascending nonzero ``|values - location|`` of an even sample, in float64."""
    sample = scan.spread_sample(scan.flat_view(values), most)
    sample = sample[sample != 0].astype(np.float64)
    return np.sort(np.abs(sample - location))


def bulk_decay(magnitudes: FloatArray, null: Null) -> DecayEstimate:
    """The factor by which ``null`` must shrink to fit the bulk of ascending ``magnitudes``.

    The median of the magnitudes within reach of the null is matched, from above: what lies
    outside is left out, and the reach shrinks with the factor until it rests. The reach is a
    tenth more than the null's own, so that even under a flat density it comes to rest at the
    edge. Entries that training enlarged can only make the result too large, never too small;
    that is the safe side, since a wider null supports fewer entries.

    The factor is 1 where the interval reaches 1, or where there are too few entries to tell.
    """
    if magnitudes.size < _FEWEST or null.std == 0:
        return NO_DECAY
    edge = _REACH * null.isf(math.log(_TRIM))
    inner = -math.expm1(float(null.logsf(np.array(edge))))
    middle = null.isf(math.log1p(-inner / 2))
    factor = min(1.0, float(np.median(magnitudes)) / null.isf(math.log(0.5)))
    while True:
        inside = int(np.searchsorted(magnitudes, factor * edge, side="right"))
        closer = float(magnitudes[max(inside - 1, 0) // 2]) / middle
        if inside < _FEWEST or closer >= factor * (1 - 1e-6):
            break
        factor = closer
    # Distribution-free interval of a median: order statistics z * sqrt(n) / 2 to each side.
    spread = 0.5 * _Z * math.sqrt(inside)
    low = float(magnitudes[max(math.floor(inside / 2 - spread), 0)]) / middle
    high = float(magnitudes[min(math.ceil(inside / 2 + spread), magnitudes.size - 1)]) / middle
    if max(high, factor) >= 1:
        return NO_DECAY
    return DecayEstimate(factor, (min(low, factor), max(high, factor)), members=inside)


def displacement_from(weight: FloatArray, snapshot: FloatArray) -> Displacement:
    """Separate untouched entries from the others, given the initial weights.

    Args:
        weight: (K, N) trained.
        snapshot: (K, N) as initialized.
    """
    grid, initial_grid = scan.resolution_of(weight), scan.resolution_of(snapshot)
    coarser = min(grid, initial_grid, key=lambda g: g.bits)
    decay = _ratio_cluster(weight, snapshot, coarser)
    factor, tolerance = (1.0, 0.0) if decay is None else (decay.factor, decay.tolerance)
    values = np.empty_like(weight, dtype=np.promote_types(weight.dtype, np.float32))
    untouched = np.empty_like(weight, dtype=bool)
    for start in range(0, weight.shape[0], _ROWS_AT_A_TIME):
        rows = slice(start, start + _ROWS_AT_A_TIME)
        now = weight[rows].astype(np.float64)
        expected = factor * snapshot[rows].astype(np.float64)
        values[rows] = now - expected
        # Within one rounding of the coarser grid, and what decay's own roundings add up to.
        rounding = coarser.half_cell(expected)
        np.less_equal(
            np.abs(now - expected), rounding + tolerance * np.abs(expected), out=untouched[rows]
        )
    if tolerance > 0 and coarser.bits >= _FINE_BITS:
        _keep_the_ridge(untouched, weight, snapshot)
    return Displacement(values, untouched, decay)


def _keep_the_ridge(untouched: BoolArray, weight: FloatArray, snapshot: FloatArray) -> None:
    """Take out of ``untouched`` what the accumulated rounding of decay does not explain.

    What decay's roundings add up to is a function of the initial significand alone: entries
    with nearly the same one end at nearly the same ratio. So the ratios of untouched entries,
    ordered by significand, lie on a thin ridge, and the tolerance need only be as wide as the
    ridge.
    """
    rows, columns = np.nonzero(untouched & (snapshot != 0))
    bins = min(rows.size // _RIDGE_MEMBERS, _MOST_BINS)
    if bins < 2:
        return
    initial = snapshot[rows, columns].astype(np.float64)
    ratios = weight[rows, columns].astype(np.float64) / initial
    order = np.argsort(np.frexp(np.abs(initial))[0], kind="stable")
    # As many in each part, so that one sort serves all; the last part overlaps the one before.
    size = rows.size // bins
    starts = np.append(np.arange(bins) * size, rows.size - size)
    parts = order[starts[:, None] + np.arange(size)]
    by_part = np.sort(ratios[parts], axis=1)
    low, middle, high = (by_part[:, [round(q * (size - 1))]] for q in (0.1, 0.5, 0.9))
    allowed = _RIDGE_WIDTHS * (high - low) + _RIDGE_ROUNDINGS * np.abs(middle)
    off = parts[np.abs(ratios[parts] - middle) > allowed]
    untouched[rows[off], columns[off]] = False


def _ratio_cluster(
    weight: FloatArray, snapshot: FloatArray, coarser: scan.Resolution
) -> DecayEstimate | None:
    """The narrow cluster of ``w / w0`` that untouched entries form, if there is one."""
    positions = scan.spread_positions(weight.size, _SAMPLE)
    rows, columns = np.divmod(positions, weight.shape[1])
    now = weight[rows, columns].astype(np.float64)
    initial = snapshot[rows, columns].astype(np.float64)
    # The smallest entries carry the largest relative rounding errors (subnormal numbers).
    usable = (initial != 0) & (np.abs(initial) >= np.quantile(np.abs(initial), 0.2))
    ratios = np.sort(now[usable] / initial[usable])
    window = max(_FEWEST_MEMBERS, ratios.size // 2000)
    equal = int(np.count_nonzero(ratios == 1))
    rounding = 2.0 ** (1 - coarser.bits)
    clusters = []
    if ratios.size > window:
        start = int(np.argmin(ratios[window:] - ratios[:-window]))
        clusters = [
            _cluster_around(ratios, centre, rounding, window)
            for centre in (1.0, float(ratios[start + window // 2]))
        ]
    found = max(filter(None, clusters), key=lambda c: c.members, default=None)
    # Chance makes two float32 numbers equal too rarely to be mistaken for being untouched.
    fine = coarser.bits >= _FINE_BITS
    least = 1 if fine else window
    # Decay moves the factor by more than its roundings add up to, or rounding undoes it: a crowd
    # about 1 wider than that is of entries that moved a little, beside equal ones that did not.
    about_one = found is not None and fine and abs(found.factor - 1) <= found.tolerance
    if equal >= least and (found is None or about_one or 2 * equal >= found.members):
        return DecayEstimate(1.0, (1.0, 1.0), 0.0, equal)
    if (
        found is not None
        and abs(found.factor - 1) <= rounding
        and found.tolerance <= 2 * rounding
    ):
        return DecayEstimate(1.0, (1.0, 1.0), 0.0, found.members)
    return found


def _cluster_around(
    ratios: FloatArray, centre: float, rounding: float, least: int
) -> DecayEstimate | None:
    """Cluster of ascending ``ratios`` near ``centre``; None if nothing stands out."""
    if not 0 < centre <= 1 + _WIDEST:
        return None
    best: tuple[float, float, float, int, int] | None = None
    for doubling in range(_DOUBLINGS):
        tolerance = rounding * 2.0**doubling
        if tolerance > _WIDEST:
            break
        low, high = _within(ratios, centre, tolerance)
        centre = float(ratios[(low + high) // 2]) if high > low else centre
        low, high = _within(ratios, centre, tolerance)
        wider = _within(ratios, centre, 2 * tolerance)
        # A smooth background would double with the width; a cluster of rounding errors stays.
        stragglers = (wider[1] - wider[0]) / max(high - low, 1) - 1
        if high - low >= least and (best is None or stragglers < best[0]):
            best = (stragglers, centre, tolerance, low, high)
            if stragglers <= _STRAGGLERS:
                break
    if best is None or best[0] > _MOST_STRAGGLERS:
        return None
    _, centre, tolerance, low, high = best
    spread = math.ceil(0.5 * _Z * math.sqrt(high - low))
    middle = (low + high) // 2
    interval = (ratios[max(middle - spread, low)], ratios[min(middle + spread, high - 1)])
    return DecayEstimate(
        centre, (float(interval[0]), float(interval[1])), tolerance, high - low
    )


def _within(ratios: FloatArray, centre: float, tolerance: float) -> tuple[int, int]:
    low = np.searchsorted(ratios, centre * (1 - tolerance), side="left")
    high = np.searchsorted(ratios, centre * (1 + tolerance), side="right")
    return int(low), int(high)
