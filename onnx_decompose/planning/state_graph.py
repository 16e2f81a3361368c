"""What a plan knows of a region, and what it is made of: axes of units, supported masks, branches."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from onnx_decompose.analysis.structure import Edge
    from onnx_decompose.planning.stacks import StackLayout

    IntArray = NDArray[np.intp]

__all__ = ["Branch", "Decision", "Emit", "StateGraph", "everything", "is_cascade"]

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
        inner: axis of each value made inside that sites read.
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
    inner: tuple[int, ...] = ()
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
    """What one branch does.

    Branches share no unit, but for the decision ``triangular``: there they may have the same units of an axis that only
    comes in, and their sites may read units that other branches compute.

    Attributes:
        units: per axis, the numbers of the units that it computes, in the order of their places, never empty.
        read: per axis, the numbers of those that its sites read, where they are others on some axis: units that follow
            each other when those of all branches are put side by side.
    """

    units: tuple[IntArray, ...]
    read: tuple[IntArray, ...] = ()

    def inputs(self, axis: int) -> IntArray:
        """The units that the branch's sites read from an axis."""
        return self.read[axis] if self.read else self.units[axis]

    def reads_others(self, axis: int) -> bool:
        """Whether its sites read units of an axis that other branches compute."""
        return bool(self.read) and not np.array_equal(self.read[axis], self.units[axis])


def is_cascade(branches: Sequence[Branch], axis: int) -> bool:
    """Whether some branch reads units of an axis that another one computes."""
    return any(branch.reads_others(axis) for branch in branches)


def everything(graph: StateGraph) -> Branch:
    """The dense region as one branch."""
    return Branch(tuple(np.arange(size, dtype=np.intp) for size in graph.axis_sizes))
