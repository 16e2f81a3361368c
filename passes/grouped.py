"""Emission ``grouped``: a region's nodes once per stack of equal blocks, on the units of all of its blocks.

    entry --[Transpose, Gather]--> stack --> Conv in groups, or batched MatMul --> ... --[Gather, Transpose]--> exit

Blocks that are smaller than others of their stack are padded with units whose weights and biases are zero.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_graphsurgeon as gs

from onnx_decompose.graph.per_unit import scaled_operand
from onnx_decompose.graph.unit_layouts import folded_biases, stack_form
from onnx_decompose.passes.layouts import LAYOUTS, Spread
from onnx_decompose.passes.splice import Placed

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import onnx
    from numpy.typing import NDArray

    from onnx_decompose.graph.regions import Region
    from onnx_decompose.graph.sites import Site
    from onnx_decompose.model.constants import Constants
    from onnx_decompose.model.metadata import Block
    from onnx_decompose.passes.tensor_ops import TensorOps, Value
    from onnx_decompose.planning.plan import RegionPlan
    from onnx_decompose.planning.state_graph import Branch

    IntArray = NDArray[np.intp]

__all__ = ["GroupedEmitter"]


class GroupedEmitter:
    """Writes one region in stacks; arguments as of ``branches.BranchEmitter``."""

    def __init__(
        self,
        graph: onnx.GraphProto,
        region: Region,
        plan: RegionPlan,
        weights: Mapping[str, NDArray[Any]],
        constants: Constants,
        ops: TensorOps,
    ) -> None:
        assert plan.grouping is not None
        self._graph = graph
        self._region = region
        self._plan = plan
        self._stacks = plan.grouping.stacks
        self._weights = weights
        self._constants = constants
        self._ops = ops
        form = stack_form(graph, region, constants, ops.shapes, ops.opset)
        self._layout = LAYOUTS[plan.grouping.layout](form, ops)
        self._folded = folded_biases(graph, region, constants) if self._convolves else {}
        self._spreads = [self._spread(axis) for axis in range(len(region.axis_sizes))]
        self._made = {region.axis_of[site.output] for site in region.sites}
        self._local: dict[str, list[Value]] = {}
        self._blocks: dict[str, tuple[Block, ...]] = {}

    @property
    def _convolves(self) -> bool:
        return self._layout.op == "Conv"

    def emit(self) -> dict[str, tuple[Block, ...]]:
        """Write every node of the region, in order, once per stack; see ``branches.Emitter``."""
        sites = {site.node: site for site in self._region.sites}
        done = set(self._folded.values())
        for index in self._region.nodes:
            node = self._graph.node[index]
            if index in done:
                continue
            for name in node.input:
                if name in self._region.axis_of and name not in self._local:
                    self._local[name] = self._enter(name, index)
            if index in sites:
                output = self._site(sites[index], node)
            else:
                output = self._elementwise(node, index)
            if output in self._region.exits:
                self._leave(output, index)
        return self._blocks

    def _spread(self, axis: int) -> Spread:
        padded: list[IntArray] = []
        branches = iter(self._plan.branches)
        for stack in self._stacks:
            for _ in range(stack.count):
                units = next(branches).units[axis]
                last = np.repeat(units[-1:], stack.sizes[axis] - units.size)
                padded.append(np.concatenate([units, last]))
        return Spread(
            self._region.axis_sizes[axis],
            tuple(stack.count for stack in self._stacks),
            tuple(stack.sizes[axis] for stack in self._stacks),
            np.concatenate(padded),
        )

    def _positions(self, axis: int) -> tuple[IntArray, IntArray | None]:
        """Where each unit of the axis' spread stands outside; and so again, None where they are all in turn."""
        place = self._plan.places.get(axis)
        units = self._spreads[axis].units
        positions = units if place is None else place[units]
        size = self._region.axis_sizes[axis]
        in_turn = np.array_equal(positions, np.arange(size))
        return positions, None if in_turn else positions

    def _enter(self, name: str, place: int) -> list[Value]:
        axis = self._region.axis_of[name]
        _, index = self._positions(axis)
        return self._layout.enter(gs.Variable(name), self._spreads[axis], index, place)

    def _leave(self, name: str, place: int) -> None:
        axis = self._region.axis_of[name]
        positions, index = self._positions(axis)
        if index is not None:
            # Padding repeats a unit after the unit itself: the first of equal positions is the one that counts.
            index = np.unique(positions, return_index=True)[1]
        output = gs.Variable(name)
        self._layout.leave(self._local[name], self._spreads[axis], index, output, place)

    def _outputs(self, name: str) -> list[Value]:
        """New values for what a node makes in each stack."""
        parts: list[Value] = [
            gs.Variable(self._ops.fresh.name(f"{name}.stack{number}"))
            for number in range(len(self._stacks))
        ]
        self._local[name] = parts
        return parts

    def _site(self, site: Site, node: onnx.NodeProto) -> str:
        """Write a site, with its bias where the operator takes one; returns the value that this makes."""
        bias = self._bias(site, node)
        folded = self._folded.get(site.node)
        made = site.output if folded is None else self._graph.node[folded].output[0]
        blocks: list[Block] = []
        for number, output in enumerate(self._outputs(made)):
            inputs = [self._local[site.input][number], self._weight(site, number, blocks)]
            product = output
            if bias is not None and self._convolves:
                inputs.append(self._bias_of(bias, site, number))
            elif bias is not None:
                product = gs.Variable(self._ops.fresh.name(f"{output.name}.product"))
            attributes = dict(self._layout.attributes(self._stacks[number].count))
            name = self._name(node, number)
            operator = gs.Node(self._layout.op, name, attributes, inputs, [product])
            self._ops.placed.append(Placed(operator, site.node, node, is_copy=False))
            if bias is not None and not self._convolves:
                added = self._bias_of(bias, site, number)
                self._ops.add("Add", [product, added], [output], site.node)
        self._blocks[site.name] = tuple(blocks)
        return made

    def _stacked(self, number: int) -> Sequence[Branch]:
        """The branches of one stack."""
        first = sum(stack.count for stack in self._stacks[:number])
        return self._plan.branches[first : first + self._stacks[number].count]

    def _weight(self, site: Site, number: int, blocks: list[Block]) -> gs.Constant:
        """The weights of one stack; what is stored where goes to ``blocks``."""
        weight, stack = self._weights[site.name], self._stacks[number]
        source, target = self._region.axis_of[site.input], self._region.axis_of[site.output]
        size = stack.sizes[source], stack.sizes[target]
        padded = np.zeros((stack.count, *size), weight.dtype)
        for part, branch in zip(padded, self._stacked(number), strict=True):
            rows, columns = branch.units[source], branch.units[target]
            part[: rows.size, : columns.size] = weight[np.ix_(rows, columns)]
        tensor = self._ops.fresh.constant(
            f"{site.tensor}.stack{number}", self._layout.weight(padded)
        )
        for place, branch in enumerate(self._stacked(number)):
            units = branch.units[source], branch.units[target]
            blocks.append(self._layout.block(tensor.name, place, size, units))
        return tensor

    def _bias(self, site: Site, node: onnx.NodeProto) -> str | None:
        """The constant that is added to the product where it is made."""
        if len(node.input) > 2 and node.input[2]:
            return str(node.input[2])
        if site.node not in self._folded:
            return None
        after = self._graph.node[self._folded[site.node]]
        return next(str(name) for name in after.input if name in self._constants)

    def _bias_of(self, name: str, site: Site, number: int) -> gs.Constant:
        """The bias ``name`` of a site in one stack."""
        values = np.broadcast_to(self._constants.array(name).ravel(), (site.shape[1],))
        padded = self._padded(values, site.output, number, 0)
        if not self._convolves:
            padded = self._layout.constant(padded, self._stacks[number].count)
        tensor = self._ops.fresh.constant(f"{name}.stack{number}", padded)
        self._note(name, tensor, site.output, number)
        return tensor

    def _note(
        self, name: str, tensor: gs.Constant, like: str, number: int, rows: int = 1
    ) -> None:
        """Write down where the units of a constant lie that has ``rows`` entries for each of the value ``like``."""
        axis = self._region.axis_of[like]
        size = self._stacks[number].sizes[axis]
        for place, branch in enumerate(self._stacked(number)):
            units = branch.units[axis]
            places = self._layout.row(place, size, units.size)
            # With other axes behind it, a channel is the first one.
            turned = rows > 1 and self._convolves
            self._ops.note(name, units, tensor.name, rows=rows, transposed=turned, **places)

    def _padded(
        self, values: NDArray[Any], like: str, number: int, padding: float
    ) -> NDArray[Any]:
        """Numbers per unit, (..., N), in the order of a stack of the value ``like``."""
        axis = self._region.axis_of[like]
        spread = self._spreads[axis]
        units = spread.parts(spread.units)[number]
        ordered = values[..., units.ravel()]
        if axis in self._made:
            ordered[..., _is_padding(units).ravel()] = padding
        return ordered

    def _elementwise(self, node: onnx.NodeProto, index: int) -> str:
        made: str = node.output[0]
        scaled = scaled_operand(node, self._constants, self._ops.ranks, -1)
        # What is read outside has to be made, and a single unit becomes several.
        if scaled and scaled[0] in self._local and made not in self._region.exits:
            value, factor = scaled
            if (self._constants.array(factor) == 1).all():
                self._local[made] = self._local[value]
                return made
        outside = {
            name: self._operand(name, index)
            for name in node.input
            if name not in self._region.axis_of and name not in self._constants
        }
        for number, output in enumerate(self._outputs(made)):
            inputs: list[Value] = []
            for name in node.input:
                if name in self._region.axis_of:
                    inputs.append(self._local[name][number])
                elif name in self._constants:
                    # What is added to padding is zero, as it is; what multiplies or divides it, one.
                    neutral = 0 if node.op_type in {"Add", "Sub"} else 1
                    inputs.append(self._constant(name, made, number, neutral))
                else:
                    inputs.append(outside[name])
            copy = gs.Node(node.op_type, self._name(node, number), {}, [*inputs], [output])
            self._ops.placed.append(Placed(copy, index, node))
        return made

    def _operand(self, name: str, place: int) -> Value:
        """A value from outside that is broadcast to every unit."""
        value = gs.Variable(name)
        is_scalar = len(self._ops.shapes.get(name, ())) < 2
        return value if is_scalar else self._layout.broadcast(value, 1, place)

    def _constant(self, name: str, like: str, number: int, neutral: float) -> Value:
        """A constant operand in one stack of the value ``like``, with ``neutral`` at padding."""
        shape = self._constants[name].shape
        size = self._region.axis_sizes[self._region.axis_of[like]]
        if not shape or (len(shape) == 1 and shape[0] != size):
            return gs.Variable(name)
        values = self._constants.array(name)
        if values.shape[-1:] != (1,):
            values = self._padded(values, like, number, neutral)
        laid = self._layout.constant(values, self._stacks[number].count)
        tensor = self._ops.fresh.constant(f"{name}.stack{number}", laid)
        if shape[-1] == self._region.axis_sizes[self._region.axis_of[like]]:
            self._note(name, tensor, like, number, math.prod(shape[:-1]))
        return tensor

    def _name(self, node: onnx.NodeProto, number: int) -> str:
        """Of what stands for ``node`` in one stack."""
        base = node.name or node.output[0]
        many = len(self._stacks) > 1
        return self._ops.fresh.name(f"{base}.stack{number}") if many else base


def _is_padding(units: IntArray) -> NDArray[np.bool_]:
    """Which places of blocks (G, c) repeat the unit before them."""
    padding = np.zeros(units.shape, bool)
    padding[:, 1:] = units[:, 1:] == units[:, :-1]
    return padding
