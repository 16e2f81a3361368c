"""Emission ``shrink``, ``split`` and ``triangular``: a region's nodes once per branch, on that branch's units alone.

    entry --[Split | Slice | Gather]--> branch values --> sliced copies of the nodes --[Concat, Gather]--> exit

Interior values never meet: one cut where a value comes in, one join where it goes out. Branches may read the same
units of a value that comes in; they never make the same.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import onnx_graphsurgeon as gs

from onnx_decompose.borders import gathered_order, layout_of
from onnx_decompose.passes.site_weights import SiteWeights
from onnx_decompose.passes.splice import Placed
from onnx_decompose.state_graph import Branch

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import onnx
    from numpy.typing import NDArray

    from onnx_decompose.constants import Constants
    from onnx_decompose.metadata import Block
    from onnx_decompose.passes.tensor_ops import TensorOps, Value
    from onnx_decompose.plan import RegionPlan
    from onnx_decompose.regions import Region
    from onnx_decompose.sites import Site

__all__ = ["BranchEmitter", "Emitter"]


class Emitter(Protocol):
    """Writes one region in one way; its nodes go to a :class:`TensorOps`."""

    def emit(self) -> dict[str, tuple[Block, ...]]:
        """Write every node of the region, in order.

        Returns:
            Site name -> where the parts of its annealed weight are stored.
        """
        ...


class BranchEmitter:
    """Writes one region as branches.

    Args:
        graph: the model's main graph.
        region: the region to write.
        plan: the units of each branch.
        weights: annealed weight of each site by name, (K, N).
        constants: the constants of the graph.
        ops: where the new nodes go.
    """

    def __init__(
        self,
        graph: onnx.GraphProto,
        region: Region,
        plan: RegionPlan,
        weights: Mapping[str, NDArray[Any]],
        constants: Constants,
        ops: TensorOps,
    ) -> None:
        self._graph = graph
        self._region = region
        self._branches = plan.branches
        self._positions = {
            axis: plan.positions(axis) for axis in sorted(region.entry_axes | region.exit_axes)
        }
        self._common: dict[int, NDArray[np.intp]] = {}
        for axis in sorted(region.entry_axes):
            order = gathered_order(self._positions[axis])
            if order is not None:
                self._gather_once(axis, order)
        self._weights = weights
        self._constants = constants
        self._ops = ops
        self._writer = SiteWeights(graph, constants, ops)
        self._local: dict[str, list[Value]] = {}
        self._blocks: dict[str, tuple[Block, ...]] = {}

    def emit(self) -> dict[str, tuple[Block, ...]]:
        """Write every node of the region, in order, once per branch; see :class:`Emitter`."""
        sites = {site.node: site for site in self._region.sites}
        for index in self._region.nodes:
            node = self._graph.node[index]
            for name in node.input:
                if name in self._region.axis_of and name not in self._local:
                    self._local[name] = self._cut(name, index)
            if index in sites:
                self._site(sites[index], node)
            else:
                self._elementwise(node, index)
            if node.output[0] in self._region.exits:
                self._join(node.output[0], index)
        return self._blocks

    def _gather_once(self, axis: int, order: NDArray[np.intp]) -> None:
        """Let every branch find its units of an entry axis in a run, after one Gather of ``order``."""
        self._common[axis] = order
        rank = np.empty(self._region.axis_sizes[axis], np.intp)
        rank[order] = np.arange(order.size)
        places = [rank[run] for run in self._positions[axis]]
        self._positions[axis] = [np.sort(run) for run in places]
        self._branches = tuple(
            Branch(
                tuple(
                    units[np.argsort(run)] if number == axis else units
                    for number, units in enumerate(branch.units)
                )
            )
            for branch, run in zip(self._branches, places, strict=True)
        )

    def _units(self, name: str, branch: int) -> NDArray[np.intp]:
        return self._branches[branch].units[self._region.axis_of[name]]

    def _is_whole(self, name: str) -> bool:
        """Whether a single branch has all units of ``name``, which then stand at their places."""
        axis = self._region.axis_of[name]
        return (
            len(self._branches) == 1
            and self._branches[0].units[axis].size == self._region.axis_sizes[axis]
        )

    def _cut(self, name: str, place: int) -> list[Value]:
        """The branches' parts of a value that comes from outside."""
        value = gs.Variable(name)
        if self._is_whole(name):
            return [value]
        axis = self._region.axis_of[name]
        axis = self._region.axis_of[name]
        positions, size = self._positions[axis], self._region.axis_sizes[axis]
        parts: list[Value] = [
            gs.Variable(self._ops.fresh.name(f"{name}.branch{number}"))
            for number in range(len(self._branches))
        ]
        order = self._common.get(axis)
        if order is None and layout_of(positions, size) == "whole":
            turns = _by_first(positions)
            sizes = [positions[number].size for number in turns]
            self._ops.split(value, sizes, [parts[number] for number in turns], place)
            return parts
        if order is not None:
            value = gs.Variable(self._ops.fresh.name(f"{name}.ordered"))
            self._ops.gather(gs.Variable(name), order, value, name, place)
            size = order.size
        return [
            self._taken(value, size, run, part, (name, place))
            for run, part in zip(positions, parts, strict=True)
        ]

    def _taken(
        self, value: Value, size: int, run: NDArray[np.intp], part: Value, at: tuple[str, int]
    ) -> Value:
        """``part``: the ascending positions ``run`` of ``value``, which has ``size`` units; or ``value`` itself.

        ``at`` is a value of the same rank, and the place of the new node.
        """
        like, place = at
        if run.size == size:
            return value
        if run[-1] - run[0] + 1 == run.size:
            self._ops.slice(value, int(run[0]), int(run[-1]) + 1, part, place, like)
        else:
            self._ops.gather(value, run, part, like, place)
        return part

    def _join(self, name: str, place: int) -> None:
        """Make the value ``name``, which is read outside, from the branches' parts."""
        if self._is_whole(name):
            return
        axis = self._region.axis_of[name]
        positions = self._positions[axis]
        output = gs.Variable(name)
        parts = self._local[name]
        if layout_of(positions, self._region.axis_sizes[axis]) == "whole":
            self._ops.concat([parts[n] for n in _by_first(positions)], output, name, place)
            return
        joined = gs.Variable(self._ops.fresh.name(f"{name}.joined"))
        self._ops.concat(parts, joined, name, place)
        self._ops.gather(joined, np.argsort(np.concatenate(positions)), output, name, place)

    def _outputs(self, name: str) -> list[Value]:
        """New values for what a node makes in each branch."""
        if self._is_whole(name) or (
            len(self._branches) == 1 and name not in self._region.exits
        ):
            parts: list[Value] = [gs.Variable(name)]
        else:
            parts = [
                gs.Variable(self._ops.fresh.name(f"{name}.branch{number}"))
                for number in range(len(self._branches))
            ]
        self._local[name] = parts
        return parts

    def _site(self, site: Site, node: onnx.NodeProto) -> None:
        weight = self._weights[site.name]
        blocks: list[Block] = []
        for number, output in enumerate(self._outputs(site.output)):
            units = self._units(site.input, number), self._units(site.output, number)
            part = weight[np.ix_(*units)]
            read, block = self._writer.operands(site, part, units, f"block{number}")
            blocks.append(block)
            inputs = [
                read[position] if position in read else self._site_operand(site, name, number)
                for position, name in enumerate(node.input)
            ]
            self._copy(node, inputs, output, site.node, number)
        self._blocks[site.name] = tuple(blocks)

    def _site_operand(self, site: Site, name: str, number: int) -> Value:
        """What a site reads besides its weight, in one branch."""
        if name in self._region.axis_of:
            return self._local[name][number]
        if site.op_type == "Gemm" and name:
            return self._sliced_constant(name, site.output, number)
        return gs.Variable(name)

    def _elementwise(self, node: onnx.NodeProto, index: int) -> None:
        for number, output in enumerate(self._outputs(node.output[0])):
            inputs: list[Value] = []
            for name in node.input:
                if name in self._region.axis_of:
                    inputs.append(self._local[name][number])
                elif name in self._constants:
                    inputs.append(self._sliced_constant(name, node.output[0], number))
                else:
                    inputs.append(gs.Variable(name))
            self._copy(node, inputs, output, index, number)

    def _copy(
        self,
        node: onnx.NodeProto,
        inputs: list[Value],
        output: Value,
        place: int,
        number: int,
    ) -> None:
        base = node.name or node.output[0]
        name = (
            base if len(self._branches) == 1 else self._ops.fresh.name(f"{base}.branch{number}")
        )
        copy = gs.Node(node.op_type, name, {}, [*inputs], [output])
        self._ops.placed.append(Placed(copy, place, node))

    def _sliced_constant(self, name: str, like: str, number: int) -> Value:
        """The constant ``name`` restricted to the units that branch ``number`` has of the value ``like``."""
        axis = self._region.axis_of[like]
        shape = self._constants[name].shape
        size = self._region.axis_sizes[axis]
        units = self._branches[number].units[axis]
        if not shape or shape[-1] != size:
            return gs.Variable(name)
        stored: Value = gs.Variable(name)
        if not np.array_equal(units, np.arange(size)):
            values = self._constants.array(name)[..., units]
            stored = self._ops.fresh.constant(f"{name}.branch{number}", values)
        self._ops.note(name, units, stored.name, rows=math.prod(shape[:-1]))
        return stored


def _by_first(positions: Sequence[NDArray[np.intp]]) -> list[int]:
    """The branches in the order of their first units."""
    return sorted(range(len(positions)), key=lambda number: int(positions[number][0]))
