"""What a criterion is, what it decides, and the decisions that need no statistics."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from onnx_decompose.analysis import scan
from onnx_decompose.analysis.null import Zero
from onnx_decompose.analysis.packed import packs

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from onnx_decompose.analysis.evidence import Evidence
    from onnx_decompose.analysis.pi0 import Pi0

    BoolArray = NDArray[np.bool_]

__all__ = [
    "Criterion",
    "Selection",
    "SharedLines",
    "looser_level",
    "proven",
    "shaped_selection",
]

_LOOSER_STEP = 4.0
_LOOSEST_LEVEL = 0.5


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class SharedLines:
    """Rows or columns of one weight that are indistinguishable from each other.

    Attributes:
        axis: 0 for rows (inputs), 1 for columns (outputs).
        members: ascending indices along ``axis``.
        representative: the vector that stands for all of them.
        deviation: largest absolute difference of any member's entry from the representative.
    """

    axis: int
    members: NDArray[np.intp]
    representative: NDArray[np.floating[Any]]
    deviation: float


@packs("mask")
@dataclasses.dataclass(frozen=True, eq=False)
class Selection:
    """What a criterion decided for one weight.

    Attributes:
        mask: (K, N) True where the entry is supported; kept as bits.
        criterion: name and level, such as ``fdr(0.01)``.
        threshold: deviation from the null's location from which on an entry is supported; None
            where no single number says it.
        pi0: estimated share of null entries.
        pi0_interval: its 95 % confidence interval.
        note: what a reader of the report should know.
        shared: groups of rows or columns that are indistinguishable from each other; their
            entries stay supported.
    """

    mask: BoolArray
    criterion: str
    threshold: float | None
    pi0: float
    pi0_interval: tuple[float, float]
    note: str = ""
    shared: tuple[SharedLines, ...] = ()


class Criterion(Protocol):
    """A rule that decides which entries are supported."""

    @property
    def name(self) -> str:
        """Name and level, as the report shows it."""
        ...

    def select(self, evidence: Evidence, *, rng: np.random.Generator) -> Selection:
        """Decide for one weight; a function of the evidence and of ``rng`` alone."""
        ...

    def looser(self) -> Criterion | None:
        """The next level of the annealing schedule, which removes less; None at the end."""
        ...


def looser_level(alpha: float) -> float | None:
    """The next level of the schedule: four times ``alpha``, at most 0.5; None after that."""
    return min(_LOOSER_STEP * alpha, _LOOSEST_LEVEL) if alpha < _LOOSEST_LEVEL else None


def proven(name: str, evidence: Evidence) -> Selection | None:
    """The mask where nothing is left to estimate: proven untouched entries, or exact zeros."""
    if evidence.untouched is not None:
        mask = ~evidence.untouched & (evidence.weight != 0)
        share = 1.0 - np.count_nonzero(~evidence.untouched) / max(mask.size, 1)
    elif isinstance(evidence.null, Zero):
        mask = evidence.weight != 0
        share = 1.0 - np.count_nonzero(mask) / max(mask.size, 1)
    else:
        return None
    return Selection(mask, name, None, share, (share, share), evidence.note)


def shaped_selection(
    name: str, evidence: Evidence, flat_mask: BoolArray, threshold: float | None, estimate: Pi0
) -> Selection:
    """The selection of a mask over ``scan.flat_view(evidence.values)``."""
    mask = scan.shaped_like(flat_mask, evidence.values)
    if evidence.values is not evidence.weight or evidence.null.location != 0:
        mask &= (
            evidence.weight != 0
        )  # an exact zero is no edge, however unlikely under the null
    return Selection(mask, name, threshold, estimate.value, estimate.interval, evidence.note)
