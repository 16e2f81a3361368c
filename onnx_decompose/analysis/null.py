"""Null distributions: what a weight entry would be now had training never touched it.

Every null answers two questions about the magnitude of a deviation, ``|W - location|``: how
likely is one at least this large (``logsf``, natural logarithm, so that the far tail does not
underflow), and how large must one be to be this unlikely (``isf``). All nulls here are
symmetric about ``location``, so the p-value falls with the magnitude and a criterion becomes a
threshold.

The initialization formulas are those of Glorot and Bengio (2010) and He et al. (2015), as in
``torch.nn.init``.
"""

from __future__ import annotations

import dataclasses
import math
import re
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from scipy import special

from onnx_decompose.errors import OptionError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

    FloatArray = NDArray[np.floating[Any]]

__all__ = [
    "GRAMMAR",
    "Normal",
    "Null",
    "TruncatedNormal",
    "Uniform",
    "Zero",
    "parse_null",
    "stated_decay",
]

_LOG_2 = math.log(2.0)
_KERAS_CUT = 2.0
"""Standard deviations at which Keras and TensorFlow truncate a truncated normal."""

GRAMMAR = (
    "normal:S, uniform:A, trunc_normal:S (optional location first: normal(0,0.02)), "
    "kaiming_uniform[:a=SLOPE], kaiming_normal[:a=SLOPE], "
    "xavier_uniform[:gain=G], xavier_normal[:gain=G], torch, keras, bert or zero; "
    "decay=S beside the arguments where the common factor of weight decay is known"
)
"""What :func:`parse_null` accepts, in words."""


class Null(Protocol):
    """A symmetric distribution of untouched entries."""

    @property
    def name(self) -> str:
        """Family and parameters as the report shows them."""
        ...

    @property
    def location(self) -> float:
        """Centre of symmetry."""
        ...

    @property
    def scale(self) -> float:
        """The family's own scale: standard deviation (normal), half width (uniform)."""
        ...

    @property
    def std(self) -> float:
        """Standard deviation, whatever the family."""
        ...

    def logsf(self, magnitude: FloatArray) -> FloatArray:
        """Natural log of P(|W - location| >= magnitude), elementwise, in float64."""
        ...

    def isf(self, log_p: float) -> float:
        """Smallest magnitude m with ``logsf(m) <= log_p``; infinite where there is none."""
        ...

    def shrunk(self, factor: float) -> Null:
        """The same family after weight decay has multiplied every entry by ``factor``."""
        ...


@dataclasses.dataclass(frozen=True, slots=True)
class Zero:
    """Point mass at zero: only exact zeros are unsupported, nothing else can be removed."""

    @property
    def name(self) -> str:
        """Always ``zero``."""
        return "zero"

    @property
    def location(self) -> float:
        """Zero."""
        return 0.0

    @property
    def scale(self) -> float:
        """Zero."""
        return 0.0

    @property
    def std(self) -> float:
        """Zero."""
        return 0.0

    def logsf(self, magnitude: FloatArray) -> FloatArray:
        """0 at zero, minus infinity elsewhere."""
        return np.where(np.asarray(magnitude) > 0, -np.inf, 0.0)

    def isf(self, log_p: float) -> float:
        """The smallest positive number, for every probability under 1."""
        return 0.0 if log_p >= 0 else math.ulp(0.0)

    def shrunk(self, factor: float) -> Zero:
        """Zeros stay zeros."""
        del factor
        return self


@dataclasses.dataclass(frozen=True, slots=True)
class Normal:
    """N(location, scale**2)."""

    scale: float
    location: float = 0.0

    def __post_init__(self) -> None:
        _require_positive("normal", self.scale)

    @property
    def name(self) -> str:
        """Such as ``normal(0, 0.02)``."""
        return f"normal({self.location:.4g}, {self.scale:.4g})"

    @property
    def std(self) -> float:
        """The scale itself."""
        return self.scale

    def logsf(self, magnitude: FloatArray) -> FloatArray:
        """Two-sided tail; exact to about 1e-14 relative down to magnitudes of 1e150 scales."""
        z = np.asarray(magnitude, dtype=np.float64) / self.scale
        tail: FloatArray = np.minimum(_LOG_2 + special.log_ndtr(-z), 0.0)
        return tail

    def isf(self, log_p: float) -> float:
        """Inverse of :meth:`logsf`."""
        return 0.0 if log_p >= 0 else -self.scale * float(special.ndtri_exp(log_p - _LOG_2))

    def shrunk(self, factor: float) -> Normal:
        """N(factor * location, (factor * scale)**2)."""
        return Normal(self.scale * factor, self.location * factor)


@dataclasses.dataclass(frozen=True, slots=True)
class Uniform:
    """U(location - scale, location + scale)."""

    scale: float
    location: float = 0.0

    def __post_init__(self) -> None:
        _require_positive("uniform", self.scale)

    @property
    def name(self) -> str:
        """Such as ``uniform(0, 0.05)``: centre and half width."""
        return f"uniform({self.location:.4g}, {self.scale:.4g})"

    @property
    def std(self) -> float:
        """Half width over the square root of 3."""
        return self.scale / math.sqrt(3.0)

    def logsf(self, magnitude: FloatArray) -> FloatArray:
        """Minus infinity from the edge on: P(|W| >= scale) is 0."""
        share = np.asarray(magnitude, dtype=np.float64) / self.scale
        with np.errstate(divide="ignore"):
            return np.log1p(-np.minimum(share, 1.0))

    def isf(self, log_p: float) -> float:
        """At most the edge itself."""
        return 0.0 if log_p >= 0 else -self.scale * math.expm1(log_p)

    def shrunk(self, factor: float) -> Uniform:
        """Both edges move towards zero by the same factor."""
        return Uniform(self.scale * factor, self.location * factor)


@dataclasses.dataclass(frozen=True, slots=True)
class TruncatedNormal:
    """A normal redrawn until it lies within ``cut`` standard deviations of its location.

    Attributes:
        scale: standard deviation of the normal before truncation.
        location: centre.
        cut: where it is truncated, in units of ``scale`` (Keras and TensorFlow: 2).
    """

    scale: float
    location: float = 0.0
    cut: float = _KERAS_CUT

    def __post_init__(self) -> None:
        _require_positive("trunc_normal", self.scale)
        _require_positive("trunc_normal cut", self.cut)

    @property
    def name(self) -> str:
        """Such as ``trunc_normal(0, 0.02, 2)``."""
        return f"trunc_normal({self.location:.4g}, {self.scale:.4g}, {self.cut:.4g})"

    @property
    def std(self) -> float:
        """After truncation (Johnson, Kotz and Balakrishnan, 1994, section 13.10.1)."""
        density = math.exp(-0.5 * self.cut**2) / math.sqrt(2 * math.pi)
        inside = math.erf(self.cut / math.sqrt(2))
        return self.scale * math.sqrt(1 - 2 * self.cut * density / inside)

    def logsf(self, magnitude: FloatArray) -> FloatArray:
        """Minus infinity from the cut on."""
        z = np.asarray(magnitude, dtype=np.float64) / self.scale
        tail: FloatArray = special.log_ndtr(-z)
        edge = float(special.log_ndtr(-self.cut))
        # log(exp(tail) - exp(edge)) without cancellation; at or past the cut the difference is
        # 0.
        with np.errstate(divide="ignore"):
            inside = tail + np.log(-np.expm1(np.minimum(edge - tail, 0.0)))
        clipped: FloatArray = np.clip(inside - self._log_half_mass, None, 0.0)
        return clipped

    def isf(self, log_p: float) -> float:
        """At most the cut itself."""
        if log_p >= 0:
            return 0.0
        edge = float(special.log_ndtr(-self.cut))
        tail = np.logaddexp(log_p + self._log_half_mass, edge)
        return self.scale * min(-float(special.ndtri_exp(tail)), self.cut)

    def shrunk(self, factor: float) -> TruncatedNormal:
        """Scale, location and therefore the cut's position, all by the same factor."""
        return TruncatedNormal(self.scale * factor, self.location * factor, self.cut)

    @property
    def _log_half_mass(self) -> float:
        """Log of P(0 <= Z <= cut) for a standard normal Z."""
        return math.log(math.erf(self.cut / math.sqrt(2)) / 2)


def parse_null(spec: str, *, fan_in: int, fan_out: int) -> Null:
    """Read a declared null such as ``normal:0.02``, ``kaiming_uniform(a=sqrt5)`` or ``torch``.

    The null is that of the initialization; :func:`stated_decay` reads ``decay=S``.

    Args:
        spec: family and arguments, after a colon or in parentheses; a number may be written
            ``sqrt5``.
        fan_in: inputs that one unit sums over.
        fan_out: units that one input feeds.

    Raises:
        OptionError: ``spec`` is not in the :data:`GRAMMAR`.
    """
    family, arguments = _read(spec)
    if family not in _FAMILIES:
        raise OptionError(
            f"null {spec!r} is unknown; use auto, recorded, empirical, snapshot:FILE, optimizer:FILE, {GRAMMAR}"
        )
    build = _FAMILIES[family][2]
    return build({"fan_in": float(fan_in), "fan_out": float(fan_out), **arguments})


def stated_decay(spec: str) -> float | None:
    """The common factor that the user states, as in ``torch:decay=0.8``; None if there is none.

    Raises:
        OptionError: ``spec`` is not in the :data:`GRAMMAR`, or the factor is not in (0, 1].
    """
    factor = _read(spec)[1].get("decay")
    if factor is not None and not 0 < factor <= 1:
        raise OptionError(f"null {spec!r}: decay {factor!r} must lie between 0 and 1")
    return factor


def _read(spec: str) -> tuple[str, dict[str, float]]:
    """Family and arguments by name."""
    match = re.fullmatch(r"\s*([a-z_]+)\s*(?::\s*(.*?)|\(\s*(.*?)\s*\))?\s*", spec)
    family = match.group(1) if match else ""
    if match is None or family not in {*_FAMILIES, "recorded"}:
        raise OptionError(f"null {spec!r} is unknown; use {GRAMMAR}")
    names, required, _ = _FAMILIES.get(family, ((), 0, None))
    text = match.group(2) or match.group(3) or ""
    return family, _arguments(spec, text, names, required)


def _arguments(spec: str, text: str, names: tuple[str, ...], required: int) -> dict[str, float]:
    """Positional and named numbers; a single positional number is the family's main one."""
    parts = [part.strip() for part in text.split(",")] if text.strip() else []
    positional = [part for part in parts if "=" not in part]
    # normal:S gives the scale alone, normal(L,S) the location first.
    order = names[1:2] if names[:1] == ("location",) and len(positional) == 1 else names
    if len(positional) > len(order) or len(parts) < required:
        raise OptionError(f"null {spec!r} has the wrong number of arguments; use {GRAMMAR}")
    pairs = [*zip(order, positional, strict=False)]
    pairs += [
        (name.strip(), value)
        for name, _, value in (p.partition("=") for p in parts if "=" in p)
    ]
    found: dict[str, float] = {}
    for name, value in pairs:
        if name not in {*names, "decay"} or name in found:
            raise OptionError(
                f"null {spec!r}: argument {name!r} is not known here; use {GRAMMAR}"
            )
        found[name] = _number(spec, value)
    return found


def _number(spec: str, text: str) -> float:
    """A finite float, or ``sqrtX`` / ``sqrt(X)``."""
    match = re.fullmatch(r"sqrt\(?([0-9.]+)\)?", text.strip())
    try:
        value = math.sqrt(float(match.group(1))) if match else float(text)
    except ValueError as error:
        raise OptionError(
            f"null {spec!r}: {text.strip()!r} is not a number; use {GRAMMAR}"
        ) from error
    if not math.isfinite(value):
        raise OptionError(f"null {spec!r}: {text.strip()!r} is not finite; use {GRAMMAR}")
    return value


def _require_positive(family: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise OptionError(
            f"null {family}: {value!r} must be a positive number (only exact zeros: use zero)"
        )


def _kaiming_std(p: Mapping[str, float], default_slope: float) -> float:
    slope = p.get("a", default_slope)
    return math.sqrt(2.0 / ((1.0 + slope**2) * p["fan_in"]))


def _xavier_std(p: Mapping[str, float]) -> float:
    return p.get("gain", 1.0) * math.sqrt(2.0 / (p["fan_in"] + p["fan_out"]))


_SQRT_3 = math.sqrt(3.0)
_FAMILIES: dict[str, tuple[tuple[str, ...], int, Callable[[Mapping[str, float]], Null]]] = {
    # family: names of its arguments in order, how many are required, constructor
    "zero": ((), 0, lambda _: Zero()),
    "normal": (
        ("location", "scale"),
        1,
        lambda p: Normal(p.get("scale", 0.0), p.get("location", 0.0)),
    ),
    "uniform": (
        ("location", "scale"),
        1,
        lambda p: Uniform(p.get("scale", 0.0), p.get("location", 0.0)),
    ),
    "trunc_normal": (
        ("location", "scale", "cut"),
        1,
        lambda p: TruncatedNormal(
            p.get("scale", 0.0), p.get("location", 0.0), p.get("cut", _KERAS_CUT)
        ),
    ),
    "kaiming_uniform": (("a",), 0, lambda p: Uniform(_SQRT_3 * _kaiming_std(p, 0.0))),
    "kaiming_normal": (("a",), 0, lambda p: Normal(_kaiming_std(p, 0.0))),
    "xavier_uniform": (("gain",), 0, lambda p: Uniform(_SQRT_3 * _xavier_std(p))),
    "xavier_normal": (("gain",), 0, lambda p: Normal(_xavier_std(p))),
    # torch.nn.Linear and ConvNd: kaiming_uniform(a=sqrt(5)), that is U(-1/sqrt(fan_in),
    # 1/sqrt(fan_in)).
    "torch": ((), 0, lambda p: Uniform(_SQRT_3 * _kaiming_std(p, math.sqrt(5.0)))),
    # keras.layers.Dense and Conv: glorot_uniform.
    "keras": ((), 0, lambda p: Uniform(_SQRT_3 * _xavier_std(p))),
    # initializer_range of BERT and its descendants.
    "bert": ((), 0, lambda _: Normal(0.02)),
}
