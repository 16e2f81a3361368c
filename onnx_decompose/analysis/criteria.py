"""Criteria (the paper's property P): which entries of a weight are supported.

    fdr      Benjamini-Hochberg: of the supported entries, at most alpha are expected to be false
    fwer     Holm: the probability of any false edge is at most alpha
    ksigma   at least k standard deviations from the null's location, no multiplicity control
    displacement  moved from the initial value by more than the bulk of the moved entries
    group    whole rows and columns, Benjamini-Hochberg over them (see groups)
    channel  dependencies over the blocks of a stacked weight (see channels)
    shared   removes nothing: rows or columns that equal each other become one (see shared)
    magnitude     the share alpha of smallest entries goes: a baseline to compare against

Cases decided once, for every criterion:

- NaN and infinities never arrive; they are refused where the model is read.
- An exact zero is never an edge, whatever the null.
- Under the ``zero`` null the mask is exactly ``weight != 0``: nothing else can be removed.
- Where the source proves which entries are untouched, their p-value is 1 and every other is 0,
  so every level gives the same mask.
- An all-equal tensor has one p-value: all of it is supported or none. One row is a weight like
  any other.
- A bounded null's edge, exactly reached, is judged by its rounding cell (see ``scan``).

A third party adds a criterion as an entry point in the group ``onnx_decompose.criteria``: a
callable that takes alpha and returns a :class:`Criterion`. ``docs/architecture.md`` shows one.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import math
from typing import TYPE_CHECKING

import numpy as np
from scipy import special

from onnx_decompose.analysis import scan
from onnx_decompose.analysis.channels import ChannelEdges
from onnx_decompose.analysis.decay import sorted_magnitudes
from onnx_decompose.analysis.empirical import bulk_null
from onnx_decompose.analysis.groups import Groups
from onnx_decompose.analysis.null import Zero
from onnx_decompose.analysis.pi0 import storey_pi0
from onnx_decompose.analysis.selection import (
    Criterion,
    Selection,
    looser_level,
    proven,
    shaped_selection,
)
from onnx_decompose.analysis.shared import Shared
from onnx_decompose.analysis.stepwise import StepDown, StepUp, stepwise_mask
from onnx_decompose.errors import OptionError

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from onnx_decompose.analysis.evidence import Evidence

    BoolArray = NDArray[np.bool_]

__all__ = [
    "ENTRY_POINT_GROUP",
    "Criterion",
    "DisplacementTest",
    "FalseDiscoveryRate",
    "FamilywiseError",
    "KSigma",
    "Magnitude",
    "Selection",
    "criterion_names",
    "make_criterion",
]

ENTRY_POINT_GROUP = "onnx_decompose.criteria"
_LOOSEST_SIGMAS = 0.25
_SMALLEST_SHARE = 1e-3


@dataclasses.dataclass(frozen=True, slots=True)
class FalseDiscoveryRate:
    """Benjamini and Hochberg (1995), step-up at level ``alpha``."""

    alpha: float

    @property
    def name(self) -> str:
        """Such as ``fdr(0.01)``."""
        return f"fdr({self.alpha:g})"

    def select(self, evidence: Evidence, *, rng: np.random.Generator) -> Selection:
        """Entries whose p-value is at most ``alpha * k / n``, k being their number."""
        del rng
        return proven(self.name, evidence) or _stepwise(self.name, evidence, StepUp(self.alpha))

    def looser(self) -> FalseDiscoveryRate | None:
        """Four times the level, up to 0.5."""
        level = looser_level(self.alpha)
        return None if level is None else FalseDiscoveryRate(level)


@dataclasses.dataclass(frozen=True, slots=True)
class FamilywiseError:
    """Holm (1979), step-down at level ``alpha``."""

    alpha: float

    @property
    def name(self) -> str:
        """Such as ``fwer(0.01)``."""
        return f"fwer({self.alpha:g})"

    def select(self, evidence: Evidence, *, rng: np.random.Generator) -> Selection:
        """Entries rejected by Holm's procedure."""
        del rng
        return proven(self.name, evidence) or _stepwise(
            self.name, evidence, StepDown(self.alpha)
        )

    def looser(self) -> FamilywiseError | None:
        """Four times the level, up to 0.5."""
        level = looser_level(self.alpha)
        return None if level is None else FamilywiseError(level)


@dataclasses.dataclass(frozen=True, slots=True)
class KSigma:
    """At least ``k`` standard deviations of the null away from its location."""

    k: float

    @property
    def name(self) -> str:
        """Such as ``ksigma(3)``."""
        return f"ksigma({self.k:.4g})"

    def select(self, evidence: Evidence, *, rng: np.random.Generator) -> Selection:
        """One fixed threshold, whatever the number of entries."""
        del rng
        decided = proven(self.name, evidence)
        if decided is not None:
            return decided
        threshold = self.k * evidence.null.std
        flat = scan.flat_view(evidence.values)
        grid = scan.resolution_of(evidence.values)
        mask = scan.beyond(flat, grid.cut(evidence.null.location, threshold))
        estimate = storey_pi0(flat, evidence.null, grid)
        return shaped_selection(self.name, evidence, mask, threshold, estimate)

    def looser(self) -> KSigma | None:
        """Three quarters of the deviations, down to a quarter of one."""
        k = 0.75 * self.k
        return KSigma(k) if k >= _LOOSEST_SIGMAS else None


@dataclasses.dataclass(frozen=True, slots=True)
class DisplacementTest:
    """Movement beyond what the bulk of moved entries shows, Benjamini-Hochberg at ``alpha``.

    Untouched entries are unsupported. Among the others, a displacement without a consistent
    gradient is a random walk, nearly normal; its scale is that of the central bulk, where large
    displacements are set apart from one (see ``empirical``). Where they are not, all that moved
    stays. Without initial weights only exact zeros are unsupported.
    """

    alpha: float

    @property
    def name(self) -> str:
        """Such as ``displacement(0.01)``."""
        return f"displacement({self.alpha:g})"

    def select(self, evidence: Evidence, *, rng: np.random.Generator) -> Selection:
        """A subset of what ``fdr`` keeps on the same evidence."""
        del rng
        certain = proven(self.name, evidence)
        if certain is None or evidence.untouched is None or evidence.source != "snapshot":
            share = 1 - np.count_nonzero(evidence.weight) / max(evidence.weight.size, 1)
            note = "displacement needs the initial weights: only exact zeros are unsupported"
            return Selection(evidence.weight != 0, self.name, None, share, (share, share), note)
        moved = sorted_magnitudes(evidence.values[~evidence.untouched])
        walk = bulk_null(moved)
        note = f"{evidence.note}; displacements: {walk.note}"
        if walk.null is None:
            return dataclasses.replace(certain, criterion=self.name, note=note)
        test = dataclasses.replace(evidence, null=walk.null, untouched=None)
        selection = _stepwise(self.name, test, StepUp(self.alpha))
        return dataclasses.replace(selection, mask=selection.mask & certain.mask, note=note)

    def looser(self) -> DisplacementTest | None:
        """Four times the level, up to 0.5."""
        level = looser_level(self.alpha)
        return None if level is None else DisplacementTest(level)


@dataclasses.dataclass(frozen=True, slots=True)
class Magnitude:
    """Magnitude pruning: the share ``alpha`` of smallest entries is removed, whatever the null.

    Only the ``zero`` null restrains it, as it does every criterion.
    """

    alpha: float

    @property
    def name(self) -> str:
        """Such as ``magnitude(0.5)``."""
        return f"magnitude({self.alpha:g})"

    def select(self, evidence: Evidence, *, rng: np.random.Generator) -> Selection:
        """Ties at the threshold all stay."""
        del rng
        if isinstance(evidence.null, Zero) and evidence.untouched is None:
            decided = proven(self.name, evidence)
            assert decided is not None
            return decided
        magnitudes = np.abs(scan.flat_view(evidence.weight))
        removed = min(int(self.alpha * magnitudes.size), magnitudes.size - 1)
        threshold = float(np.partition(magnitudes, removed)[removed])
        mask = (magnitudes >= threshold) & (magnitudes > 0)
        share = 1 - np.count_nonzero(mask) / mask.size
        mask = scan.shaped_like(mask, evidence.weight)
        return Selection(mask, self.name, threshold, share, (share, share), evidence.note)

    def looser(self) -> Magnitude | None:
        """Half the share, down to a thousandth."""
        return Magnitude(self.alpha / 2) if self.alpha / 2 >= _SMALLEST_SHARE else None


def make_criterion(name: str, alpha: float) -> Criterion:
    """The criterion ``name``, at ``alpha`` or at its own level: ``ksigma:3``, ``fdr:0.1``.

    ``channel:4`` names the number of channels, ``channel`` takes a recurrent weight's gates; the
    level of both is ``alpha``.

    Raises:
        OptionError: an unknown name, or a level that is out of range.
    """
    base, _, argument = name.partition(":")
    factory = _REGISTRY.get(base) or _plug_in(base)
    if factory is None:
        raise OptionError(
            f"criterion {name!r} is unknown; use one of {', '.join(criterion_names())}"
        )
    if not argument:
        return factory(_level(name, alpha))
    try:
        value = float(argument)
    except ValueError as error:
        raise OptionError(f"criterion {name!r}: {argument!r} is not a number") from error
    if base == "ksigma":
        if not (math.isfinite(value) and value > 0):
            raise OptionError(f"criterion {name!r}: the number of deviations must be positive")
        return KSigma(value)
    if base == "channel":
        if not (value.is_integer() and value >= 1):
            raise OptionError(f"criterion {name!r}: give a number of channels, as in channel:4")
        return ChannelEdges(_level(name, alpha), int(value))
    return factory(_level(name, value))


def criterion_names() -> tuple[str, ...]:
    """Every known criterion, plug-ins included."""
    found = importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)
    return tuple(sorted({*_REGISTRY, *(entry.name for entry in found)}))


def _plug_in(name: str) -> Callable[[float], Criterion] | None:
    for entry in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP, name=name):
        factory: Callable[[float], Criterion] = entry.load()
        return factory
    return None


def _level(name: str, alpha: float) -> float:
    if not 0 < alpha < 1:
        raise OptionError(f"criterion {name!r}: level {alpha!r} must lie between 0 and 1")
    return alpha


def _stepwise(name: str, evidence: Evidence, procedure: StepUp | StepDown) -> Selection:
    flat = scan.flat_view(evidence.values)
    grid = scan.resolution_of(evidence.values)
    mask, threshold, estimate = stepwise_mask(flat, evidence.null, grid, procedure)
    return shaped_selection(name, evidence, mask, threshold, estimate)


def _ksigma(alpha: float) -> KSigma:
    return KSigma(-float(special.ndtri(alpha / 2)))


_REGISTRY: dict[str, Callable[[float], Criterion]] = {
    "fdr": FalseDiscoveryRate,
    "fwer": FamilywiseError,
    "ksigma": _ksigma,
    "displacement": DisplacementTest,
    "group": Groups,
    "channel": ChannelEdges,
    "shared": lambda _: Shared(),
    "magnitude": Magnitude,
}
