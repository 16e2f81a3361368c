"""The plan: into which branches a region is rewritten, decided by predicted cost, with a reason.

Works on the region's state graph alone: axes, supported masks, how often each axis is touched.
"""

from __future__ import annotations

import collections
import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from onnx_decompose.analysis.packed import packs
from onnx_decompose.analysis.structure import Components, live_units, state_components
from onnx_decompose.planning.candidates import GENERATORS, Candidate
from onnx_decompose.planning.region_cost import (
    WORTH,
    predicted_seconds,
    relative_cost,
    shared_seconds,
)
from onnx_decompose.planning.state_graph import Branch, Decision, Emit, StateGraph, everything

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from onnx_decompose.planning.copies import Copies
    from onnx_decompose.planning.cost import CostModel
    from onnx_decompose.planning.stacks import Grouping

    IntArray = NDArray[np.intp]

__all__ = ["RegionPlan", "candidate_plans", "plan_region", "plan_shared"]

_MOST_PLANS = 8
"""Plans of one decision that are worth being timed: each holds the masks."""


@packs("masks")
@dataclasses.dataclass(frozen=True, eq=False)
class RegionPlan:
    """What happens to one region.

    Attributes:
        decision: ``dense`` (left alone), ``shrink`` (one narrower branch), ``split`` (several branches),
            ``grouped`` (several branches, in stacks),
            ``triangular`` (several branches that may read the same inputs, or what others make) or ``shared`` (equal
            rows and columns computed once).
        reason: why, with figures, for the report.
        components: of the region's live state graph.
        masks: per edge, the supported entries that lead to an exit, (K, N); kept as bits.
        branches: none where the decision is ``dense``; the computed units where it is ``shared``.
        relative_cost: predicted cost over dense, geometric mean over batches.
        places: axis -> where each unit stands in the values of that axis outside, where they were renumbered.
        copies: what the computed units stand for; None unless the decision is ``shared``.
        grouping: the stacks where the decision is ``grouped``; branches are in their order.
        picks: units that branches find scattered are taken by ArrayFeatureExtractor, and not by Gather.
    """

    decision: Decision
    reason: str
    components: Components
    masks: Sequence[NDArray[np.bool_]]
    branches: tuple[Branch, ...] = ()
    relative_cost: float = 1.0
    places: Mapping[int, IntArray] = dataclasses.field(default_factory=dict)
    copies: Copies | None = None
    grouping: Grouping | None = None
    picks: bool = False

    def order(self, axis: int, size: int) -> IntArray:
        """The unit at each place of a value of the border, ``size`` of them."""
        place = self.places.get(axis)
        return np.arange(size, dtype=np.intp) if place is None else np.argsort(place)

    def blocks(self, source: int, target: int) -> tuple[tuple[int, int], ...]:
        """(inputs, outputs) of every block that a weight from one axis to another is stored as, padding included."""
        if self.grouping is not None:
            return self.grouping.blocks(source, target)
        return tuple((b.inputs(source).size, b.units[target].size) for b in self.branches)

    def entries(self, source: int, target: int) -> int:
        """Entries that a weight from one axis to another stores after the rewrite."""
        return sum(inputs * outputs for inputs, outputs in self.blocks(source, target))

    def left_dense(self, reason: str) -> RegionPlan:
        """The region as it was, where this plan turned out not to pay."""
        return dataclasses.replace(
            self, decision="dense", reason=reason, branches=(), copies=None, grouping=None
        )

    def positions(self, axis: int) -> list[IntArray]:
        """Where each branch's units stand in a value of the border: ascending, but for an axis with a cascade."""
        place = self.places.get(axis)
        units = [branch.units[axis] for branch in self.branches]
        return units if place is None else [place[part] for part in units]


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
    if relative > WORTH and emit == "auto":
        return RegionPlan(
            "dense",
            f"{found}; the best rewrite is predicted to take {relative:.2f} of the time",
            components,
            masks,
        )
    return _plan_of(graph, components, (relative, best), cost)


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
            plans.append(_plan_of(graph, components, (relative, candidate), cost))
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
    dense = predicted_seconds(graph, (everything(graph),), cost)
    copies = dataclasses.replace(copies, picks=cost.picks(graph.itemsize))
    candidates = [
        (relative_cost(shared_seconds(graph, variant, cost), dense), variant)
        for variant in copies.variants()
    ]
    relative, best = min(candidates, key=lambda candidate: candidate[0])
    rows, columns = best.computed
    found = (
        f"{rows.size} different rows of {best.inputs.size} and {columns.size} different columns "
        f"of {best.outputs.size}, predicted to take {relative:.2f} of the time"
    )
    if emit == "auto" and relative > min(WORTH, other.relative_cost):
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
) -> list[tuple[float, Candidate]]:
    """The candidates of a live region and their predicted costs, the lowest first."""
    dense_cost = predicted_seconds(graph, (everything(graph),), cost)
    ranked: list[tuple[float, Candidate]] = []
    for generate in GENERATORS:
        for candidate in generate(graph, components, cost, emit):
            if ranked and _same(ranked[-1][1], candidate):
                continue  # stretching changed nothing
            priced = cost if candidate.picks else dataclasses.replace(cost, pick_ratio=0.0)
            costs = predicted_seconds(graph, candidate.branches, priced, candidate.grouping)
            ranked.append((relative_cost(costs, dense_cost), candidate))
    return sorted(ranked, key=lambda item: item[0])


def _plan_of(
    graph: StateGraph,
    components: Components,
    ranked: tuple[float, Candidate],
    cost: CostModel,
) -> RegionPlan:
    relative, candidate = ranked
    found = f"{_description(graph, components)}; {candidate.found}"
    return RegionPlan(
        candidate.decision,
        f"{found}, predicted to take {relative:.2f} of the time",
        components,
        tuple(edge.mask for edge in graph.edges),
        candidate.branches,
        relative,
        grouping=candidate.grouping,
        picks=candidate.picks and not graph.has_channels and cost.picks(graph.itemsize),
    )


def _same(some: Candidate, other: Candidate) -> bool:
    if some.grouping != other.grouping or len(some.branches) != len(other.branches):
        return False
    return all(
        np.array_equal(mine, theirs)
        and np.array_equal(branch.inputs(axis), counterpart.inputs(axis))
        for branch, counterpart in zip(some.branches, other.branches, strict=True)
        for axis, (mine, theirs) in enumerate(zip(branch.units, counterpart.units, strict=True))
    )


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
        return "no two groups of units read less than everything"
    if emit == "shared":
        return "no two rows or columns are equal"
    if components.count == 1:
        return "nothing to take apart"
    if emit == "grouped" and graph.unstacked:
        return f"no stacks: {graph.unstacked}"
    return "not two of them have units on every axis"
