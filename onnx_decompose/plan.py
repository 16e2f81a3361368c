"""The plan: into which branches a region is rewritten, decided by predicted cost, with a reason.

Works on the region's state graph alone: axes, supported masks, how often each axis is touched. Every way of
grouping components into branches is exact; the plan only chooses the fast one.
"""

from __future__ import annotations

import collections
import dataclasses
import heapq
from typing import TYPE_CHECKING, Literal

import numpy as np

from onnx_decompose.analysis.covers import find_covers
from onnx_decompose.analysis.packed import packs
from onnx_decompose.analysis.structure import (
    ISOLATED,
    Components,
    Edge,
    live_units,
    state_components,
)
from onnx_decompose.stacks import Border, Grouping, StackLayout, StackWork, groupings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from onnx_decompose.copies import Copies
    from onnx_decompose.cost import CostModel

    FloatArray = NDArray[np.float64]
    IntArray = NDArray[np.intp]

__all__ = [
    "Branch",
    "Decision",
    "Emit",
    "RegionPlan",
    "StateGraph",
    "candidate_plans",
    "common_order",
    "gathered_order",
    "layout_of",
    "plan_region",
    "plan_shared",
]

Emit = Literal["auto", "split", "shrink", "grouped", "triangular", "shared"]
Decision = Literal["dense", "shrink", "split", "grouped", "triangular", "shared"]

_WORTH = 0.97
"""Predicted cost, relative to dense, above which a rewrite is not tried."""

_MOST_BRANCHES = 64
"""Branches that are still compared by cost: more never pay for their kernels, and components may be thousands."""

_MOST_PLANS = 8
"""Plans of one decision that are worth being timed: each holds the masks."""


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


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Branch:
    """The units that one branch computes: per axis, unit numbers in the order of their places, never empty.

    Branches share no unit, but for the decision ``triangular``: there they may read the same units of an entry axis.
    """

    units: tuple[IntArray, ...]


@packs("masks")
@dataclasses.dataclass(frozen=True, eq=False)
class RegionPlan:
    """What happens to one region.

    Attributes:
        decision: ``dense`` (left alone), ``shrink`` (one narrower branch), ``split`` (several branches),
            ``grouped`` (several branches, in stacks),
            ``triangular`` (several branches that may read the same inputs) or ``shared`` (equal rows and columns
            computed once).
        reason: why, with figures, for the report.
        components: of the region's live state graph.
        masks: per edge, the supported entries that lead to an exit, (K, N); kept as bits.
        branches: none where the decision is ``dense``; the computed units where it is ``shared``.
        relative_cost: predicted cost over dense, geometric mean over batches.
        places: axis -> where each unit stands in the values of that axis outside, where they were renumbered.
        copies: what the computed units stand for; None unless the decision is ``shared``.
        grouping: the stacks where the decision is ``grouped``; branches are in their order.
    """

    decision: Decision
    reason: str
    components: Components
    masks: tuple[NDArray[np.bool_], ...]
    branches: tuple[Branch, ...] = ()
    relative_cost: float = 1.0
    places: Mapping[int, IntArray] = dataclasses.field(default_factory=dict)
    copies: Copies | None = None
    grouping: Grouping | None = None

    def order(self, axis: int, size: int) -> IntArray:
        """The unit at each place of a value of the border, ``size`` of them."""
        place = self.places.get(axis)
        return np.arange(size, dtype=np.intp) if place is None else np.argsort(place)

    def entries(self, source: int, target: int) -> int:
        """Entries that a weight from one axis to another stores after the rewrite."""
        if self.grouping is not None:
            return self.grouping.entries(source, target)
        return sum(
            branch.units[source].size * branch.units[target].size for branch in self.branches
        )

    def positions(self, axis: int) -> list[IntArray]:
        """Where each branch's units stand in a value of the border, ascending."""
        place = self.places.get(axis)
        units = [branch.units[axis] for branch in self.branches]
        return units if place is None else [place[part] for part in units]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _Candidate:
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


Layout = Literal["whole", "runs", "scattered"]
"""How the branches' units lie on an axis: runs that are all units in turn, other contiguous runs, or anyhow."""


def plan_region(graph: StateGraph, cost: CostModel, emit: Emit = "auto") -> RegionPlan:
    """Choose the branches of a region.

    Args:
        graph: the region's state graph with supported masks.
        cost: the provider's coefficients.
        emit: ``auto`` chooses by cost; ``split`` asks for one branch per component; ``shrink`` for a single one;
            ``grouped`` for stacks; ``triangular`` for groups of outputs with the inputs that each reads; ``shared``
            for none (see :func:`plan_shared`).
    """
    graph, components = _live(graph)
    masks = tuple(edge.mask for edge in graph.edges)
    if components.count == 0:
        return RegionPlan(
            "dense",
            "no entry is supported: the region's outputs are constant",
            components,
            masks,
        )
    found = _description(graph, components)
    candidates = _ranked(graph, components, cost, emit)
    if not candidates:
        why = _why_none(graph, components, emit)
        return RegionPlan("dense", f"{found}; {why}", components, masks)
    relative, best = candidates[0]
    if relative > _WORTH and emit == "auto":
        return RegionPlan(
            "dense",
            f"{found}; the best rewrite is predicted to take {relative:.2f} of the time",
            components,
            masks,
        )
    return _plan_of(graph, components, relative, best)


def candidate_plans(
    graph: StateGraph, cost: CostModel, emit: Emit = "auto"
) -> tuple[RegionPlan, ...]:
    """The best few ways of rewriting a region by each decision, by predicted cost; arguments as of :func:`plan_region`.

    None of them is dense, and they are given even where none is predicted to pay.
    """
    graph, components = _live(graph)
    if components.count == 0:
        return ()
    seen: collections.Counter[Decision] = collections.Counter()
    plans: list[RegionPlan] = []
    for relative, candidate in _ranked(graph, components, cost, emit):
        seen[candidate.decision] += 1
        if seen[candidate.decision] <= _MOST_PLANS:
            plans.append(_plan_of(graph, components, relative, candidate))
    return tuple(plans)


def plan_shared(
    graph: StateGraph, other: RegionPlan, copies: Copies, cost: CostModel, emit: Emit = "auto"
) -> RegionPlan:
    """Compute equal rows and columns once, if that beats another plan.

    Args:
        graph: the state graph of a region with one site, from one axis to another.
        other: the plan to beat.
        copies: equal rows and columns of the annealed weight.
        cost: the provider's coefficients.
        emit: ``auto`` chooses by cost; ``shared`` takes the copies in any case.
    """
    (edge,) = graph.edges
    dense = _costs(graph, (_everything(graph),), cost)
    copies = dataclasses.replace(copies, picks=cost.picks(graph.itemsize))
    candidates = [
        (float(np.exp(np.mean(np.log(_shared_costs(graph, variant, cost) / dense)))), variant)
        for variant in copies.variants()
    ]
    relative, best = min(candidates, key=lambda candidate: candidate[0])
    rows, columns = best.computed
    found = (
        f"{rows.size} different rows of {best.inputs.size} and {columns.size} different columns "
        f"of {best.outputs.size}, predicted to take {relative:.2f} of the time"
    )
    if emit == "auto" and relative > min(_WORTH, other.relative_cost):
        return dataclasses.replace(other, reason=f"{other.reason}; {found}")
    kept = best.kept if edge.source < edge.target else best.kept[::-1]
    return RegionPlan(
        "shared",
        found,
        other.components,
        other.masks,
        (Branch(kept),),
        relative,
        copies=best,
    )


def _live(graph: StateGraph) -> tuple[StateGraph, Components]:
    """The region with the supported entries that lead to an exit only, and the components that they make."""
    _, needed = live_units(graph.axis_sizes, graph.edges, set(graph.entries), set(graph.exits))
    edges = tuple(
        edge
        if needed[edge.target].all()
        else dataclasses.replace(edge, mask=edge.mask & needed[edge.target])
        for edge in graph.edges
    )
    live = dataclasses.replace(graph, edges=edges)
    return live, state_components(graph.axis_sizes, edges)


def _ranked(
    graph: StateGraph, components: Components, cost: CostModel, emit: Emit
) -> list[tuple[float, _Candidate]]:
    """The candidates of a live region and their predicted costs, the lowest first."""
    dense_cost = _costs(graph, (_everything(graph),), cost)
    ranked: list[tuple[float, _Candidate]] = []
    for generate in _GENERATORS:
        for candidate in generate(graph, components, cost, emit):
            if ranked and _same(ranked[-1][1], candidate):
                continue  # stretching changed nothing
            costs = _costs(graph, candidate.branches, cost, candidate.grouping)
            ranked.append((_relative(costs, dense_cost), candidate))
    return sorted(ranked, key=lambda item: item[0])


def _plan_of(
    graph: StateGraph, components: Components, relative: float, candidate: _Candidate
) -> RegionPlan:
    found = f"{_description(graph, components)}; {candidate.found}"
    return RegionPlan(
        candidate.decision,
        f"{found}, predicted to take {relative:.2f} of the time",
        components,
        tuple(edge.mask for edge in graph.edges),
        candidate.branches,
        relative,
        grouping=candidate.grouping,
    )


def _same(some: _Candidate, other: _Candidate) -> bool:
    if some.grouping != other.grouping or len(some.branches) != len(other.branches):
        return False
    return all(
        np.array_equal(mine, theirs)
        for branch, counterpart in zip(some.branches, other.branches, strict=True)
        for mine, theirs in zip(branch.units, counterpart.units, strict=True)
    )


def layout_of(positions: Sequence[IntArray], size: int) -> Layout:
    """How the branches' units, at ascending ``positions`` of an axis of ``size``, lie."""
    if not all(map(_is_run, positions)):
        return "scattered"
    runs = sorted(positions, key=lambda run: int(run[0]))
    starts = [0, *(int(run[-1]) + 1 for run in runs)]
    in_turn = all(run[0] == start for run, start in zip(runs, starts, strict=False))
    return "whole" if in_turn and starts[-1] == size else "runs"


def common_order(positions: Sequence[IntArray]) -> IntArray | None:
    """An order of scattered positions in which every branch has a contiguous run; None where none is known."""
    if all(map(_is_run, positions)):
        return None
    units = np.concatenate(positions)
    distinct = np.unique(units)
    place = np.searchsorted(distinct, units)
    sizes = np.array([run.size for run in positions])
    # Bands follow each other in the branches' order, nested sets in that of their sizes.
    for turns in (np.arange(sizes.size), np.argsort(np.argsort(sizes, kind="stable"))):
        reader = np.repeat(turns, sizes)
        first = np.full(distinct.size, sizes.size)
        last = np.full(distinct.size, -1)
        np.minimum.at(first, place, reader)
        np.maximum.at(last, place, reader)
        order = np.lexsort((distinct, last, first))
        position = np.argsort(order)
        if all(_is_run(np.sort(position[np.searchsorted(distinct, run)])) for run in positions):
            return distinct[order]
    return None


def gathered_order(positions: Sequence[IntArray]) -> IntArray | None:
    """The common order, where gathering all units once and cutting that into runs is worth it.

    It is not where branches overlap little: a run is copied only about twice as fast as it is gathered.
    """
    read = sum(run.size for run in positions)
    if read < 2 * np.unique(np.concatenate(positions)).size:
        return None
    return common_order(positions)


def _is_run(units: IntArray) -> bool:
    return bool(units[-1] - units[0] + 1 == units.size)


def _description(graph: StateGraph, components: Components) -> str:
    whole = sum(graph.axis_sizes)
    giant = int(components.sizes.max())
    return (
        f"{components.count} component{'s' if components.count > 1 else ''} over {whole} nodes, the largest with "
        f"{giant} ({giant / whole:.0%}), {components.isolated} isolated"
    )


def _why_none(graph: StateGraph, components: Components, emit: Emit) -> str:
    """Why there is no candidate at all."""
    if emit == "triangular":
        if _has_cover(graph):
            return "no two groups of outputs read less than everything"
        return "groups of outputs are looked for in a single site only"
    if emit == "shared":
        return "no two rows or columns are equal"
    if components.count == 1:
        return "nothing to take apart"
    if emit == "grouped" and graph.unstacked:
        return f"no stacks: {graph.unstacked}"
    return "not two of them have units on every axis"


def _everything(graph: StateGraph) -> Branch:
    return Branch(tuple(np.arange(size, dtype=np.intp) for size in graph.axis_sizes))


def _kept(branch: Branch) -> int:
    return sum(units.size for units in branch.units)


def _merged_components(
    graph: StateGraph, components: Components, cost: CostModel, emit: Emit
) -> Iterator[_Candidate]:
    """``split`` and ``shrink``: branches without a common unit."""
    del cost
    if emit in {"grouped", "triangular", "shared"}:
        return
    for branches in _groupings(graph, components, emit):
        count = len(branches)
        if count == 1 and _kept(branches[0]) == sum(graph.axis_sizes):
            continue  # this is the dense region
        decision: Decision = "split" if count > 1 else "shrink"
        yield _Candidate(decision, branches, f"{count} branch{'es' if count > 1 else ''}")


def _stacked(
    graph: StateGraph, components: Components, cost: CostModel, emit: Emit
) -> Iterator[_Candidate]:
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
                    yield _Candidate("grouped", ordered, found, grouping)


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


def _covers(
    graph: StateGraph, components: Components, cost: CostModel, emit: Emit
) -> Iterator[_Candidate]:
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
        yield _Candidate(
            "triangular",
            branches,
            f"{cover.found}: {len(branches)} groups of outputs read {share:.0%} of the entries",
        )


_GENERATORS: tuple[
    Callable[[StateGraph, Components, CostModel, Emit], Iterator[_Candidate]], ...
] = (_merged_components, _stacked, _covers)
"""Where candidates come from: (live graph, components, cost, emit) -> those that ``emit`` allows."""


def _has_cover(graph: StateGraph) -> bool:
    """Whether branches may overlap: on the entry axis of a single site, which is cut and never put together."""
    if len(graph.edges) != 1 or len(graph.axis_sizes) != 2:
        return False
    (edge,) = graph.edges
    return edge.source != edge.target and edge.source not in graph.exits


def _group_price(graph: StateGraph, cost: CostModel) -> Callable[..., FloatArray]:
    """A group's share of the dense region's time, averaged over the cost model's batches (``covers.Price``)."""
    (edge,) = graph.edges
    dense = _costs(graph, (_everything(graph),), cost)
    size = graph.axis_sizes[edge.source]
    cuts = graph.entries.count(edge.source)

    def price(inputs: FloatArray, outputs: FloatArray, *, gathered: bool) -> FloatArray:
        total = np.zeros_like(inputs)
        for rows, whole in zip(cost.batches, dense, strict=True):
            cut = (cost.gather if gathered else cost.copy)(rows, inputs, graph.itemsize)
            seconds = cost.matmul(rows, inputs, outputs, graph.itemsize)
            seconds += cuts * np.where(inputs == size, 0.0, cut)
            for axis in graph.elementwise:
                units = inputs if axis == edge.source else outputs
                seconds += cost.elementwise(rows, units, graph.itemsize)
            total += seconds / whole
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


def _relative(seconds: FloatArray, dense: FloatArray) -> float:
    """Geometric mean over the batches: each counts the same."""
    return float(np.exp(np.mean(np.log(seconds / dense))))


def _costs(
    graph: StateGraph,
    branches: tuple[Branch, ...],
    cost: CostModel,
    grouping: Grouping | None = None,
) -> FloatArray:
    """Predicted seconds at each of the cost model's batches."""
    if grouping is None:
        return np.array([_seconds(graph, branches, cost, rows) for rows in cost.batches])
    work = StackWork(
        tuple((edge.source, edge.target) for edge in graph.edges),
        graph.elementwise,
        graph.fused,
        graph.itemsize,
    )
    borders = [
        Border(axis, _in_place(graph, branches, grouping, axis))
        for axis in (*graph.entries, *graph.exits)
    ]
    return np.array([work.seconds(grouping, borders, cost, rows) for rows in cost.batches])


def _in_place(
    graph: StateGraph, branches: tuple[Branch, ...], grouping: Grouping, axis: int
) -> bool:
    """Whether the branches' units of a border axis stand outside as they do in the stacks."""
    size = graph.axis_sizes[axis]
    units = np.concatenate([branch.units[axis] for branch in branches])
    if units.size != size or grouping.width(axis) != size:
        return False
    return axis in graph.free or np.array_equal(units, np.arange(size))


def _seconds(
    graph: StateGraph, branches: tuple[Branch, ...], cost: CostModel, rows: int
) -> float:
    total = 0.0
    for branch in branches:
        sizes = [units.size for units in branch.units]
        for edge in graph.edges:
            total += cost.matmul(rows, sizes[edge.source], sizes[edge.target], graph.itemsize)
        for axis in graph.elementwise:
            total += cost.elementwise(rows, sizes[axis], graph.itemsize)
    for axis in graph.entries:
        total += _cut_seconds(graph, branches, axis, cost, rows)
    for axis in graph.exits:
        total += _join_seconds(graph, branches, axis, cost, rows)
    return total


def _shared_costs(graph: StateGraph, copies: Copies, cost: CostModel) -> NDArray[np.float64]:
    """Predicted seconds at each batch; whatever is not the site stays as wide as it was."""
    (edge,) = graph.edges
    whole = _costs(graph, (_everything(graph),), cost)
    inputs, outputs = edge.mask.shape
    site = [cost.matmul(rows, inputs, outputs, graph.itemsize) for rows in cost.batches]
    shared = [copies.seconds(cost, rows, graph.itemsize) for rows in cost.batches]
    return whole + np.subtract(shared, site, dtype=np.float64)


def _cut_seconds(
    graph: StateGraph, branches: tuple[Branch, ...], axis: int, cost: CostModel, rows: int
) -> float:
    """Seconds to cut one value into branches."""
    size = graph.axis_sizes[axis]
    parts = [branch.units[axis] for branch in branches]
    read = sum(part.size for part in parts)
    if axis in graph.free:  # renumbered, so that every branch's units are a run
        whole_axis = read == size and np.unique(np.concatenate(parts)).size == size
        if whole_axis:
            return 0.0 if len(parts) == 1 else cost.copy(rows, size, graph.itemsize)
        return sum(cost.copy(rows, part.size, graph.itemsize) for part in parts)
    if layout_of(parts, size) == "whole":
        return 0.0 if len(parts) == 1 else cost.copy(rows, size, graph.itemsize)
    order = gathered_order(parts)
    total = 0.0 if order is None else cost.gather(rows, order.size, graph.itemsize)
    whole = size if order is None else order.size
    for units in parts:
        if units.size == whole:
            continue
        runs = order is not None or _is_run(units)
        total += (cost.copy if runs else cost.gather)(rows, units.size, graph.itemsize)
    return total


def _join_seconds(
    graph: StateGraph, branches: tuple[Branch, ...], axis: int, cost: CostModel, rows: int
) -> float:
    """Seconds to put one value together from the branches."""
    size = graph.axis_sizes[axis]
    layout = (
        "whole"
        if axis in graph.free
        else layout_of([branch.units[axis] for branch in branches], size)
    )
    if layout == "whole" and len(branches) == 1:
        return 0.0
    total = cost.copy(rows, size, graph.itemsize)
    return total if layout == "whole" else total + cost.gather(rows, size, graph.itemsize)
