"""Passes over a weight at memory speed: counts beyond thresholds, masks, rings.

A weight is read in blocks that fit a core's cache, so nothing of its size is ever copied.

Rounding. A stored entry stands for its rounding cell: everything that rounds to it. Its p-value
is therefore that of the cell's edge nearest to the null's location, P(round(W) at least as far
out as w) exactly. An entry is beyond ``t`` only if its whole cell is. So a bounded null whose
edge was rounded outwards by fp16 or bf16 makes no false edges, and ties need no special care.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    FloatArray = NDArray[np.floating[Any]]
    BoolArray = NDArray[np.bool_]

__all__ = [
    "Cut",
    "Resolution",
    "beyond",
    "flat_view",
    "resolution_of",
    "ring",
    "shaped_like",
    "spread_positions",
    "spread_sample",
    "tail_count",
]

_BLOCK = 1 << 18
_PROBE = 4096
_GOLDEN = (math.sqrt(5.0) - 1.0) / 2.0


@dataclasses.dataclass(frozen=True, slots=True)
class Cut:
    """Entries ``<= lower`` or ``>= upper`` are beyond the cut."""

    lower: float
    upper: float

    @property
    def symmetric(self) -> bool:
        """Whether comparing magnitudes is enough."""
        return self.lower == -self.upper


@dataclasses.dataclass(frozen=True, slots=True)
class Resolution:
    """The floating-point grid that the entries were rounded to.

    Attributes:
        bits: significand bits, the implicit one included (float32: 24, float16: 11, bfloat16:
            8).
        smallest: spacing of the subnormal numbers.
    """

    bits: int
    smallest: float

    def cut(self, location: float, magnitude: float) -> Cut:
        """Beyond it, whole rounding cells are ``magnitude`` or more away from ``location``."""
        if math.isinf(magnitude):
            return Cut(-math.inf, math.inf)
        return Cut(-self._above(magnitude - location), self._above(location + magnitude))

    def half_cell(self, values: FloatArray) -> FloatArray:
        """Distance from each value to its rounding cell's edge towards zero, in float64."""
        fraction, exponent = np.frexp(np.abs(values).astype(np.float64))
        spacing = np.where(fraction > 0, np.ldexp(1.0, exponent - self.bits), 0.0)
        spacing[fraction == 0.5] /= 2  # under a power of two the grid is twice as fine
        half: FloatArray = 0.5 * np.maximum(spacing, self.smallest)
        return half

    def _above(self, x: float) -> float:
        """Smallest number of the grid whose rounding cell begins at ``x`` or above."""
        spacing = math.ldexp(1.0, math.frexp(x)[1] - self.bits) if x else 0.0
        spacing = max(spacing, self.smallest)
        return math.ceil(x / spacing + 0.5) * spacing


_FLOAT16 = Resolution(11, 2.0**-24)
_BFLOAT16 = Resolution(8, 2.0**-133)
_FLOAT32 = Resolution(24, 2.0**-149)
_FLOAT64 = Resolution(53, 5e-324)


def resolution_of(values: FloatArray) -> Resolution:
    """The grid of ``values``: its dtype's, or that of fp16 or bf16 numbers held as float32."""
    if values.dtype == np.float16:
        return _FLOAT16
    if values.dtype != np.float32:
        return _FLOAT64
    flat = flat_view(values).view(np.uint32)
    if _used_bits(flat[:_PROBE]) & 0x1FFF or (used := _used_bits(flat)) & 0x1FFF:
        return _FLOAT32  # nearly always settled by the first few entries
    return _FLOAT16 if used & 0xFFFF else _BFLOAT16


def _used_bits(patterns: NDArray[np.uint32]) -> int:
    return int(np.bitwise_or.reduce(patterns, initial=0))


def flat_view(values: NDArray[Any]) -> NDArray[Any]:
    """1-D view in memory order; copies only what is contiguous in neither order."""
    return values.ravel(order="F" if _by_columns(values) else "C")


def shaped_like(flat: NDArray[Any], values: NDArray[Any]) -> NDArray[Any]:
    """Inverse of :func:`flat_view`: give ``flat`` the shape of ``values``, without copying."""
    return flat.reshape(values.shape, order="F" if _by_columns(values) else "C")


def _by_columns(values: NDArray[Any]) -> bool:
    return values.flags.f_contiguous and not values.flags.c_contiguous


def spread_positions(size: int, count: int) -> NDArray[np.intp]:
    """Up to ``count`` positions spread evenly over ``size``, in step with no row or column."""
    if size <= count:
        return np.arange(size, dtype=np.intp)
    # Multiples of the golden ratio modulo 1: evenly spread at every scale, the same every time.
    fractions = np.modf(np.arange(1, count + 1) * _GOLDEN)[0]
    positions: NDArray[np.intp] = (fractions * size).astype(np.intp)
    return positions


def spread_sample(flat: NDArray[Any], count: int) -> NDArray[Any]:
    """The entries at :func:`spread_positions`."""
    return flat if flat.size <= count else flat[spread_positions(flat.size, count)]


def tail_count(flat: FloatArray, cut: Cut) -> int:
    """How many entries lie beyond ``cut``."""
    found = 0
    blocks = _Blocks(flat, magnitudes=cut.symmetric)
    flags = np.empty((2, min(_BLOCK, flat.size)), dtype=bool)
    for _, block in blocks:
        flag, spare = flags[:, : block.size]
        blocks.flag_beyond(block, cut, flag, spare)
        found += int(np.count_nonzero(flag))
    return found


def beyond(flat: FloatArray, cut: Cut) -> BoolArray:
    """(n,) mask of the entries beyond ``cut``."""
    return ring(flat, cut, cut)[0]


def ring(
    flat: FloatArray, inner: Cut, outer: Cut, wider: Sequence[Cut] = ()
) -> tuple[BoolArray, NDArray[np.intp], list[int]]:
    """One pass for a mask, for what lies just inside it, and for counts further inside.

    Args:
        flat: (n,) entries.
        inner: where the ring begins.
        outer: where it ends and the mask begins.
        wider: cuts inside ``inner``, widest tail first.

    Returns:
        (n,) mask of what is beyond ``outer``, ascending positions of what is beyond ``inner``
        only, and how many entries lie beyond each of ``wider``.
    """
    mask = np.empty(flat.size, dtype=bool)
    blocks = _Blocks(flat, magnitudes=all(c.symmetric for c in (inner, outer, *wider)))
    flags = np.empty((2, min(_BLOCK, flat.size)), dtype=bool)
    positions = [np.empty(0, dtype=np.intp)]
    counts = [0] * len(wider)
    for start, block in blocks:
        part = mask[start : start + block.size]
        flag, spare = flags[:, : block.size]
        blocks.flag_beyond(block, outer, part, spare)
        if inner != outer:
            blocks.flag_beyond(block, inner, flag, spare)
            np.not_equal(flag, part, out=flag)
            positions.append(np.flatnonzero(flag) + start)
        for index, cut in enumerate(wider):
            blocks.flag_beyond(block, cut, flag, spare)
            counts[index] += int(np.count_nonzero(flag))
    return mask, np.concatenate(positions), counts


class _Blocks:
    """Blocks of the entries, or of their magnitudes where cuts are symmetric.

    Magnitudes of float16 are compared as the integers that their bits spell, which have the
    same order; float16 itself has no vector instructions here.
    """

    def __init__(self, flat: FloatArray, *, magnitudes: bool) -> None:
        self._flat = flat
        self._magnitudes = magnitudes
        self._coded = magnitudes and flat.dtype == np.float16

    def __iter__(self) -> Iterator[tuple[int, NDArray[Any]]]:
        flat = self._flat.view(np.uint16) if self._coded else self._flat
        buffer = np.empty(min(_BLOCK, flat.size), dtype=flat.dtype)
        for start in range(0, flat.size, _BLOCK):
            block = flat[start : start + _BLOCK]
            if self._coded:
                block = np.bitwise_and(block, np.uint16(0x7FFF), out=buffer[: block.size])
            elif self._magnitudes:
                block = np.abs(block, out=buffer[: block.size])
            yield start, block

    def flag_beyond(
        self, block: NDArray[Any], cut: Cut, out: BoolArray, spare: BoolArray
    ) -> None:
        """Write into ``out`` which entries of ``block`` are beyond ``cut``."""
        if self._coded:
            with np.errstate(over="ignore"):
                np.greater_equal(block, np.float16(cut.upper).view(np.uint16), out=out)
            return
        np.greater_equal(block, cut.upper, out=out)
        if not self._magnitudes:
            np.less_equal(block, cut.lower, out=spare)
            np.logical_or(out, spare, out=out)
