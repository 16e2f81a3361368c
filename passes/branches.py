"""Emission ``shrink``, ``split`` and ``triangular``: a region's nodes once per branch, on that branch's units alone.

    entry --[Split | Slice | Gather]--> branch values --> sliced copies of the nodes --[Concat, Gather]--> exit

Interior values never meet: one cut where a value comes in, one join where it goes out. Branches may read the same
units of a value that comes in; they never make the same. In a cascade they read each other's: a value that sites
read is put together, branch by branch, and every branch's site takes a run of it.

    branch values --Concat--> the whole --Slice--> what the branch's site reads

Convolutions are written so with ``grouped``, too: the branches of a stack are the groups of one convolution, one after
the other, and whatever works on each channel by itself takes them as they are.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import onnx_graphsurgeon as gs

from onnx_decompose.graph.per_unit import (
    constant_axis,
    constant_units,
    neutral,
    scaled_operand,
)
from onnx_decompose.graph.quantized import INTEGER_PRODUCTS
from onnx_decompose.passes.site_weights import SiteWeights
from onnx_decompose.passes.splice import Placed
from onnx_decompose.planning.borders import gathered_order, is_run, layout_of
from onnx_decompose.planning.state_graph import Branch, is_cascade

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import onnx
    from numpy.typing import NDArray

    from onnx_decompose.graph.regions import Region
    from onnx_decompose.graph.sites import Site
    from onnx_decompose.model.constants import Constants
    from onnx_decompose.model.metadata import Block
    from onnx_decompose.passes.tensor_ops import TensorOps, Value
    from onnx_decompose.planning.plan import RegionPlan

__all__ = ["BranchEmitter", "Emitter"]

_OF_INTEGERS = {"DequantizeLinear", "QuantizeLinear", *INTEGER_PRODUCTS}
"""Operators that read or make values of integers."""


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
        self._groups = _groups_of(plan)
        self._branches = _strands_of(plan)
        strands = dataclasses.replace(plan, branches=self._branches)
        self._cascades = {
            axis for axis in set(region.axis_of.values()) if is_cascade(plan.branches, axis)
        }
        self._positions = {
            axis: strands.positions(axis)
            for axis in sorted(region.entry_axes | region.exit_axes)
        }
        self._common: dict[int, NDArray[np.intp]] = {}
        for axis in sorted(region.entry_axes - self._cascades):
            order = gathered_order(self._positions[axis])
            if order is not None:
                self._gather_once(axis, order)
        self._weights = weights
        self._constants = constants
        self._ops = ops.along(region.unit_axis)
        self._writer = SiteWeights(graph, constants, self._ops)
        integers = any(graph.node[index].op_type in _OF_INTEGERS for index in region.nodes)
        self._take = self._ops.pick if plan.picks and not integers else self._ops.gather
        self._local: dict[str, list[Value]] = {}
        self._whole: dict[str, Value] = {}
        self._read: dict[str, list[Value]] = {}
        self._made = {region.axis_of[site.output] for site in region.sites}
        self._blocks: dict[str, tuple[Block, ...]] = {}

    def emit(self) -> dict[str, tuple[Block, ...]]:
        """Write every node of the region, in order, once per branch; see :class:`Emitter`."""
        sites = {site.node: site for site in self._region.sites}
        for index in self._region.nodes:
            node = self._graph.node[index]
            if index in sites:
                self._site(sites[index], node)
            else:
                for name in node.input:
                    if name in self._region.axis_of:
                        self._own(name, index)
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

        def ordered(units: tuple[NDArray[np.intp], ...], turns: NDArray[np.intp]) -> Any:
            return tuple(
                part[turns] if number == axis else part for number, part in enumerate(units)
            )

        self._branches = tuple(
            Branch(ordered(branch.units, turns), ordered(branch.read, turns))
            for branch, turns in zip(self._branches, map(np.argsort, places), strict=True)
        )
        self._groups = tuple((branch,) for branch in self._branches)

    def _units(self, name: str, branch: int) -> NDArray[np.intp]:
        return self._branches[branch].units[self._region.axis_of[name]]

    def _own(self, name: str, place: int) -> list[Value]:
        """Each branch's own units of ``name``, cut now if it comes from outside."""
        if name not in self._local:
            self._local[name] = self._cut(name, place)
        return self._local[name]

    def _inputs(self, name: str, place: int) -> list[Value]:
        """What each branch's site reads of ``name``."""
        axis = self._region.axis_of[name]
        if axis not in self._cascades:
            return self._own(name, place)
        if name not in self._read:
            self._read[name] = [
                self._own(name, place)[number]
                if not branch.reads_others(axis)
                else self._taken_from_whole(name, number, place)
                for number, branch in enumerate(self._branches)
            ]
        return self._read[name]

    def _taken_from_whole(self, name: str, number: int, place: int) -> Value:
        """The run of units of ``name`` that a branch reads of its own and of others, side by side."""
        axis = self._region.axis_of[name]
        order = self._order(axis)
        wanted = self._branches[number].read[axis]
        start = int(np.flatnonzero(order == wanted[0])[0])
        run = np.arange(start, start + wanted.size)
        assert np.array_equal(order[run], wanted), "a branch reads a run of units"
        part = gs.Variable(self._ops.fresh.name(f"{name}.read{number}"))
        return self._taken(
            self._side_by_side(name, place), order.size, run, part, (name, place)
        )

    def _order(self, axis: int) -> NDArray[np.intp]:
        """The units of all branches, one branch after the other."""
        return np.concatenate([branch.units[axis] for branch in self._branches])

    def _side_by_side(self, name: str, place: int) -> Value:
        """All branches' units of ``name`` in one value, one branch after the other."""
        if name not in self._whole:
            if name not in self._local:
                # It comes from outside, also with units that no branch has.
                axis = self._region.axis_of[name]
                positions = np.concatenate(self._positions[axis])
                ordered = gs.Variable(self._ops.fresh.name(f"{name}.ordered"))
                size = self._region.axis_sizes[axis]
                whole = self._taken(gs.Variable(name), size, positions, ordered, (name, place))
            else:
                whole = gs.Variable(self._ops.fresh.name(f"{name}.joined"))
                self._ops.concat(self._local[name], whole, name, place)
            self._whole[name] = whole
        return self._whole[name]

    def _is_whole(self, name: str) -> bool:
        """Whether a single branch has all units of ``name``, which then stand at their places."""
        axis = self._region.axis_of[name]
        first, *others = self._branches
        if others:
            return False
        size = self._region.axis_sizes[axis]
        if axis not in self._positions:
            return first.units[axis].size == size
        (units,) = self._positions[axis]
        return units.size == size and is_run(units)

    def _cut(self, name: str, place: int) -> list[Value]:
        """The branches' parts of a value that comes from outside."""
        value = gs.Variable(name)
        if self._is_whole(name):
            return [value]
        axis = self._region.axis_of[name]
        positions, size = self._positions[axis], self._region.axis_sizes[axis]
        parts: list[Value] = [
            gs.Variable(self._ops.fresh.name(f"{name}.branch{number}"))
            for number in range(len(self._branches))
        ]
        if axis in self._cascades:
            sizes = [branch.units[axis].size for branch in self._branches]
            whole = self._side_by_side(name, place)
            self._ops.split(whole, sizes, parts, place, axis=self._ops.axis(name))
            return parts
        order = self._common.get(axis)
        if order is None and layout_of(positions, size) == "whole":
            turns = _by_first(positions)
            sizes = [positions[number].size for number in turns]
            self._ops.split(value, sizes, [parts[number] for number in turns], place)
            return parts
        if order is not None:
            value = gs.Variable(self._ops.fresh.name(f"{name}.ordered"))
            self._take(gs.Variable(name), order, value, name, place)
            size = order.size
        return [
            self._taken(value, size, run, part, (name, place))
            for run, part in zip(positions, parts, strict=True)
        ]

    def _taken(
        self, value: Value, size: int, run: NDArray[np.intp], part: Value, at: tuple[str, int]
    ) -> Value:
        """``part``: the positions ``run`` of ``value``, which has ``size`` units; or ``value`` itself.

        ``at`` is a value of the same rank, and the place of the new node.
        """
        like, place = at
        if is_run(run) and run.size == size:
            return value
        if is_run(run):
            self._ops.slice(value, int(run[0]), int(run[-1]) + 1, part, place, like)
        else:
            self._take(value, run, part, like, place)
        return part

    def _join(self, name: str, place: int) -> None:
        """Make the value ``name``, which is read outside, from the branches' parts."""
        if self._is_whole(name):
            return
        axis = self._region.axis_of[name]
        positions = self._positions[axis]
        output = gs.Variable(name)
        parts = self._local[name]
        if axis in self._cascades:
            order = np.concatenate(positions)
            if np.array_equal(order, np.arange(order.size)):
                self._ops.concat(parts, output, name, place)
                self._whole[name] = output
            else:
                whole = self._side_by_side(name, place)
                self._take(whole, np.argsort(order), output, name, place)
            return
        if layout_of(positions, self._region.axis_sizes[axis]) == "whole":
            self._ops.concat([parts[n] for n in _by_first(positions)], output, name, place)
            return
        joined = parts[0]
        if len(parts) > 1:
            joined = gs.Variable(self._ops.fresh.name(f"{name}.joined"))
            self._ops.concat(parts, joined, name, place)
        # Padding repeats a unit after the unit itself: the first of equal positions is the one that counts.
        first = np.unique(np.concatenate(positions), return_index=True)[1]
        self._take(joined, first, output, name, place)

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
        self._inputs(site.input, site.node)
        for number, output in enumerate(self._outputs(site.output)):
            count = len(self._groups[number])
            parts = [
                (weight[np.ix_(*units)], units) for units in self._site_units(site, number)
            ]
            if count == 1:
                read, block = self._writer.operands(site, *parts[0], f"block{number}")
                blocks.append(block)
            else:
                sides = (self._units(name, number).size for name in (site.input, site.output))
                size = tuple(side // count for side in sides)
                tensor, stored = self._writer.groups(site, parts, size, f"block{number}")
                read = {1: tensor}
                blocks.extend(stored)
            inputs = [
                read[position]
                if position in read
                else self._site_operand(site, node, position, number)
                for position in range(len(node.input))
            ]
            attributes = {"group": count} if count > 1 else {}
            self._copy(node, inputs, output, site.node, number, attributes)
        self._blocks[site.name] = tuple(blocks)

    def _site_units(
        self, site: Site, number: int
    ) -> Iterator[tuple[NDArray[np.intp], NDArray[np.intp]]]:
        """Rows and columns of a site's matrix that each group of one branch has."""
        source, target = self._region.axis_of[site.input], self._region.axis_of[site.output]
        for branch in self._groups[number]:
            yield site.rows(branch.inputs(source)), branch.units[target]

    def _site_operand(
        self, site: Site, node: onnx.NodeProto, position: int, number: int
    ) -> Value:
        """What a site reads besides its weight, in one branch."""
        name = node.input[position]
        if name == site.input:
            return self._inputs(name, site.node)[number]
        if name in self._region.axis_of:
            return self._own(name, site.node)[number]
        if site.op_type in {"Conv", "Gemm"} and name:
            return self._constant(node, position, site.output, number)
        return gs.Variable(name)

    def _elementwise(self, node: onnx.NodeProto, index: int) -> None:
        made = node.output[0]
        scaled = scaled_operand(node, self._constants, self._ops.ranks, self._region.unit_axis)
        for number, output in enumerate(self._outputs(made)):
            if scaled is not None and self._is_one(node, *scaled, number):
                self._local[made][number] = self._local[scaled[0]][number]
                continue
            inputs: list[Value] = []
            for position, name in enumerate(node.input):
                if name in self._region.axis_of:
                    inputs.append(self._local[name][number])
                elif name in self._constants:
                    inputs.append(self._constant(node, position, made, number))
                else:
                    inputs.append(gs.Variable(name))
            units = self._units(made, number)
            attributes = {"group": units.size} if node.op_type == "Conv" else {}
            self._copy(node, inputs, output, index, number, attributes)

    def _is_one(self, node: onnx.NodeProto, value: str, name: str, number: int) -> bool:
        """Whether ``node`` leaves ``value`` as it is in branch ``number``: its factor, ``name``, is one."""
        made = node.output[0]
        # What is read outside has to be made, and a single unit becomes several.
        if made in self._region.exits or value not in self._region.axis_of:
            return False
        values = self._constants.array(name).ravel()
        axis = self._region.axis_of[made]
        if values.size == self._region.axis_sizes[axis]:
            values = values[self._branches[number].units[axis]]
        return bool((values == 1).all())

    def _copy(
        self,
        node: onnx.NodeProto,
        inputs: list[Value],
        output: Value,
        place: int,
        number: int,
        attributes: Mapping[str, Any],
    ) -> None:
        base = node.name or node.output[0]
        name = (
            base if len(self._branches) == 1 else self._ops.fresh.name(f"{base}.branch{number}")
        )
        copy = gs.Node(node.op_type, name, dict(attributes), [*inputs], [output])
        self._ops.placed.append(Placed(copy, place, node))

    def _constant(self, node: onnx.NodeProto, position: int, like: str, number: int) -> Value:
        """A constant input restricted to the units that branch ``number`` has of the value ``like``."""
        name = node.input[position]
        along = constant_axis(node, position, self._region.unit_axis)
        axis = self._region.axis_of[like]
        size, units = self._region.axis_sizes[axis], self._branches[number].units[axis]
        if constant_units(self._constants, name, along) != size:
            return gs.Variable(name)
        stored: Value = gs.Variable(name)
        if not np.array_equal(units, np.arange(size)):
            values = np.take(self._constants.array(name), units, axis=along)
            if axis in self._made:
                np.moveaxis(values, along, 0)[_is_padding(units)] = neutral(node, position)
            stored = self._ops.fresh.constant(f"{name}.branch{number}", values)
        rows = math.prod(self._constants[name].shape) // size
        first = 0
        for branch in self._groups[number]:
            inside = branch.units[axis]
            places = (
                {}
                if inside.size == units.size
                else {"stored_columns": first + np.arange(inside.size)}
            )
            self._ops.note(
                name,
                inside,
                stored.name,
                rows=rows,
                transposed=along != -1,
                axis=along,
                **places,
            )
            first += units.size // len(self._groups[number])
        return stored


def _groups_of(plan: RegionPlan) -> tuple[tuple[Branch, ...], ...]:
    """The branches that are written as the groups of one operator: each alone, but for stacks."""
    if plan.grouping is None:
        return tuple((branch,) for branch in plan.branches)
    branches = iter(plan.branches)
    return tuple(
        tuple(itertools.islice(branches, stack.count)) for stack in plan.grouping.stacks
    )


def _strands_of(plan: RegionPlan) -> tuple[Branch, ...]:
    """The units of each stack, its branches one after the other; a branch is padded with its last unit again."""
    if plan.grouping is None:
        return plan.branches
    return tuple(
        Branch(
            tuple(
                np.concatenate(
                    [
                        np.pad(b.units[axis], (0, size - b.units[axis].size), "edge")
                        for b in group
                    ]
                )
                for axis, size in enumerate(stack.sizes)
            )
        )
        for stack, group in zip(plan.grouping.stacks, _groups_of(plan), strict=True)
    )


def _is_padding(units: NDArray[np.intp]) -> NDArray[np.bool_]:
    """Which units repeat the one before them."""
    return np.concatenate([[False], units[1:] == units[:-1]])


def _by_first(positions: Sequence[NDArray[np.intp]]) -> list[int]:
    """The branches in the order of their first units."""
    return sorted(range(len(positions)), key=lambda number: int(positions[number][0]))
