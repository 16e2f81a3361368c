"""The plan: into which branches a region is rewritten, decided by predicted cost, with a reason.

Works on the region's state graph alone: axes, supported masks, how often each axis is touched. Every way of
grouping components into branches is exact; the plan only chooses the fast one.
"""

from __future__ import annotations

import dataclasses
import heapq
from typing import TYPE_CHECKING, Literal

import numpy as np

from onnx_decompose.analysis.packed import packs
from onnx_decompose.analysis.structure import (
    ISOLATED,
    Components,
    Edge,
    live_units,
    state_components,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from onnx_decompose.cost import CostModel

    IntArray = NDArray[np.intp]

__all__ = ["Branch", "Decision", "Emit", "RegionPlan", "StateGraph", "layout_of", "plan_region"]

Emit = Literal["auto", "split", "shrink"]
Decision = Literal["dense", "shrink", "split"]

_WORTH = 0.97
"""Predicted cost, relative to dense, above which a rewrite is not tried."""

_MOST_BRANCHES = 64
"""Branches that are still compared by cost: more never pay for their kernels, and components may be thousands."""


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class StateGraph:
    """What the plan knows of a region.

    Attributes:
        axis_sizes: units of each axis.
        edges: one per site, in graph order.
        elementwise: axis of each elementwise node.
        entries: axis of each value that comes in.
        exits: axis of each value that goes out.
        itemsize: bytes per element.
    """

    axis_sizes: tuple[int, ...]
    edges: tuple[Edge, ...]
    elementwise: tuple[int, ...]
    entries: tuple[int, ...]
    exits: tuple[int, ...]
    itemsize: int


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Branch:
    """The units that one branch computes: per axis, ascending unit numbers, never empty."""

    units: tuple[IntArray, ...]


@packs("masks")
@dataclasses.dataclass(frozen=True, eq=False)
class RegionPlan:
    """What happens to one region.

    Attributes:
        decision: ``dense`` (left alone), ``shrink`` (one narrower branch) or ``split`` (several branches).
        reason: why, with figures, for the report.
        components: of the region's live state graph.
        masks: per edge, the supported entries that lead to an exit, (K, N); kept as bits.
        branches: none where the decision is ``dense``.
        relative_cost: predicted cost over dense, geometric mean over batches.
    """

    decision: Decision
    reason: str
    components: Components
    masks: tuple[NDArray[np.bool_], ...]
    branches: tuple[Branch, ...] = ()
    relative_cost: float = 1.0


Layout = Literal["whole", "runs", "scattered"]
"""How the branches' units lie on an axis: contiguous runs of all units, contiguous runs of some, or anyhow."""


def plan_region(graph: StateGraph, cost: CostModel, emit: Emit = "auto") -> RegionPlan:
    """Choose the branches of a region.

    Args:
        graph: the region's state graph with supported masks.
        cost: the provider's coefficients.
        emit: ``auto`` chooses by cost; ``split`` asks for one branch per component; ``shrink`` for a single one.
    """
    _, needed = live_units(graph.axis_sizes, graph.edges, set(graph.entries), set(graph.exits))
    live = tuple(
        edge
        if needed[edge.target].all()
        else dataclasses.replace(edge, mask=edge.mask & needed[edge.target])
        for edge in graph.edges
    )
    components = state_components(graph.axis_sizes, live)
    masks = tuple(edge.mask for edge in live)
    whole = sum(graph.axis_sizes)
    if components.count == 0:
        return RegionPlan(
            "dense",
            "no entry is supported: the region's outputs are constant",
            components,
            masks,
        )
    dense_cost = _costs(graph, (_everything(graph),), cost)
    candidates: list[tuple[float, tuple[Branch, ...]]] = []
    for branches in _groupings(graph, components, emit):
        if len(branches) == 1 and _kept(branches[0]) == whole:
            continue  # this is the dense region
        relative = float(np.exp(np.mean(np.log(_costs(graph, branches, cost) / dense_cost))))
        candidates.append((relative, branches))
    giant = int(components.sizes.max())
    found = (
        f"{components.count} component{'s' if components.count > 1 else ''} over {whole} nodes, the largest with "
        f"{giant} ({giant / whole:.0%}), {components.isolated} isolated"
    )
    if not candidates:
        alone = components.count == 1
        why = "nothing to take apart" if alone else "not two of them have units on every axis"
        return RegionPlan("dense", f"{found}; {why}", components, masks)
    relative, best = min(candidates, key=lambda candidate: candidate[0])
    if relative > _WORTH and emit == "auto":
        return RegionPlan(
            "dense",
            f"{found}; the best rewrite is predicted to take {relative:.2f} of the time",
            components,
            masks,
        )
    decision: Decision = "split" if len(best) > 1 else "shrink"
    reason = f"{found}; {len(best)} branch{'es' if len(best) > 1 else ''}, predicted to take {relative:.2f} of the time"
    return RegionPlan(decision, reason, components, masks, best, relative)


def layout_of(branches: tuple[Branch, ...], axis: int, size: int) -> Layout:
    """How the units of ``axis`` lie."""
    runs = [branch.units[axis] for branch in branches]
    if any(run[-1] - run[0] + 1 != run.size for run in runs):
        return "scattered"
    return "whole" if sum(run.size for run in runs) == size else "runs"


def _everything(graph: StateGraph) -> Branch:
    return Branch(tuple(np.arange(size, dtype=np.intp) for size in graph.axis_sizes))


def _kept(branch: Branch) -> int:
    return sum(units.size for units in branch.units)


def _groupings(
    graph: StateGraph, components: Components, emit: Emit
) -> Iterator[tuple[Branch, ...]]:
    """Candidate branches: the components, then merged two by two, the smallest first, down to one.

    ``split`` stops at the components, and ``shrink`` begins at one branch.
    """
    sizes = components.sizes
    heap = [(int(sizes[group].sum()), group) for group in _complete_groups(components)]
    heapq.heapify(heap)
    most = {"split": components.count, "auto": _MOST_BRANCHES, "shrink": 1}[emit]
    while True:
        if len(heap) <= most:
            groups = sorted(group for _, group in heap)
            for stretch in (False, True):
                yield _branches(graph, components, groups, stretch=stretch)
            if emit == "split" or len(heap) == 1:
                return
        (size, first), (other_size, second) = heapq.heappop(heap), heapq.heappop(heap)
        heapq.heappush(heap, (size + other_size, sorted(first + second)))


def _complete_groups(components: Components) -> list[list[int]]:
    """Components grouped so that every group has a unit on every axis that has any."""
    present = np.stack(
        [
            np.bincount(axis[axis != ISOLATED], minlength=components.count) > 0
            for axis in components.labels
        ]
    )
    complete = present.all(axis=0)
    groups = [[int(c)] for c in np.flatnonzero(complete)]
    partial = [int(c) for c in np.flatnonzero(~complete)]
    if not groups:
        return [partial]
    groups[-1].extend(partial)
    return groups


def _branches(
    graph: StateGraph, components: Components, groups: list[list[int]], *, stretch: bool
) -> tuple[Branch, ...]:
    """Branches from groups of components.

    Args:
        graph: the region.
        components: of its live state graph.
        groups: component numbers of each branch.
        stretch: give isolated inputs to the branch before them, so that an axis of the entries is cut into runs
            instead of being gathered. Isolated outputs are constants that some branch has to make in any case.
    """
    branch_of = np.full(components.count, ISOLATED, dtype=np.intp)
    for number, group in enumerate(groups):
        branch_of[group] = number
    border = set(graph.exits) | (set(graph.entries) if stretch else set())
    per_axis: list[IntArray] = []
    for axis, labels in enumerate(components.labels):
        owner = np.where(labels == ISOLATED, ISOLATED, branch_of[labels])
        # A branch has a unit on every axis, also on one where no unit is live.
        if axis in border or (owner == ISOLATED).all():
            owner = _filled(owner)
        per_axis.append(owner)
    return tuple(
        Branch(tuple(np.flatnonzero(owner == number) for owner in per_axis))
        for number in range(len(groups))
    )


def _filled(owner: IntArray) -> IntArray:
    """``owner`` with every unowned unit given to the owner before it (the first ones to the owner after them)."""
    owned = np.flatnonzero(owner != ISOLATED)
    if owned.size == 0:
        return np.zeros_like(owner)
    last = np.maximum(np.searchsorted(owned, np.arange(owner.size), side="right") - 1, 0)
    return owner[owned[last]]


def _costs(
    graph: StateGraph, branches: tuple[Branch, ...], cost: CostModel
) -> NDArray[np.float64]:
    """Predicted seconds at each of the cost model's batches."""
    return np.array([_seconds(graph, branches, cost, rows) for rows in cost.batches])


def _seconds(
    graph: StateGraph, branches: tuple[Branch, ...], cost: CostModel, rows: int
) -> float:
    total = 0.0
    for branch in branches:
        sizes = [units.size for units in branch.units]
        for edge in graph.edges:
            total += cost.matmul(rows, sizes[edge.source], sizes[edge.target], graph.itemsize)
        for axis in graph.elementwise:
            total += cost.copy(rows, sizes[axis], graph.itemsize)
    for axis in (*graph.entries, *graph.exits):
        total += _border_seconds(graph, branches, axis, cost, rows)
    return total


def _border_seconds(
    graph: StateGraph, branches: tuple[Branch, ...], axis: int, cost: CostModel, rows: int
) -> float:
    """Seconds to cut one value into branches, or to put it together again."""
    layout = layout_of(branches, axis, graph.axis_sizes[axis])
    kept = sum(branch.units[axis].size for branch in branches)
    if layout == "scattered":
        gathers = len(branches) * cost.kernel - cost.kernel
        return gathers + cost.gather(rows, kept, graph.itemsize)
    if layout == "whole" and len(branches) == 1:
        return 0.0
    return cost.copy(rows, kept, graph.itemsize)
