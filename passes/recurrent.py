"""Recurrent sites as several smaller recurrent operators: independent ones side by side, dependent ones in cascade.

    X --[Gather]--> inputs --+
                             Concat --> cell --Y--> [Concat, Gather] --> Y
    earlier cell's Y --[shifted by a step]--+

Units that no cell makes are zeros in Y: nothing that reads them does anything with them.

What a cell reads of an earlier one is that one's output of the step before: its Y shifted by one step along the time
axis, the initial state first (last, where time runs in reverse).
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnx_decompose.analysis.recurrence import unit_columns
from onnx_decompose.errors import PassError
from onnx_decompose.graph.sites import attribute_values
from onnx_decompose.model.metadata import Block, SlicedConstant
from onnx_decompose.model.model_io import Model
from onnx_decompose.model.shapes import opset_of
from onnx_decompose.passes.base import GraphPass, PassResult, check_model
from onnx_decompose.passes.splice import Fresh, Placed, constant_nodes, splice, with_nodes

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    from onnx_decompose.graph.recurrent import RecurrentSite, RecurrentWeight
    from onnx_decompose.passes.tensor_ops import Value
    from onnx_decompose.planning.plan_recurrent import Cell, RecurrentPlan

__all__ = ["ReplaceRecurrentWeights", "RewriteRecurrent"]

_TIME, _UNITS_OF_Y, _UNITS_OF_STATE = 0, 3, 2
_OUTPUTS = ("Y", "Y_h", "Y_c")
_Y, _Y_H, _Y_C = range(3)
_OUTPUT_AXES = {_Y: (1, _UNITS_OF_Y), _Y_H: (0, _UNITS_OF_STATE), _Y_C: (0, _UNITS_OF_STATE)}
"""Direction axis and unit axis of each output."""


@dataclasses.dataclass(frozen=True, eq=False)
class RewriteRecurrent(GraphPass):
    """Write some recurrent sites as smaller operators.

    Attributes:
        plans: the sites and how each is written.
        weight: gives the annealed weight of a site's operand and direction, (K, gates * H).
        record: filled with how each weight is spread over blocks, name -> blocks in the order of the cells.
        constants: filled with how each B and P, (directions, parts * H), is, name -> blocks of one row.
    """

    plans: Sequence[tuple[RecurrentSite, RecurrentPlan]]
    weight: Callable[[RecurrentWeight], NDArray[Any]]
    record: dict[str, tuple[Block, ...]] = dataclasses.field(default_factory=dict)
    constants: dict[str, SlicedConstant] = dataclasses.field(default_factory=dict)

    def touched(self, model: Model) -> frozenset[int]:
        """The sites' nodes, and the constant nodes that only they read."""
        graph = model.proto.graph
        return frozenset({site.find(graph) for site, _ in self.plans} | constant_nodes(graph))

    def call(self, model: Model) -> PassResult:
        """Emit every site, then splice."""
        if not self.plans:
            return PassResult(model, modified=False)
        graph = model.proto.graph
        ops = _Ops(opset_of(model.proto), Fresh(graph))
        for site, plan in self.plans:
            ops.place = site.find(graph)
            node = graph.node[ops.place]
            writer = _SiteWriter(node, site, plan, self.weight, ops)
            self.record.update(writer.write())
            self.constants.update(writer.constants)
        removed = [site.find(graph) for site, _ in self.plans]
        made = {name for site, _ in self.plans for name in site.outputs}
        proto = splice(model.proto, removed, ops.placed, unchanged=made)
        return PassResult(Model(proto, model.path), modified=True)

    def ensures(self, before: Model, after: Model) -> None:
        """Also: a model that was valid stays valid, with full shape inference."""
        GraphPass.ensures(self, before, after)
        fault = check_model(after)
        if fault is not None and check_model(before) is None:
            raise PassError(f"RewriteRecurrent: the rewritten model is not valid: {fault}")


@dataclasses.dataclass(frozen=True, eq=False)
class ReplaceRecurrentWeights(GraphPass):
    """Give some recurrent sites new dense weights, and leave every other reader of the old tensors alone.

    Attributes:
        sites: the sites.
        weights: name of a weight of theirs -> its new value, (K, gates * H); a weight not named stays.
    """

    sites: Sequence[RecurrentSite]
    weights: Mapping[str, NDArray[Any]]

    def touched(self, model: Model) -> frozenset[int]:
        """The sites, which read tensors of their own now, and the constant nodes that only they read."""
        graph = model.proto.graph
        return frozenset({site.find(graph) for site in self.sites} | constant_nodes(graph))

    def call(self, model: Model) -> PassResult:
        """Add an initializer for each new weight and point the site's node to it."""
        changed = [
            (site, position, pair)
            for site in self.sites
            for position, pair in enumerate(zip(*site.weights, strict=True), start=1)
            if any(weight.name in self.weights for weight in pair)
        ]
        if not changed:
            return PassResult(model, modified=False)
        nodes = list(model.proto.graph.node)
        fresh = Fresh(model.proto.graph)
        tensors: dict[str, gs.Constant] = {}
        for site, position, directions in changed:
            stored = [self.weights.get(weight.name, weight.array).T for weight in directions]
            tensor = fresh.constant(f"{directions[0].tensor}.annealed", np.stack(stored))
            tensors[tensor.name] = tensor
            index = site.find(model.proto.graph)
            node = onnx.NodeProto()
            node.CopyFrom(nodes[index])
            node.input[position] = tensor.name
            nodes[index] = node
        proto = with_nodes(model.proto, nodes, tensors.values())
        return PassResult(Model(proto, model.path), modified=True)


class _Ops:
    """Helper nodes in the form that the model's operator set has; ``place`` is where they go."""

    def __init__(self, opset: int, fresh: Fresh) -> None:
        self._opset = opset
        self.fresh = fresh
        self.placed: list[Placed] = []
        self.place = 0

    def variable(self, wanted: str) -> gs.Variable:
        """A new value."""
        return gs.Variable(self.fresh.name(wanted))

    def add(self, op: str, inputs: Sequence[Value], output: Value, **attrs: Any) -> Value:
        """Add a helper node that makes ``output``."""
        name = self.fresh.name(f"{output.name}.{op}")
        node = gs.Node(op, name, attrs, list(inputs), [output])
        self.placed.append(Placed(node, self.place, None))
        return output

    def integers(self, wanted: str, values: Sequence[int]) -> gs.Constant:
        """A constant of integers."""
        return self.fresh.constant(wanted, np.asarray(values, np.int64))

    def slice(self, value: Value, start: int, stop: int, axis: int, wanted: str) -> Value:
        """Entries ``start`` to ``stop`` along ``axis``."""
        output = self.variable(wanted)
        bounds = [
            self.integers(f"{output.name}.{what}", [number])
            for what, number in (("start", start), ("stop", stop), ("axis", axis))
        ]
        return self.add("Slice", [value, *bounds], output)

    def select(
        self, value: Value, units: NDArray[np.intp], size: int, axis: int, wanted: str
    ) -> Value:
        """The ascending ``units`` of the ``size`` ones along ``axis``."""
        if units.size == size:
            return value
        if units[-1] - units[0] + 1 == units.size:
            return self.slice(value, int(units[0]), int(units[-1]) + 1, axis, wanted)
        indices = self.integers(f"{wanted}.units", units.tolist())
        return self.add("Gather", [value, indices], self.variable(wanted), axis=axis)

    def concat(self, values: Sequence[Value], axis: int, output: Value) -> Value:
        """``values`` along ``axis``."""
        return self.add("Concat", values, output, axis=axis)

    def squeeze(self, value: Value, axis: int) -> Value:
        """``value`` without an axis of size 1."""
        output = self.variable(f"{value.name}.squeezed")
        if self._opset < 13:
            return self.add("Squeeze", [value], output, axes=[axis])
        return self.add("Squeeze", [value, self.integers("recurrent.axis", [axis])], output)

    def pad(self, value: Value, pads: Sequence[int]) -> Value:
        """Zeros before and after each axis; a negative number takes entries away."""
        lengths = self.integers(f"{value.name}.pads", pads)
        return self.add("Pad", [value, lengths], self.variable(f"{value.name}.padded"))


class _SiteWriter:
    """Writes one site."""

    def __init__(
        self,
        node: onnx.NodeProto,
        site: RecurrentSite,
        plan: RecurrentPlan,
        weight: Callable[[RecurrentWeight], NDArray[Any]],
        ops: _Ops,
    ) -> None:
        self._node = node
        self._site = site
        self._plan = plan
        self._weight = weight
        self._ops = ops
        self._rows: dict[str, list[Block]] = {}

    @property
    def constants(self) -> dict[str, SlicedConstant]:
        """Where the parts of B and P are stored, by the value's name."""
        return {
            self._site.operands[operand]: SlicedConstant(
                (len(stored), stored[0].size), tuple(self._rows[operand])
            )
            for operand, stored in self._site.biases.items()
        }

    def write(self) -> dict[str, tuple[Block, ...]]:
        """Write every direction and put their outputs together.

        Returns:
            Weight name -> where its parts are stored.
        """
        record: dict[str, tuple[Block, ...]] = {}
        outputs: list[dict[int, Value]] = []
        for number in range(len(self._site.directions)):
            writer = _DirectionWriter(
                self._node, self._site, self._plan.directions[number].cells, number, self._ops
            )
            w, r = self._site.weights[number]
            writer.write(self._weight(w), self._weight(r))
            record[w.name], record[r.name] = tuple(writer.w_blocks), tuple(writer.r_blocks)
            for operand, blocks in writer.rows.items():
                self._rows.setdefault(operand, []).extend(blocks)
            outputs.append(writer.joined())
        for kind, name in enumerate(self._site.outputs):
            if name and len(outputs) > 1:
                parts = [direction[kind] for direction in outputs]
                self._ops.concat(parts, _OUTPUT_AXES[kind][0], gs.Variable(name))
        return record


class _DirectionWriter:
    """Writes one direction of a site."""

    def __init__(
        self,
        node: onnx.NodeProto,
        site: RecurrentSite,
        cells: Sequence[Cell],
        number: int,
        ops: _Ops,
    ) -> None:
        self._node = node
        self._site = site
        self._cells = cells
        self._number = number
        self._ops = ops
        self._direction = site.directions[number]
        side = f".{self._direction}" if len(site.directions) > 1 else ""
        self._base = f"{site.name}{side}"
        self._states: dict[tuple[str, int], Value] = {}
        self._shifted: dict[int, Value] = {}
        self._outputs: list[dict[int, Value]] = []
        self.w_blocks: list[Block] = []
        self.r_blocks: list[Block] = []
        self.rows: dict[str, list[Block]] = {}

    def write(self, w: NDArray[Any], r: NDArray[Any]) -> None:
        """Write the cells, each after those that it reads; ``w`` is (I, gates * H), ``r`` (H, gates * H)."""
        for number, cell in enumerate(self._cells):
            x, sources = self._input(number, cell, w.shape[0])
            columns = unit_columns(cell.units, self._site.hidden, self._site.gates)
            feed = np.concatenate(
                [w[np.ix_(cell.inputs, columns)], r[np.ix_(sources, columns)]]
            )
            back = r[np.ix_(cell.units, columns)]
            feed_tensor = self._constant("W", number, feed.T)
            back_tensor = self._constant("R", number, back.T)
            self._note(cell, columns, sources, feed_tensor.name, back_tensor.name)
            lengths = self._site.operands.get("sequence_lens")
            inputs: list[Value | None] = [
                x,
                feed_tensor,
                back_tensor,
                self._row("B", number, cell),
                None if lengths is None else gs.Variable(lengths),
                self._state("initial_h", number),
                self._state("initial_c", number),
                self._row("P", number, cell),
            ]
            self._cell(number, cell, inputs)

    def joined(self) -> dict[int, Value]:
        """Each output that is read, with all units of this direction in the original order."""
        if self._is_whole:
            return self._outputs[0]
        order = sorted(range(len(self._cells)), key=lambda n: int(self._cells[n].units[0]))
        made = np.concatenate([self._cells[n].units for n in order])
        where = np.full(self._site.hidden, made.size)  # of those that nobody makes: zeros
        where[made] = np.arange(made.size)
        in_order = bool((np.diff(where) == 1).all())
        found: dict[int, Value] = {}
        for kind, name in enumerate(self._site.outputs):
            if not name:
                continue
            axis = _OUTPUT_AXES[kind][1]
            parts = [self._outputs[n][kind] for n in order]
            if in_order:
                found[kind] = self._ops.concat(parts, axis, self._result(kind))
                continue
            value = parts[0]
            if len(parts) > 1:
                side_by_side = self._ops.variable(f"{self._base}.{_OUTPUTS[kind]}.parts")
                value = self._ops.concat(parts, axis, side_by_side)
            if made.size < self._site.hidden:
                value = self._ops.pad(value, [*(0,) * (2 * axis + 1), 1])
            indices = self._ops.integers(f"{self._base}.units", where.tolist())
            found[kind] = self._ops.add(
                "Gather", [value, indices], self._result(kind), axis=axis
            )
        return found

    @property
    def _is_whole(self) -> bool:
        """Whether one cell makes all units."""
        return len(self._cells) == 1 and self._cells[0].units.size == self._site.hidden

    def _result(self, kind: int) -> Value:
        """This direction's output: the site's own where there is no other direction."""
        if len(self._site.directions) == 1:
            return gs.Variable(self._site.outputs[kind])
        return self._ops.variable(f"{self._base}.{_OUTPUTS[kind]}")

    def _input(self, number: int, cell: Cell, inputs: int) -> tuple[Value, NDArray[np.intp]]:
        """What a cell reads at each step, and the units of other cells in it, in their order."""
        wanted = f"{self._base}.cell{number}.X"
        x = gs.Variable(self._site.operands["X"])
        parts = [self._ops.select(x, cell.inputs, inputs, 2, wanted)]
        sources = [np.empty(0, np.intp)]
        for earlier in range(number):
            made = self._cells[earlier].units
            read = np.flatnonzero(np.isin(made, cell.sources))
            if read.size:
                before = self._before(earlier)
                parts.append(self._ops.select(before, read, made.size, 2, wanted))
                sources.append(made[read])
        if len(parts) == 1:
            return parts[0], sources[0]
        return self._ops.concat(parts, 2, self._ops.variable(wanted)), np.concatenate(sources)

    def _before(self, number: int) -> Value:
        """What a cell made a step before each step, (T, B, units)."""
        if number not in self._shifted:
            y = self._ops.squeeze(self._outputs[number][_Y], 1)
            initial = self._state("initial_h", number)
            backward = self._direction == "reverse"
            if initial is None:
                pads = [-1, 0, 0, 1, 0, 0] if backward else [1, 0, 0, -1, 0, 0]
                self._shifted[number] = self._ops.pad(y, pads)
            else:
                start, stop = (1, np.iinfo(np.int64).max) if backward else (0, -1)
                kept = self._ops.slice(y, start, stop, _TIME, f"{y.name}.kept")
                parts = [kept, initial] if backward else [initial, kept]
                output = self._ops.variable(f"{y.name}.shifted")
                self._shifted[number] = self._ops.concat(parts, _TIME, output)
        return self._shifted[number]

    def _state(self, operand: str, number: int) -> Value | None:
        """A cell's part of an initial state, (1, B, units)."""
        name = self._site.operands.get(operand)
        if name is None:
            return None
        if (operand, number) not in self._states:
            wanted = f"{self._base}.cell{number}.{operand}"
            directions = np.arange(self._number, self._number + 1)
            value = self._ops.select(
                gs.Variable(name), directions, len(self._site.directions), 0, wanted
            )
            units = self._cells[number].units
            self._states[operand, number] = self._ops.select(
                value, units, self._site.hidden, 2, wanted
            )
        return self._states[operand, number]

    def _cell(self, number: int, cell: Cell, inputs: list[Value | None]) -> None:
        """The operator itself."""
        while inputs[-1] is None:
            inputs.pop()
        is_read = any(np.isin(cell.units, later.sources).any() for later in self._cells)
        base = f"{self._base}.cell{number}"
        outputs: list[Value] = []
        for kind, name in enumerate(self._site.outputs):
            if not name and not (kind == _Y and is_read):
                outputs.append(gs.Variable(""))
            elif name and self._is_whole:
                outputs.append(self._result(kind))
            else:
                outputs.append(self._ops.variable(f"{base}.{_OUTPUTS[kind]}"))
        self._outputs.append(dict(enumerate(outputs)))
        node = gs.Node(
            self._node.op_type,
            self._ops.fresh.name(base),
            {
                **self._activations(),
                "hidden_size": cell.units.size,
                "direction": self._direction,
            },
            [gs.Variable("") if value is None else value for value in inputs],
            [*outputs],
        )
        self._ops.placed.append(Placed(node, self._ops.place, self._node))

    def _activations(self) -> dict[str, Any]:
        """The activations of this direction, where they are named; the directions' stand one after the other."""
        named = [a.decode() for a in attribute_values(self._node).get("activations", ())]
        count = len(named) // len(self._site.directions)
        return {"activations": named[self._number * count :][:count]} if named else {}

    def _constant(self, operand: str, number: int, values: NDArray[Any]) -> gs.Constant:
        """A cell's part of a constant, with the direction axis in front."""
        return self._ops.fresh.constant(f"{self._base}.cell{number}.{operand}", values[None])

    def _row(self, operand: str, number: int, cell: Cell) -> gs.Constant | None:
        """A cell's part of B or P."""
        stored = self._site.biases.get(operand)
        if stored is None:
            return None
        parts, hidden = stored[self._number].shape
        columns = unit_columns(cell.units, hidden, parts)
        tensor = self._constant(operand, number, stored[self._number].reshape(-1)[columns])
        row = np.asarray([self._number], np.intp)
        self.rows.setdefault(operand, []).append(Block(row, columns, tensor.name, False))
        return tensor

    def _note(
        self,
        cell: Cell,
        columns: NDArray[np.intp],
        sources: NDArray[np.intp],
        feed: str,
        back: str,
    ) -> None:
        """Record where the parts of W and R are stored: what is read of other cells stands in the cell's W."""
        inputs = cell.inputs.size
        self.w_blocks.append(
            Block(cell.inputs, columns, feed, True, 0, stored_rows=np.arange(inputs))
        )
        if sources.size:
            rows = np.arange(inputs, inputs + sources.size)
            self.r_blocks.append(Block(sources, columns, feed, True, 0, stored_rows=rows))
        self.r_blocks.append(Block(cell.units, columns, back, True, 0))
