"""A null known by points of its tail only: a recorded quantile sketch, or the bulk of the weights themselves."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    FloatArray = NDArray[np.floating[Any]]

__all__ = ["Sketch"]

_SLOPE_OVER = 1.5
"""Natural-log units of p that the tail's slope is taken over."""


@dataclasses.dataclass(frozen=True, slots=True)
class Sketch:
    """Tail probabilities at ascending magnitudes, log-log interpolated between them.

    Attributes:
        magnitudes: positive, strictly ascending.
        log_p: log of P(|W - location| >= magnitude) at each of them, descending, below 0.
        location: centre.
        bounded: whether nothing lies past the last magnitude; otherwise the tail falls on
            exponentially at the slope before the last point, an upper bound for every
            log-concave density (normal, uniform, logistic, Laplace, ...).
        label: what the report calls it.
        deviation: standard deviation where it is known; taken from the points otherwise.
    """

    magnitudes: tuple[float, ...]
    log_p: tuple[float, ...]
    location: float = 0.0
    bounded: bool = False
    label: str = "sketch"
    deviation: float | None = None

    @classmethod
    def of_quantiles(
        cls, quantiles: Sequence[float], location: float, deviation: float
    ) -> Sketch:
        """From values at the midpoints of equal probability steps, as a record holds them.

        A level and its mirror image give one two-sided point, at the larger of their
        deviations.

        Args:
            quantiles: ascending, at probabilities (2 i + 1) / (2 n).
            location: centre.
            deviation: standard deviation.

        Raises:
            ValueError: the quantiles are all at the location.
        """
        deviations = np.asarray(quantiles, dtype=np.float64) - location
        pairs = np.arange(deviations.size // 2)
        folded = np.maximum(-deviations[pairs], deviations[::-1][pairs])[::-1]
        log_p = np.log((2 * pairs[::-1] + 1) / deviations.size)
        sketch = cls.of_tail(np.maximum.accumulate(folded), log_p, location)
        return dataclasses.replace(sketch, deviation=deviation)

    @classmethod
    def of_tail(
        cls,
        magnitudes: FloatArray,
        log_p: FloatArray,
        location: float = 0.0,
        *,
        bounded: bool = False,
        label: str = "sketch",
    ) -> Sketch:
        """From ascending magnitudes; of ties the least probable stays, zeros are dropped.

        Raises:
            ValueError: no positive magnitude.
        """
        keep = (magnitudes > 0) & (np.diff(magnitudes, append=np.inf) > 0) & (log_p < 0)
        if not keep.any():
            raise ValueError("a sketch needs a positive magnitude")
        return cls(
            tuple(magnitudes[keep].tolist()),
            tuple(log_p[keep].tolist()),
            location,
            bounded,
            label,
        )

    @property
    def name(self) -> str:
        """Label and standard deviation."""
        return f"{self.label}(std {self.std:.4g})"

    @property
    def scale(self) -> float:
        """The largest magnitude of the sketch."""
        return self.magnitudes[-1]

    @property
    def std(self) -> float:
        """The known one, or E[m^2] as a sum over the sketch's steps."""
        if self.deviation is not None:
            return self.deviation
        p = np.exp(np.concatenate([[0.0], self.log_p, [-np.inf]]))
        m = np.concatenate([[0.0], self.magnitudes, self.magnitudes[-1:]])
        middle = np.concatenate([[m[0]], 0.5 * (m[1:] + m[:-1])])[1:]
        return math.sqrt(float(np.sum(-np.diff(p) * middle**2)))

    def logsf(self, magnitude: FloatArray) -> FloatArray:
        """Interpolated inside the sketch; see ``bounded`` for what lies past it."""
        m = np.asarray(magnitude, dtype=np.float64)
        first, last = self.magnitudes[0], self.magnitudes[-1]
        inside = np.interp(
            np.log(np.clip(m, first, last)), np.log(self.magnitudes), np.asarray(self.log_p)
        )
        inside = np.where(m < first, self.log_p[0] * (m / first), inside)
        if self.bounded:
            return np.where(m > last, -np.inf, inside)
        past: FloatArray = self.log_p[-1] + self._tail_slope * (m - last)
        return np.where(m > last, past, inside)

    def isf(self, log_p: float) -> float:
        """Inverse of :meth:`logsf`."""
        if log_p >= 0:
            return 0.0
        first, last = self.magnitudes[0], self.magnitudes[-1]
        if log_p > self.log_p[0]:
            return first * log_p / self.log_p[0]
        if log_p >= self.log_p[-1]:
            knots = np.log(self.magnitudes)[::-1]
            return math.exp(float(np.interp(log_p, np.asarray(self.log_p)[::-1], knots)))
        if self.bounded:
            return math.nextafter(last, math.inf)
        return last + (log_p - self.log_p[-1]) / self._tail_slope

    def shrunk(self, factor: float) -> Sketch:
        """Every magnitude multiplied by ``factor``."""
        magnitudes = tuple(m * factor for m in self.magnitudes)
        deviation = None if self.deviation is None else self.deviation * factor
        location = self.location * factor
        return dataclasses.replace(
            self, magnitudes=magnitudes, location=location, deviation=deviation
        )

    @property
    def _tail_slope(self) -> float:
        """Slope of log p near the end. A log-concave density's tail falls at least that fast."""
        log_p = np.array([0.0, *self.log_p])
        magnitudes = np.array([0.0, *self.magnitudes])
        before = (
            int(np.flatnonzero(log_p >= log_p[-1] + _SLOPE_OVER)[-1])
            if (log_p[-1] <= -_SLOPE_OVER)
            else 0
        )
        return float((log_p[-1] - log_p[before]) / (magnitudes[-1] - magnitudes[before]))
