"""How far the outputs of two models may be apart if they differ by nothing but rounding.

With a float64 reference: no output of the rewritten model may be farther from it than ``ERROR_FACTOR`` times as far
as the annealed model's own, plus ``FLOOR`` units in the last place. What the annealed model's errors are is measured,
the largest over all draws of one kind of inputs, so that neither ill-conditioned models raise false alarms nor
well-conditioned ones get more room than they need.

The largest errors of a few entries are luck to a good part. What misses that bound is therefore only suspected, and a
sign test decides: both models run on fresh inputs right beside, where a fault stays and every rounding is another. The
null hypothesis is that the rewritten model's errors are at most ``WORSE`` times as large as the annealed model's, as a
distribution: then at most every second pair has the rewritten model's over ``WORSE`` times the other. The output counts
as wrong where ``CONVICTING`` of ``DRAWS`` pairs have, which luck does in 1 of 100,000 suspicions at most.

Where a quantizer rounds a value half way between two steps, a last bit decides on a whole step: an output may move as
far as the annealed model's does when some of what it quantizes goes to the next step (``nudged``).

Without a reference: within the tolerance of the type, or a few times as far as the annealed model moves when the last
bits of its inputs do.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from onnx_decompose.model.tensors import is_float
from onnx_decompose.verification.claims import Tolerance

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from numpy.typing import NDArray


__all__ = [
    "CONVICTING",
    "DRAWS",
    "ERROR_FACTOR",
    "FLOOR",
    "WORSE",
    "Compared",
    "compare",
    "first_miss",
]

logger = logging.getLogger(__name__)

ERROR_FACTOR = 4.0
"""Additions in another order make other errors, of one size. Measured: 2 suffices (``tools/rounding_errors.py``)."""

FLOOR = 8.0
"""Units in the last place of the output's largest entry: what a few entries' errors are by luck. Measured: up to 2.8 on
top of twice the annealed model's error, nothing on top of four times."""

LAST_BITS = 4.0
"""Without a reference: deviation allowed of an output over its own when the last bits of the inputs move: additions in
another order were measured to make up to 4.0 of that (the models of tools/bench_recurrent.py, 64 steps)."""

WORSE = 2.0
"""How much larger errors another order of additions may make, as a rule; ``tools/rounding_errors.py`` found no more."""

DRAWS, CONVICTING = 32, 28
"""Pairs of errors, and those that have to be over ``WORSE``: P(28 or more of 32) is 9.7e-6 at one half each."""

_TRUSTED = 0.25
"""A reference farther than this from what onnxruntime makes is not the model's (a share of the output's usual size)."""


def _is_exact_type(dtype: np.dtype[Any]) -> bool:
    """Whether float64 is no better reference for an output of this type than the output itself."""
    return not is_float(dtype) or dtype == np.float64


@dataclasses.dataclass(frozen=True, slots=True)
class Compared:
    """One output on one set of inputs; errors and sizes are absolute, of the largest entry.

    Attributes:
        output: its name.
        label: of the inputs.
        kind: of the inputs: errors are pooled within it.
        dtype: of the output.
        size: largest finite entry of the exact output, or of the annealed model's.
        deviation: of the rewritten from the annealed model; infinite where they cannot be compared.
        annealed: error of the annealed model; None without a reference.
        rewritten: error of the rewritten model; None without a reference.
        moves: gives how far the annealed model's output moves with the last bits of its inputs.
        beside: gives the errors of the annealed and of the rewritten model on fresh inputs right beside, up to
            ``DRAWS`` pairs; none without a reference or without an input that can be moved.
        steps: gives how far it moves where quantizers round some values to the next step; 0 without any.
    """

    output: str
    label: str
    kind: str
    dtype: np.dtype[Any]
    size: float
    deviation: float
    annealed: float | None
    rewritten: float | None
    moves: Callable[[], float]
    beside: Callable[[], Iterable[tuple[float, float]]] = tuple
    steps: Callable[[], float] = lambda: 0.0

    @property
    def relative(self) -> float:
        """The deviation relative to the output's size."""
        return self.deviation / (self.size or 1.0)


def compare(
    annealed: NDArray[Any], rewritten: NDArray[Any], exact: NDArray[Any] | None
) -> tuple[float, float, float | None, float | None]:
    """Size, deviation, and the two errors against ``exact`` where that is given; see :class:`Compared`."""
    infinite = float("inf")
    if annealed.shape != rewritten.shape or annealed.dtype != rewritten.dtype:
        return 0.0, infinite, None, None
    if not is_float(annealed.dtype):
        return 0.0, 0.0 if np.array_equal(annealed, rewritten) else infinite, None, None
    first, second = annealed.astype(np.float64), rewritten.astype(np.float64)
    finite = np.isfinite(first)
    if not np.array_equal(first[~finite], second[~finite], equal_nan=True):
        return 0.0, infinite, None, None
    size, deviation = _largest(first[finite]), _largest(first[finite] - second[finite])
    if exact is None or exact.shape != annealed.shape or _is_exact_type(annealed.dtype):
        return size, deviation, None, None
    known = finite & np.isfinite(exact)
    truth = exact[known]
    return (
        _largest(truth),
        deviation,
        _largest(first[known] - truth),
        _largest(second[known] - truth),
    )


def first_miss(
    compared: Iterable[Compared], tolerance: Tolerance | None
) -> tuple[Compared, float, float] | None:
    """The first that deviates by more than rounding makes, its error and what is allowed of it, relative to its size.

    Args:
        compared: every output on every set of inputs.
        tolerance: a user's, which is then all that counts.
    """
    everything = list(compared)
    usual: dict[str, float] = {}
    for one in everything:
        if one.kind in {"random", "given"}:
            usual[one.output] = max(usual.get(one.output, 0.0), one.size)
    pools: dict[tuple[str, str], float] = {}
    for one in everything:
        if one.annealed is not None:
            key = (one.output, one.kind)
            error = one.annealed / one.size if one.size else 0.0
            pools[key] = max(pools.get(key, 0.0), error)
    for one in everything:
        size = max(one.size, usual.get(one.output, 0.0))
        pool = pools.get((one.output, one.kind))
        error, allowed = _verdict(one, size, pool, tolerance)
        if tolerance is None and allowed < error < float("inf"):
            # Nothing of finite accuracy can tell on which side of two steps a value half way lies.
            allowed = max(allowed, one.steps())
            if error > allowed and _is_luck(one.beside(), size):
                logger.info("'%s' on %s: suspected, and it was luck", one.output, one.label)
                continue
        if not error <= allowed:
            scale = one.size or 1.0
            return one, error / scale, allowed / scale
    return None


def _verdict(
    one: Compared, usual: float, pool: float | None, tolerance: Tolerance | None
) -> tuple[float, float]:
    """The error that counts and what is allowed of it, both absolute.

    Args:
        one: the output.
        usual: its size on random inputs, or here if that is larger.
        pool: the annealed model's largest relative error on inputs of this kind.
        tolerance: a user's.
    """
    if tolerance is not None:
        if not is_float(one.dtype):
            return one.deviation, 0.0
        return one.deviation, tolerance.rtol * one.size + tolerance.atol
    if not is_float(one.dtype) or not np.isfinite(one.deviation):
        return one.deviation, 0.0
    last_bit = float(ml_dtypes.finfo(one.dtype).eps)  # type: ignore[no-untyped-call]
    # Where an output is nothing but what is left of terms that cancel, it has their rounding.
    floor = FLOOR * last_bit * (usual if one.size <= last_bit * usual else one.size)
    if one.annealed is not None and one.rewritten is not None and _is_trusted(one, usual):
        own = max(one.annealed, (pool or 0.0) * one.size)
        return one.rewritten, ERROR_FACTOR * own + floor
    if pool is not None and one.annealed is None and pool <= _TRUSTED:
        # No reference on these inputs, but on others of their kind: |r - a| <= |r - x| + |a - x|.
        return one.deviation, (ERROR_FACTOR + 1) * pool * one.size + floor
    allowed = max(Tolerance.for_dtype(one.dtype).rtol * one.size, LAST_BITS * last_bit * usual)
    if not one.deviation <= allowed:
        allowed = max(allowed, LAST_BITS * one.moves())
    return one.deviation, allowed


def _is_luck(pairs: Iterable[tuple[float, float]], usual: float) -> bool:
    """Whether the sign test leaves it at a suspicion.

    What cannot be measured speaks for nobody: too few pairs, or errors of a reference that is not the model's, acquit
    no output.

    Args:
        pairs: errors of the annealed and of the rewritten model.
        usual: the output's size.
    """
    worse = within = 0
    for annealed, rewritten in pairs:
        if rewritten <= WORSE * annealed and annealed <= _TRUSTED * usual:
            within += 1
        else:
            worse += 1
        if worse == CONVICTING or within > DRAWS - CONVICTING:
            break
    return within > DRAWS - CONVICTING


def _is_trusted(one: Compared, usual: float) -> bool:
    assert one.annealed is not None
    return one.annealed <= _TRUSTED * usual


def _largest(values: NDArray[np.float64]) -> float:
    return float(np.abs(values).max(initial=0.0))
