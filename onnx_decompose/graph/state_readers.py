"""Who reads the hidden units of a recurrent operator: sites and other recurrent operators, each unit as one input.

    Y --[Squeeze, Transpose, Gather, Slice, Reshape, mean over time, Relu, ...]--> MatMul, Gemm, the next operator

Where nothing else does, a unit that all of them leave out need not be made: what stands in its place is multiplied with
zeros.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from onnx_decompose.graph.regions import value_readers
from onnx_decompose.graph.sites import attribute_values, is_standard

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    import onnx

    from onnx_decompose.graph.recurrent import RecurrentSite
    from onnx_decompose.graph.sites import Site
    from onnx_decompose.model.constants import Constants
    from onnx_decompose.model.shapes import Dim

__all__ = ["StateReaders", "find_state_readers"]

_RANKS = {0: 4, 1: 3}
"""Axes of Y and Y_h; the units are the last one."""

_UNARY = frozenset(
    {
        *("Abs", "Cast", "Clip", "Dropout", "Elu", "Gelu", "HardSigmoid", "HardSwish"),
        *("Identity", "LeakyRelu", "Neg", "Relu", "Selu", "Sigmoid", "Softplus", "Softsign"),
        "Tanh",
    }
)
"""Elementwise, and finite where what they read is."""

_REDUCTIONS = frozenset({"ReduceMax", "ReduceMean", "ReduceSum"})


@dataclasses.dataclass(frozen=True, slots=True)
class StateReaders:
    """All that reads the units of a recurrent operator, each as one of its inputs.

    Attributes:
        sites: products.
        cells: recurrent operators.
    """

    sites: tuple[Site, ...]
    cells: tuple[RecurrentSite, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class _Layout:
    """Where a value has the units.

    Attributes:
        rank: number of its axes.
        axis: that of the units, from the first.
    """

    rank: int
    axis: int


def find_state_readers(
    graph: onnx.GraphProto,
    cell: RecurrentSite,
    sites: Iterable[Site],
    cells: Iterable[RecurrentSite],
    known: tuple[Constants, Mapping[str, tuple[Dim, ...]]],
) -> StateReaders | None:
    """All that reads the units of ``cell``; None where something does that needs them all, or has two directions.

    Args:
        graph: the main graph.
        cell: a recurrent operator of it.
        sites: the products that may leave units out.
        cells: the recurrent operators that may.
        known: the graph's constants, and what is known of shapes.
    """
    if len(cell.directions) > 1 or cell.outputs[2:] not in {(), ("",)}:
        return None
    walk = _Walk(graph, cell, (sites, cells), known)
    return walk.readers() if walk.follow() else None


class _Walk:
    """From the outputs of a recurrent operator to all that reads its units."""

    def __init__(
        self,
        graph: onnx.GraphProto,
        cell: RecurrentSite,
        may_read: tuple[Iterable[Site], Iterable[RecurrentSite]],
        known: tuple[Constants, Mapping[str, tuple[Dim, ...]]],
    ) -> None:
        self._graph, self._cell = graph, cell
        self._sites = {site.node: site for site in may_read[0]}
        self._cells = {other.node: other for other in may_read[1]}
        self._constants, self._shapes = known
        self._found: dict[int, None] = {}

    def readers(self) -> StateReaders:
        """What was found."""
        return StateReaders(
            tuple(self._sites[index] for index in self._found if index in self._sites),
            tuple(self._cells[index] for index in self._found if index in self._cells),
        )

    def follow(self) -> bool:
        """Go all ways; whether each of them ends at an operator that may leave units out."""
        readers = value_readers(self._graph)
        waiting = [
            (name, _Layout(_RANKS[kind], _RANKS[kind] - 1))
            for kind, name in enumerate(self._cell.outputs[:2])
            if name
        ]
        while waiting:
            name, layout = waiting.pop()
            for index in readers.get(name, ()):
                if index >= 0 and self._graph.node[index].op_type == "Shape":
                    continue
                after = None if index < 0 else self._step(index, name, layout)
                if after is None:
                    return False
                if index not in self._found:
                    waiting.append((self._graph.node[index].output[0], after))
        return True

    def _step(self, index: int, name: str, layout: _Layout) -> _Layout | None:
        """Where what a node makes of a value has the units; None where it does not keep them apart."""
        node = self._graph.node[index]
        if list(node.input).count(name) != 1 or node.input[0] != name:
            return None
        if index in self._sites:
            site = self._sites[index]
            fits = (site.units[0], site.unit_axis) == (
                self._cell.hidden,
                layout.axis - layout.rank,
            )
        elif index in self._cells:
            inputs = self._cells[index].weights[0][0].shape[0]
            fits = (layout, inputs) == (_Layout(3, 2), self._cell.hidden)
        else:
            known = is_standard(node) and not any(node.output[1:])
            return self._after(node, layout) if known else None
        if fits:
            self._found[index] = None
        return layout if fits else None

    def _after(self, node: onnx.NodeProto, layout: _Layout) -> _Layout | None:
        """The same of a node that is no product."""
        if node.op_type in _UNARY:
            return layout
        if node.op_type == "Transpose":
            turned = reversed(range(layout.rank))
            order = list(attribute_values(node).get("perm", turned))
            return _Layout(layout.rank, order.index(layout.axis))
        if node.op_type == "Reshape":
            return self._reshaped(node, layout)
        if node.op_type == "Gather":
            return self._gathered(node, layout)
        axes = self._axes(node)
        return None if axes is None else _along(node, axes, layout)

    def _reshaped(self, node: onnx.NodeProto, layout: _Layout) -> _Layout | None:
        """The last axis stays what it is where it stays as long; an unknown length has to be that which readers ask."""
        shape = self._shapes.get(node.output[0], ())
        last = self._cell.hidden if not shape or not isinstance(shape[-1], int) else shape[-1]
        kept = layout.axis == layout.rank - 1 and shape and last == self._cell.hidden
        return _Layout(len(shape), len(shape) - 1) if kept else None

    def _gathered(self, node: onnx.NodeProto, layout: _Layout) -> _Layout | None:
        along = attribute_values(node).get("axis", 0) % layout.rank
        name = node.input[1]
        known = self._constants[name].shape if name in self._constants else None
        shape = self._shapes.get(name) if known is None else known
        if along == layout.axis or shape is None:
            return None
        more = len(shape) - 1
        return _Layout(layout.rank + more, layout.axis + (more if along < layout.axis else 0))

    def _axes(self, node: onnx.NodeProto) -> list[int] | None:
        """The axes that an operator works along, where they are known."""
        axes = attribute_values(node).get("axes")
        if axes is not None:
            return list(axes)
        name = "".join(node.input[(3 if node.op_type == "Slice" else 1) :][:1])
        if name not in self._constants:
            return None
        return [int(number) for number in self._constants.array(name).reshape(-1)]


def _along(node: onnx.NodeProto, axes: Sequence[int], layout: _Layout) -> _Layout | None:
    """Where the units are behind an operator that takes away, adds, or shortens ``axes``."""
    rank, axis, op = layout.rank, layout.axis, node.op_type
    if op == "Unsqueeze":
        rank += len(axes)
        places = {number % rank for number in axes}
        return _Layout(rank, [place for place in range(rank) if place not in places][axis])
    places = {number % rank for number in axes}
    if axis in places or op not in {"Squeeze", "Slice"} | _REDUCTIONS:
        return None
    if op == "Slice" or (op in _REDUCTIONS and attribute_values(node).get("keepdims", 1)):
        return layout
    return _Layout(rank - len(places), axis - sum(place < axis for place in places))
