"""The rewritten model: every planned region as branches, everything else as it was."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from onnx_decompose.errors import PassError
from onnx_decompose.model.constants import Constants
from onnx_decompose.model.model_io import Model
from onnx_decompose.model.shapes import opset_of
from onnx_decompose.passes.base import GraphPass, PassResult, check_model
from onnx_decompose.passes.branches import BranchEmitter
from onnx_decompose.passes.grouped import GroupedEmitter
from onnx_decompose.passes.renumber import renumber
from onnx_decompose.passes.shared import SharedEmitter
from onnx_decompose.passes.splice import Fresh, constant_nodes, splice
from onnx_decompose.passes.tensor_ops import TensorOps

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    from onnx_decompose.graph.regions import Region
    from onnx_decompose.graph.sites import Site
    from onnx_decompose.model.metadata import Block, Reordered
    from onnx_decompose.model.shapes import Dim
    from onnx_decompose.passes.branches import Emitter
    from onnx_decompose.passes.renumber import Orders
    from onnx_decompose.planning.plan import RegionPlan
    from onnx_decompose.planning.state_graph import Decision

__all__ = ["RewriteRegions"]


_EMITTERS: Mapping[Decision, Callable[..., Emitter]] = {
    "shrink": BranchEmitter,
    "split": BranchEmitter,
    "triangular": BranchEmitter,
    "shared": SharedEmitter,
    "grouped": GroupedEmitter,
}
"""How each decision is written."""


def _emitter(region: Region, plan: RegionPlan) -> Callable[..., Emitter]:
    """Of convolutions, blocks in groups are branches with more than one block."""
    return BranchEmitter if region.unit_axis != -1 else _EMITTERS[plan.decision]


@dataclasses.dataclass(frozen=True, eq=False)
class RewriteRegions(GraphPass):
    """Write some regions as branches.

    Attributes:
        plans: the regions and how each is written; no two regions share a node.
        weight: gives the annealed weight of a site, (K, N).
        shapes: what is known of the values' shapes.
        orders: unit spaces that are renumbered on the way, and which old unit stands at each place.
        record: filled with how each site's weight is spread over blocks, name -> blocks in branch order.
        constants: filled with how each per-unit constant of the regions is, name -> blocks of one row.
        unit_axes: filled with the axis of each of those constants that has the units, counted from the last.
        reordered: filled with the other constants that are stored in a new order, by initializer.
    """

    plans: Sequence[tuple[Region, RegionPlan]]
    weight: Callable[[Site], NDArray[Any]]
    shapes: Mapping[str, tuple[Dim, ...]]
    orders: Orders = ()
    record: dict[str, tuple[Block, ...]] = dataclasses.field(default_factory=dict)
    constants: dict[str, tuple[Block, ...]] = dataclasses.field(default_factory=dict)
    reordered: dict[str, Reordered] = dataclasses.field(default_factory=dict)
    unit_axes: dict[str, int] = dataclasses.field(default_factory=dict)

    def touched(self, model: Model) -> frozenset[int]:
        """The regions' nodes, those with constants in a new order, and the constant nodes that only they read."""
        nodes = {index for region, _ in self.plans for index in region.nodes}
        nodes |= {use.node for space, _ in self.orders for use in space.constants}
        return frozenset(nodes | constant_nodes(model.proto.graph))

    def requires(self, model: Model) -> None:
        """The regions are the model's, and disjoint."""
        nodes = [index for region, _ in self.plans for index in region.nodes]
        if len(nodes) != len(set(nodes)):
            raise PassError("RewriteRegions: two regions share a node")
        if any(index >= len(model.proto.graph.node) for index in nodes):
            raise PassError("RewriteRegions: a region is not of this model")

    def call(self, model: Model) -> PassResult:
        """Emit every region, then splice."""
        if not self.plans:
            return PassResult(model, modified=False)
        graph = model.proto.graph
        constants = Constants(model)
        ops = TensorOps(opset_of(model.proto), self.shapes, Fresh(graph))
        for region, plan in self.plans:
            weights = {site.name: self.weight(site) for site in region.sites}
            emitter = _emitter(region, plan)(graph, region, plan, weights, constants, ops)
            self.record.update(emitter.emit())
        self.unit_axes.update(ops.unit_axes)
        self.constants.update({name: tuple(parts) for name, parts in ops.constants.items()})
        removed = {index for region, _ in self.plans for index in region.nodes}
        made = {
            name
            for region, _ in self.plans
            for site in region.sites
            if site.quantized is not None
            for name in site.quantized.made
        }
        inside = {i for i, node in enumerate(graph.node) if not made.isdisjoint(node.output)}
        around = renumber(graph, constants, self.orders, ops.fresh, inside=removed | inside)
        self.record.update(around.blocks)
        self.reordered.update(around.reordered)
        proto = splice(
            model.proto,
            removed,
            ops.placed,
            unchanged={name for region, _ in self.plans for name in region.exits},
            others=around.nodes,
            more=around.tensors,
        )
        return PassResult(Model(proto, model.path), modified=True)

    def ensures(self, before: Model, after: Model) -> None:
        """Also: a model that was valid stays valid, with full shape inference."""
        GraphPass.ensures(self, before, after)
        fault = check_model(after)
        if fault is not None and check_model(before) is None:
            raise PassError(f"RewriteRegions: the rewritten model is not valid: {fault}")
