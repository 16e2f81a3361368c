"""Ways of writing a region that are worth comparing; every one of them is exact.

Branches from components, merged two by two; the same in stacks; groups of a single site's outputs that read
overlapping inputs; and runs of a whole region's units that read each other's.
"""

from __future__ import annotations

import dataclasses
import heapq
from typing import TYPE_CHECKING

import numpy as np

from onnx_decompose.analysis.cascades import States, find_cascades
from onnx_decompose.analysis.covers import find_covers
from onnx_decompose.analysis.structure import ISOLATED, Components
from onnx_decompose.planning.region_cost import WORTH, predicted_seconds
from onnx_decompose.planning.stacks import Grouping, groupings
from onnx_decompose.planning.state_graph import Branch, everything

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from onnx_decompose.planning.cost import CostModel
    from onnx_decompose.planning.state_graph import Decision, Emit, StateGraph

    FloatArray = NDArray[np.float64]
    IntArray = NDArray[np.intp]

__all__ = ["GENERATORS", "Candidate"]

_MOST_BRANCHES = 64
"""Branches that are still compared by cost: more never pay for their kernels, and components may be thousands."""


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Candidate:
    """One way to write a region.

    Attributes:
        decision: how.
        branches: into what.
        found: what the branches are, for the reason.
        grouping: their stacks.
    """

    decision: Decision
    branches: tuple[Branch, ...]
    found: str
    grouping: Grouping | None = None

    @property
    def picks(self) -> bool:
        """Whether scattered units may be taken by an operator that not every runtime has: where much is exchanged."""
        return self.decision == "triangular"


def _merged_components(
    graph: StateGraph, components: Components, cost: CostModel, emit: Emit
) -> Iterator[Candidate]:
    """``split`` and ``shrink``: branches without a common unit."""
    del cost
    if emit in {"grouped", "triangular", "shared"}:
        return
    for branches in _groupings(graph, components, emit):
        count = len(branches)
        if count == 1 and _kept(branches[0]) == sum(graph.axis_sizes):
            continue  # this is the dense region
        decision: Decision = "split" if count > 1 else "shrink"
        yield Candidate(decision, branches, f"{count} branch{'es' if count > 1 else ''}")


def _stacked(
    graph: StateGraph, components: Components, cost: CostModel, emit: Emit
) -> Iterator[Candidate]:
    """``grouped``: branches in stacks of one size."""
    del cost
    if emit not in {"auto", "grouped"} or not graph.layouts:
        return
    products = [(edge.source, edge.target) for edge in graph.edges]
    for branches in _groupings(graph, components, emit):
        if len(branches) == 1:
            continue
        sizes = np.array([[units.size for units in branch.units] for branch in branches])
        for layout in sorted(graph.layouts):
            for order, grouping in groupings(sizes, products, layout):
                if not graph.unpadded.intersection(_padded_axes(sizes[order], grouping)):
                    ordered = tuple(branches[number] for number in order)
                    found = _stacks_found(graph, grouping, sizes)
                    yield Candidate("grouped", ordered, found, grouping)


def _covers(
    graph: StateGraph, components: Components, cost: CostModel, emit: Emit
) -> Iterator[Candidate]:
    """``triangular``: groups of a single site's outputs, each with its own slice of the inputs."""
    del components
    if emit not in {"auto", "triangular"} or not _has_cover(graph):
        return
    (edge,) = graph.edges
    covers = find_covers(
        edge.mask,
        _group_price(graph, cost),
        least_groups=1 if emit == "auto" else 2,
        most_groups=_MOST_BRANCHES,
    )
    for cover in covers:
        sides = {edge.source: cover.inputs, edge.target: cover.outputs}
        branches = tuple(
            Branch((sides[0][group], sides[1][group])) for group in range(len(cover.inputs))
        )
        share = cover.entries / edge.mask.size
        yield Candidate(
            "triangular",
            branches,
            f"{cover.found}: {len(branches)} groups of outputs read {share:.0%} of the entries",
        )


def _cascades(
    graph: StateGraph, components: Components, cost: CostModel, emit: Emit
) -> Iterator[Candidate]:
    """``triangular``: runs of a region's units, whose sites read their own units and those of other runs.

    Where no component has most of the units, components are what to cut by.
    """
    if emit not in {"auto", "triangular"} or graph.has_channels:
        return
    if components.sizes.max() * 2 <= sum(graph.axis_sizes):
        return
    stored = sum(edge.mask.size for edge in graph.edges)
    supported = sum(int(np.count_nonzero(edge.mask)) for edge in graph.edges)
    if emit == "auto" and supported > WORTH * stored:
        return  # every supported entry is read: nothing to gain, and dense weights take long to look at
    for cascade in find_cascades(
        States(graph.axis_sizes, graph.edges, set(graph.entries), set(graph.exits)),
        _run_price(graph, cost),
        least_runs=1 if emit == "auto" else 2,
        most_runs=_MOST_BRANCHES,
    ):
        branches = tuple(map(Branch, cascade.owned, cascade.read))
        entries = cascade.entries(graph.edges)
        yield Candidate(
            "triangular",
            branches,
            f"{cascade.found}: {len(branches)} groups of units read {entries / stored:.0%} of the entries",
        )


GENERATORS: tuple[
    Callable[[StateGraph, Components, CostModel, Emit], Iterator[Candidate]], ...
] = (_merged_components, _stacked, _covers, _cascades)
"""Where candidates come from: (live graph, components, cost, emit) -> those that ``emit`` allows."""


def _has_cover(graph: StateGraph) -> bool:
    """Whether branches may overlap: on the entry axis of a single site, which is cut and never put together."""
    if len(graph.edges) != 1 or len(graph.axis_sizes) != 2:
        return False
    (edge,) = graph.edges
    return edge.source != edge.target and edge.source not in graph.exits


def _kept(branch: Branch) -> int:
    return sum(units.size for units in branch.units)


def _padded_axes(sizes: IntArray, grouping: Grouping) -> IntArray:
    """Axes on which not every block, (blocks, axes) in the order of the stacks, is full."""
    counts = [stack.count for stack in grouping.stacks]
    full = np.repeat([stack.sizes for stack in grouping.stacks], counts, axis=0)
    return np.flatnonzero((sizes != full).any(axis=0))


def _stacks_found(graph: StateGraph, grouping: Grouping, sizes: IntArray) -> str:
    """The stacks in words."""
    products = [(edge.source, edge.target) for edge in graph.edges]
    needed = sum(
        int((sizes[:, source] * sizes[:, target]).sum()) for source, target in products
    )
    stored = sum(grouping.entries(source, target) for source, target in products)
    count = len(grouping.stacks)
    padding = f", {stored / needed - 1:.0%} padding" if stored > needed else ""
    stacks = f"{count} stack{'s' if count > 1 else ''} in {grouping.layout}"
    return f"{len(sizes)} branches in {stacks}{padding}"


def _group_price(graph: StateGraph, cost: CostModel) -> Callable[..., FloatArray]:
    """A group's share of the dense region's time, averaged over the cost model's batches (``covers.Price``)."""
    (edge,) = graph.edges
    dense = predicted_seconds(graph, (everything(graph),), cost)
    size = graph.axis_sizes[edge.source]
    cuts = graph.entries.count(edge.source)
    (taps,) = graph.taps or (1,)
    positions = graph.positions[edge.target] if graph.has_channels else 1

    def price(inputs: FloatArray, outputs: FloatArray, *, gathered: bool) -> FloatArray:
        total = np.zeros_like(inputs)
        for samples, whole in zip(cost.batches, dense, strict=True):
            rows = samples * positions
            runs = graph.has_channels or not gathered
            cut = (cost.copy if runs else cost.pick)(rows, inputs, graph.itemsize)
            seconds = cost.matmul(rows, taps * inputs, outputs, graph.itemsize)
            seconds += cuts * np.where(inputs == size, 0.0, cut)
            for axis in graph.elementwise:
                units = inputs if axis == edge.source else outputs
                seconds += cost.elementwise(rows, units, graph.itemsize)
            total += seconds / whole
        return total / len(cost.batches)

    return price


def _run_price(graph: StateGraph, cost: CostModel) -> Callable[..., FloatArray]:
    """A run's share of the dense region's time, averaged over the cost model's batches (``cascades.RunPrice``)."""
    dense = predicted_seconds(graph, (everything(graph),), cost)

    def price(
        owned: Sequence[FloatArray],
        read: Sequence[FloatArray],
        apart: Sequence[NDArray[np.bool_]],
    ) -> FloatArray:
        total = np.zeros_like(owned[0])
        for rows, whole in zip(cost.batches, dense, strict=True):
            for edge in graph.edges:
                inputs, outputs = read[edge.source], owned[edge.target]
                total += cost.matmul(rows, inputs, outputs, graph.itemsize) / whole
            for axis in graph.elementwise:
                total += cost.elementwise(rows, owned[axis], graph.itemsize) / whole
            for axis in (*graph.entries, *graph.inner):
                taken = cost.copy(rows, read[axis], graph.itemsize) / whole
                total += np.where(apart[axis], taken, 0.0)
        return total / len(cost.batches)

    return price


def _groupings(
    graph: StateGraph, components: Components, emit: Emit
) -> Iterator[tuple[Branch, ...]]:
    """Candidate branches: the components, then merged two by two, the smallest first, down to one.

    ``split`` stops at the components, and ``shrink`` begins at one branch.
    """
    sizes = components.sizes
    heap = [(int(sizes[group].sum()), group) for group in _complete_groups(components)]
    heapq.heapify(heap)
    most = {"split": components.count, "shrink": 1}.get(emit, _MOST_BRANCHES)
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
