"""What a plan knows of a region, and what it is made of: axes of units, supported masks, branches."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from onnx_decompose.analysis.structure import Edge
    from onnx_decompose.stacks import StackLayout

    IntArray = NDArray[np.intp]

__all__ = ["Branch", "Decision", "Emit", "StateGraph", "everything"]

Emit = Literal["auto", "split", "shrink", "grouped", "triangular", "shared"]
Decision = Literal["dense", "shrink", "split", "grouped", "triangular", "shared"]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class StateGraph:
    """What the plan knows of a region.

    Attributes:
        axis_sizes: units of each axis.
        edges: one per site, in graph order.
        elementwise: axis of each elementwise node, but for the ``fused`` ones.
        entries: axis of each value that comes in.
        exits: axis of each value that goes out.
        itemsize: bytes per element.
        free: axes of the border whose units may be renumbered outside, so that branches find theirs side by side.
        fused: axis of each elementwise node that a runtime takes into the product before it: bias and activation.
        layouts: in which stacks of equal blocks can be written.
        unpadded: axes on which blocks cannot be padded.
        unstacked: why there are no layouts.
        taps: per edge, entries of the weight; none where each has one.
        positions: per axis, positions that each value has for a row of the cost model, where units are channels; none
            where they are the last axis.
    """

    axis_sizes: tuple[int, ...]
    edges: tuple[Edge, ...]
    elementwise: tuple[int, ...]
    entries: tuple[int, ...]
    exits: tuple[int, ...]
    itemsize: int
    free: frozenset[int] = frozenset()
    fused: tuple[int, ...] = ()
    layouts: frozenset[StackLayout] = frozenset()
    unpadded: frozenset[int] = frozenset()
    unstacked: str = ""
    taps: tuple[int, ...] = ()
    positions: tuple[int, ...] = ()

    @property
    def has_channels(self) -> bool:
        """Whether the units are channels, before the positions, and not the last axis."""
        return bool(self.positions)


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Branch:
    """The units that one branch computes: per axis, unit numbers in the order of their places, never empty.

    Branches share no unit, but for the decision ``triangular``: there they may read the same units of an entry axis.
    """

    units: tuple[IntArray, ...]


def everything(graph: StateGraph) -> Branch:
    """The dense region as one branch."""
    return Branch(tuple(np.arange(size, dtype=np.intp) for size in graph.axis_sizes))
