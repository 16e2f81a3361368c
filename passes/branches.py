"""Emission ``shrink``, ``split`` and ``triangular``: a region's nodes once per branch, on that branch's units alone.

    entry --[Split | Slice | Gather]--> branch values --> sliced copies of the nodes --[Concat, Gather]--> exit

Interior values never meet: one cut where a value comes in, one join where it goes out. Branches may read the same
units of a value that comes in; they never make the same.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np
import onnx_graphsurgeon as gs

from onnx_decompose.borders import gathered_order, layout_of
from onnx_decompose.metadata import Block
from onnx_decompose.passes.splice import Placed
from onnx_decompose.sites import attribute_values
from onnx_decompose.state_graph import Branch

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import onnx
    from numpy.typing import NDArray

    from onnx_decompose.constants import Constants
    from onnx_decompose.passes.splice import Fresh
    from onnx_decompose.plan import RegionPlan
    from onnx_decompose.regions import Region
    from onnx_decompose.shapes import Dim
    from onnx_decompose.sites import Site

    Value: TypeAlias = gs.Variable | gs.Constant

__all__ = ["BranchEmitter", "Emitter", "TensorOps"]


class Emitter(Protocol):
    """Writes one region in one way; its nodes go to a :class:`TensorOps`."""

    def emit(self) -> dict[str, tuple[Block, ...]]:
        """Write every node of the region, in order.

        Returns:
            Site name -> where the parts of its annealed weight are stored.
        """
        ...


class TensorOps:
    """Operators on the last axis, in the form that the model's operator set has."""

    def __init__(self, opset: int, shapes: Mapping[str, tuple[Dim, ...]], fresh: Fresh) -> None:
        self.opset = opset
        self.shapes = shapes
        self._ranks = {name: len(shape) for name, shape in shapes.items()}
        self.fresh = fresh
        self.placed: list[Placed] = []
        self.constants: dict[str, list[Block]] = {}
        self._noted: set[tuple[str, str, int | None, bytes]] = set()

    def axis(self, value: str) -> int:
        """The last axis of ``value`` as an attribute; negative axes came with operator set 11."""
        return -1 if self.opset >= 11 else self._ranks[value] - 1

    def add(
        self,
        op: str,
        inputs: Sequence[Value],
        outputs: Sequence[Value],
        place: int,
        attrs: dict[str, Any] | None = None,
        *,
        domain: str = "",
    ) -> None:
        """Add a helper node before whatever is placed next."""
        name = self.fresh.name(f"{outputs[0].name}.{op}")
        node = gs.Node(op, name, attrs or {}, list(inputs), list(outputs))
        if domain:
            node.domain = domain
        self.placed.append(Placed(node, place, None))

    def note(
        self,
        constant: str,
        units: NDArray[np.intp],
        stored: str,
        *,
        rows: int = 1,
        transposed: bool = False,
        **places: Any,
    ) -> None:
        """Write down where ``units`` of a per-unit constant lie now; ``places`` as of :class:`Block`.

        An emitter notes every per-unit constant that its nodes read: a folded bias that is not noted cannot be proved.

        Args:
            constant: its name.
            units: some of its units.
            stored: the tensor that holds them.
            rows: entries that each unit has: the product of the axes before the last one.
            transposed: the units are the first of the tensor's axes that are not 1.
            places: fields of the block.
        """
        key = (constant, stored, places.get("part"), units.tobytes())
        if key in self._noted:
            return
        self._noted.add(key)
        block = Block(np.arange(rows), units, stored, transposed, **places)
        self.constants.setdefault(constant, []).append(block)

    def split(
        self,
        value: Value,
        sizes: Sequence[int],
        outputs: Sequence[Value],
        place: int,
        *,
        axis: int | None = None,
    ) -> None:
        """Cut ``value`` into consecutive runs of ``sizes``; along its last axis unless told otherwise."""
        axis = self.axis(value.name) if axis is None else axis
        if self.opset >= 13:
            lengths = self.fresh.constant(f"{value.name}.sizes", np.asarray(sizes, np.int64))
            self.add("Split", [value, lengths], outputs, place, {"axis": axis})
        else:
            self.add("Split", [value], outputs, place, {"axis": axis, "split": list(sizes)})

    def slice(
        self,
        value: Value,
        start: int,
        stop: int,
        output: Value,
        place: int,
        like: str | None = None,
    ) -> None:
        """Units ``start`` to ``stop`` of ``value``; ``like`` is a value of the same rank where it is a new one."""
        axis = self.axis(like or value.name)
        if self.opset < 10:
            attrs = {"starts": [start], "ends": [stop], "axes": [axis]}
            self.add("Slice", [value], [output], place, attrs)
            return
        bounds = [
            self.fresh.constant(f"{output.name}.{what}", np.asarray([number], np.int64))
            for what, number in (("start", start), ("stop", stop), ("axis", axis))
        ]
        self.add("Slice", [value, *bounds], [output], place)

    def gather(
        self, value: Value, units: NDArray[np.intp], output: Value, like: str, place: int
    ) -> None:
        """The given units of ``value``; ``like`` is a value of the same rank."""
        indices = self.fresh.constant(f"{output.name}.units", units.astype(np.int64))
        self.add("Gather", [value, indices], [output], place, {"axis": self.axis(like)})

    def pick(
        self, value: Value, units: NDArray[np.intp], output: Value, like: str, place: int
    ) -> None:
        """The same by an operator that copies by type instead of byte by byte, where the rank is known not to be 1.

        onnxruntime has it for float32 and float64 on the CPU.
        """
        if self._ranks.get(like, 1) < 2:  # of a vector it makes a matrix
            self.gather(value, units, output, like, place)
            return
        indices = self.fresh.constant(f"{output.name}.units", units.astype(np.int64))
        self.add(
            "ArrayFeatureExtractor", [value, indices], [output], place, domain="ai.onnx.ml"
        )

    def can_pad(self, like: str) -> bool:
        """Whether :meth:`pad` can be written: axes can be named since operator set 18, before that all are padded."""
        return self.opset >= 18 or like in self._ranks

    def pad(
        self, value: Value, around: tuple[int, int], output: Value, like: str, place: int
    ) -> None:
        """``value`` with its first and last unit repeated so often before and after it."""
        attrs = {"mode": "edge"}
        if self.opset >= 18:
            pads, axes = np.asarray(around, np.int64), np.asarray([-1], np.int64)
            inputs = [
                self.fresh.constant(f"{output.name}.pads", pads),
                gs.Variable.empty(),
                self.fresh.constant(f"{output.name}.axes", axes),
            ]
            self.add("Pad", [value, *inputs], [output], place, attrs)
            return
        others = [0] * (self._ranks[like] - 1)
        widths = [*others, around[0], *others, around[1]]
        if self.opset < 11:
            self.add("Pad", [value], [output], place, {**attrs, "pads": widths})
            return
        pads = self.fresh.constant(f"{output.name}.pads", np.asarray(widths, np.int64))
        self.add("Pad", [value, pads], [output], place, attrs)

    def total(self, value: Value, output: Value, like: str, place: int) -> None:
        """The sum over the units of ``value``, as one unit."""
        axis = self.axis(like)
        if self.opset >= 13:
            axes = self.fresh.constant(f"{output.name}.axes", np.asarray([axis], np.int64))
            self.add("ReduceSum", [value, axes], [output], place, {"keepdims": 1})
        else:
            self.add("ReduceSum", [value], [output], place, {"axes": [axis], "keepdims": 1})

    def concat(self, values: Sequence[Value], output: Value, like: str, place: int) -> None:
        """``values`` side by side; ``like`` is a value of the same rank."""
        self.add("Concat", values, [output], place, {"axis": self.axis(like)})


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
        flipped = bool(attribute_values(node).get("transB", 0))
        blocks: list[Block] = []
        sources = self._local[site.input]
        for number, output in enumerate(self._outputs(site.output)):
            rows, columns = self._units(site.input, number), self._units(site.output, number)
            block = weight[np.ix_(rows, columns)]
            tensor = self._ops.fresh.constant(
                f"{site.tensor}.block{number}", block.T if flipped else block
            )
            blocks.append(Block(rows, columns, tensor.name, flipped))
            inputs = [sources[number], tensor]
            if len(node.input) > 2 and node.input[2]:
                inputs.append(self._sliced_constant(node.input[2], site.output, number))
            self._copy(node, inputs, output, site.node, number)
        self._blocks[site.name] = tuple(blocks)

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
