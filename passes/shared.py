"""Emission ``shared``: equal columns computed once and repeated, inputs of equal rows added first.

    x --[Slice | ArrayFeatureExtractor | Gather, ReduceSum, Concat]--> smaller product
      --[Pad | ArrayFeatureExtractor | Gather]--> y

A run of copies at either end of the outputs is padding with the edge, which needs no shapes at run time. Copies in
other places are taken one by one: a Gather along the last axis is several times slower at that on the CPU than
ArrayFeatureExtractor, and takes what the smaller product saves from a few rows on.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_graphsurgeon as gs

from onnx_decompose.graph.sites import attribute_values
from onnx_decompose.model.metadata import Block
from onnx_decompose.passes.splice import Placed

if TYPE_CHECKING:
    from collections.abc import Mapping

    import onnx
    from numpy.typing import NDArray

    from onnx_decompose.graph.regions import Region
    from onnx_decompose.model.constants import Constants
    from onnx_decompose.passes.tensor_ops import TensorOps, Value
    from onnx_decompose.planning.plan import RegionPlan

__all__ = ["SharedEmitter"]


class SharedEmitter:
    """Writes a region of one site by its different rows and columns; arguments as of ``BranchEmitter``."""

    def __init__(
        self,
        graph: onnx.GraphProto,
        region: Region,
        plan: RegionPlan,
        weights: Mapping[str, NDArray[Any]],
        constants: Constants,
        ops: TensorOps,
    ) -> None:
        assert plan.copies is not None
        (self._site,) = region.sites
        self._graph = graph
        self._region = region
        source, target = (region.axis_of[n] for n in (self._site.input, self._site.output))
        # The units at each place of the two values, and those whose lines are computed.
        self._order = tuple(
            plan.order(axis, region.axis_sizes[axis]) for axis in (source, target)
        )
        self._copies = plan.copies.placed(*self._order)
        self._lines = tuple(
            order[places]
            for order, places in zip(self._order, self._copies.computed, strict=True)
        )
        self._weight = weights[self._site.name]
        self._constants = constants
        self._ops = ops
        self._take = ops.pick if plan.copies.picks else ops.gather

    def emit(self) -> dict[str, tuple[Block, ...]]:
        """Write the product, the biases that copies have in common, the repetition, and the rest as it was."""
        site = self._site
        rest = [index for index in self._region.nodes if index != site.node]
        bias, later = self._bias()
        if self._is_repeated:
            made: Value = gs.Variable(self._ops.fresh.name(f"{site.output}.different"))
            block = self._product(made, bias)
            name, place = site.output, site.node
            while later is None and (follower := self._follower(name)) is not None:
                made = self._narrowed(follower, name, made)
                name, place = self._graph.node[follower].output[0], follower
                rest.remove(follower)
            self._repeat(made, name, place, later)
        else:
            block = self._product(gs.Variable(site.output), bias)
        for index in rest:
            node = self._graph.node[index]
            inputs = [self._constant(other, self._order[1], "placed") for other in node.input]
            self._copy(index, inputs, gs.Variable(node.output[0]))
        return {site.name: (block,)}

    @property
    def _is_repeated(self) -> bool:
        return self._lines[1].size < self._copies.outputs.size

    def _bias(self) -> tuple[Value | None, NDArray[Any] | None]:
        """A Gemm's bias as the smaller product adds it, and as it is added after the repetition; None for neither."""
        node = self._graph.node[self._site.node]
        if len(node.input) < 3 or not node.input[2]:
            return None, None
        name = node.input[2]
        if self._is_common(name):
            return self._constant(name, self._lines[1], "different"), None
        values = self._constants.array(name)[..., self._order[1]]
        factor = np.asarray(attribute_values(node).get("beta", 1.0), values.dtype)
        # Operator sets under 11 do not let a Gemm be without a bias.
        zero = self._ops.fresh.constant(f"{name}.zero", np.zeros(1, values.dtype))
        return (zero if self._ops.opset < 11 else None), factor * values

    def _product(self, made: Value, bias: Value | None) -> Block:
        """The site on its different rows and columns."""
        site, copies = self._site, self._copies
        rows, columns = self._lines
        flipped = bool(attribute_values(self._graph.node[site.node]).get("transB", 0))
        different = self._weight[np.ix_(rows, columns)]
        tensor = self._ops.fresh.constant(
            f"{site.tensor}.different", different.T if flipped else different
        )
        inputs = [self._added_inputs(), tensor, *(() if bias is None else (bias,))]
        self._copy(site.node, inputs, made)
        return Block(
            self._order[0],
            self._order[1],
            tensor.name,
            flipped,
            stored_rows=None if rows.size == copies.inputs.size else copies.inputs,
            stored_columns=copies.outputs if self._is_repeated else None,
        )

    def _added_inputs(self) -> Value:
        """The input with the units of equal rows added, in the order of the different rows."""
        name, place, copies = self._site.input, self._site.node, self._copies
        value = gs.Variable(name)
        if not copies.added:
            return value
        parts: list[Value] = []
        if copies.alone.size:
            parts.append(self._taken(value, copies.alone, "alone"))
        for number, units in enumerate(copies.added):
            total = gs.Variable(self._ops.fresh.name(f"{name}.total{number}"))
            self._ops.total(self._taken(value, units, f"equal{number}"), total, name, place)
            parts.append(total)
        if len(parts) == 1:
            return parts[0]
        joined = gs.Variable(self._ops.fresh.name(f"{name}.added"))
        self._ops.concat(parts, joined, name, place)
        return joined

    def _taken(self, value: Value, units: NDArray[np.intp], what: str) -> Value:
        place = self._site.node
        part = gs.Variable(self._ops.fresh.name(f"{value.name}.{what}"))
        if units[-1] - units[0] + 1 == units.size:
            self._ops.slice(value, int(units[0]), int(units[-1]) + 1, part, place)
        else:
            self._take(value, units, part, value.name, place)
        return part

    def _repeat(self, made: Value, name: str, place: int, bias: NDArray[Any] | None) -> None:
        """Make the value ``name`` from its different columns, with a bias that copies have not in common."""
        output = gs.Variable(name if bias is None else self._ops.fresh.name(f"{name}.repeated"))
        edges = self._copies.edges
        padded = edges is not None and self._weight.dtype.name != "bfloat16"
        if padded and self._ops.can_pad(self._site.output):
            assert edges is not None
            self._ops.pad(made, edges, output, self._site.output, place)
        else:
            self._take(made, self._copies.outputs, output, self._site.output, place)
        if bias is not None:
            constant = self._ops.fresh.constant(f"{name}.bias", bias)
            self._note_bias(constant)
            self._ops.add("Add", [output, constant], [gs.Variable(name)], place)

    def _follower(self, name: str) -> int | None:
        """The node that adds to ``name`` a bias that copies have in common, where nothing else reads ``name``."""
        readers = [
            index for index in self._region.nodes if name in self._graph.node[index].input
        ]
        if name in self._region.exits or len(readers) != 1:
            return None
        node = self._graph.node[readers[0]]
        others = [other for other in node.input if other != name]
        if node.op_type != "Add" or len(others) != 1 or others[0] not in self._constants:
            return None
        return readers[0] if self._is_common(others[0]) else None

    def _narrowed(self, index: int, name: str, made: Value) -> Value:
        """Write node ``index`` on the different columns of the value ``name`` that it reads."""
        node = self._graph.node[index]
        inputs = [
            made if other == name else self._constant(other, self._lines[1], "different")
            for other in node.input
        ]
        result = gs.Variable(self._ops.fresh.name(f"{node.output[0]}.different"))
        self._copy(index, inputs, result)
        return result

    def _is_common(self, name: str) -> bool:
        """Whether all copies of a column have the same entry of the constant ``name``."""
        if not self._is_per_unit(name):
            return True
        values = self._constants.array(name)
        represented = values[..., self._lines[1]][..., self._copies.outputs]
        return values[..., self._order[1]].tobytes() == represented.tobytes()

    def _constant(self, name: str, units: NDArray[np.intp], what: str) -> Value:
        """The value ``name``; if it is a constant with an entry per output, only for the given ``units``."""
        if not self._is_per_unit(name):
            return gs.Variable(name)
        values = self._constants.array(name)
        if np.array_equal(units, np.arange(self._copies.outputs.size)):
            self._ops.note(name, units, name, rows=math.prod(values.shape[:-1]))
            return gs.Variable(name)
        values = values[..., units]
        stored = self._ops.fresh.constant(f"{name}.{what}", values)
        self._ops.note(name, units, stored.name, rows=math.prod(values.shape[:-1]))
        return stored

    def _note_bias(self, stored: gs.Constant) -> None:
        """Write down where a Gemm's bias lies that is added after the repetition, unless a factor went into it."""
        node = self._graph.node[self._site.node]
        if attribute_values(node).get("beta", 1.0) == 1.0:
            rows = math.prod(stored.values.shape[:-1])
            self._ops.note(node.input[2], self._order[1], stored.name, rows=rows)

    def _is_per_unit(self, name: str) -> bool:
        if name not in self._constants:
            return False
        shape = self._constants[name].shape
        return bool(shape) and shape[-1] == self._copies.outputs.size

    def _copy(self, index: int, inputs: list[Value], output: Value) -> None:
        node = self._graph.node[index]
        copy = gs.Node(node.op_type, node.name or node.output[0], {}, [*inputs], [output])
        self._ops.placed.append(Placed(copy, index, node))
