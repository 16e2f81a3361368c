"""Values inside bodies made visible outside: rows of every iteration, of every sample that took the branch.

The flat graph is closed again as it stands, calls and lowered products left open, with one more output for each value:

    If      an output of both branches; the branch that does not make the value gives no rows
    Loop    a state to which every iteration adds its rows, so that their number may change, and none is fine
    Scan    an output of every step, joined outside: all steps have the same number of rows

Where a value in a branch is wanted of two versions of a model, the conditions tell whether their rows belong together.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np
import onnx
from onnx import helper, numpy_helper

from onnx_decompose.graph.closing import Segment, parsed
from onnx_decompose.graph.flat import CLOSED_DOMAIN, Flat, flat_name
from onnx_decompose.model.renames import defined_names, subgraphs
from onnx_decompose.model.shapes import opset_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray


__all__ = ["Exposed", "Inside", "Shown", "exposed"]

_FROM_OPSET = 9
"""Operator set in which Scan took the form that it has since."""


@dataclasses.dataclass(frozen=True, slots=True)
class Shown:
    """What a value inside a body comes out as.

    Attributes:
        shape: of no rows of it: 0 and the other axes, each 0 where its size is not known.
        elem_type: of its entries.
    """

    shape: tuple[int, ...]
    elem_type: int


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Exposed:
    """A main graph that makes values from inside.

    Attributes:
        nodes: in order.
        names: flat name of a value inside a body -> what it is called outside.
    """

    nodes: Sequence[onnx.NodeProto]
    names: Mapping[str, str]


class Inside:
    """Where the values of a flat graph are made.

    Args:
        flat: a model, opened.
    """

    def __init__(self, flat: Flat) -> None:
        self._flat = flat
        self.main = parsed(flat.model.proto.graph)
        self._paths: dict[str, tuple[int, ...]] = {}
        self._visit(self.main, ())

    def _visit(self, segment: Segment, path: tuple[int, ...]) -> None:
        if segment.number >= 0 and self._flat.opened[segment.number].body is not None:
            path = (*path, segment.number)
            opened = self._flat.opened[segment.number]
            self._paths.update(dict.fromkeys(opened.values, path))
        for item in segment.items:
            if isinstance(item, Segment):
                self._visit(item, path)
            elif path:
                self._paths.update(dict.fromkeys(item.output, path))

    def path(self, value: str) -> tuple[int, ...]:
        """The bodies around a value, by number, from the outermost on; none in the main graph."""
        return self._paths.get(value, ())

    def is_iterated(self, value: str) -> bool:
        """Whether a body around a value may run several times."""
        return any(operator != "If" for operator in self.owners(value))

    def owners(self, value: str) -> list[str]:
        """The operators whose bodies a value is in, from the outermost on."""
        return [self._flat.opened[number].owner.op_type for number in self.path(value)]

    def choices(self, value: str) -> list[str]:
        """The conditions of the branches around a value, from the outermost on."""
        owners = [self._flat.opened[number].owner for number in self.path(value)]
        return [owner.input[0] for owner in owners if owner.op_type == "If"]

    def refusal(self, value: str) -> str | None:
        """Why a value cannot be seen from outside; None if it can, as far as the graph tells."""
        owners = self.owners(value)
        if not owners:
            return None
        if opset_of(self._flat.source.proto) < _FROM_OPSET:
            return f"it is inside a graph of an operator set before {_FROM_OPSET}"
        if "Scan" in owners and "If" in owners[owners.index("Scan") :]:
            return (
                "it is in a branch inside a Scan, whose steps all give the same number of rows"
            )
        return None


def exposed(flat: Flat, wanted: Mapping[str, Shown]) -> Exposed:
    """The main graph of ``flat``, closed, with values from inside bodies.

    Args:
        flat: a model, opened, or a changed version of it.
        wanted: flat name of a value inside a body -> what it comes out as.
    """
    if not flat.opened:
        return Exposed(flat.model.proto.graph.node, {})
    exposer = _Exposer(flat, wanted)
    nodes = list(exposer.nodes(exposer.inside.main))
    return Exposed(nodes, exposer.names)


class _Exposer:
    """Closes one flat graph."""

    def __init__(self, flat: Flat, wanted: Mapping[str, Shown]) -> None:
        self.inside = Inside(flat)
        self.names: dict[str, str] = {}
        """What each value is called in the graph that the walk is in."""
        self._flat = flat
        self._wanted = wanted
        self._bodies: dict[tuple[str, ...], list[Segment]] = {}
        by_number = {segment.number: segment for segment in self.inside.main.segments()}
        for number, opened in enumerate(flat.opened):
            if opened.body is not None:
                self._bodies.setdefault(tuple(opened.owner.output), []).append(
                    by_number[number]
                )
        self._taken = 0

    def nodes(self, segment: Segment) -> Iterator[onnx.NodeProto]:
        """The nodes of a segment; what bodies in it make comes out."""
        for item in segment.items:
            if isinstance(item, onnx.NodeProto):
                yield from self._owner(item) if item.domain == CLOSED_DOMAIN else (item,)
            elif self._flat.opened[item.number].body is None:
                yield from self.nodes(item)

    def _owner(self, stand_in: onnx.NodeProto) -> list[onnx.NodeProto]:
        """The node that ``stand_in`` stands for, what it needs before it, and what is made of its outputs."""
        bodies = self._bodies[tuple(stand_in.output)]
        owner = onnx.NodeProto()
        owner.CopyFrom(self._flat.opened[bodies[0].number].owner)
        graphs = [graph for _, graph in subgraphs(owner)]
        made = [
            [value for value in self._wanted if body.number in self.inside.path(value)]
            for body in bodies
        ]
        for body, graph in zip(bodies, graphs, strict=True):
            self._fill(graph, body)
        nodes = [owner]
        for number, values in enumerate(made):
            for value in values:
                inner, outer = self.names[value], self._fresh(value)
                self.names[value] = outer
                shown = self._wanted[value]
                if owner.op_type == "If":
                    self._choose(owner, graphs, number, (inner, outer), shown)
                elif owner.op_type == "Loop":
                    nodes.insert(0, self._collect(owner, graphs[0], (inner, outer), shown))
                else:
                    nodes += self._join(owner, graphs[0], (inner, outer), shown)
        return nodes

    def _fill(self, graph: onnx.GraphProto, body: Segment) -> None:
        """Put the nodes of a segment into its body, under their flat names; constants stay in the main graph."""
        opened = self._flat.opened[body.number]
        own = {name: flat_name(opened.label, name) for name in defined_names(graph)}
        captured = {
            flat: outside for flat, outside in opened.values.items() if flat not in own.values()
        }
        inner = own | {outside: flat for flat, outside in captured.items()}
        nodes = [
            helper.make_node("Identity", [outside], [flat])
            for flat, outside in captured.items()
        ]
        nodes += self.nodes(body)
        for value, shown in self._wanted.items():
            if self.inside.path(value)[-1:] == (body.number,):
                self.names[value] = self._fresh(value)
                nodes += self._rows(value, self.names[value], shown)
        here = {name for node in nodes for name in node.output}
        for given in graph.input:
            given.name = own[given.name]
        here.update(given.name for given in graph.input)
        for output in graph.output:
            output.name = inner.get(output.name, output.name)
            if output.name not in here:  # a body does not give what it did not make
                name = self._fresh(output.name)
                nodes.append(helper.make_node("Identity", [output.name], [name]))
                output.name = name
        del graph.node[:]
        graph.node.extend(nodes)
        for field in ("initializer", "sparse_initializer", "value_info"):
            del getattr(graph, field)[:]
        del graph.quantization_annotation[:]

    def _rows(self, value: str, name: str, shown: Shown) -> list[onnx.NodeProto]:
        """``name`` as the value with all axes but the last in one; a value with positions as it is."""
        if len(shown.shape) > 2:
            return [helper.make_node("Identity", [value], [name])]
        shape = self._constant(name, np.array([-1, *shown.shape[1:]]))
        return [shape, helper.make_node("Reshape", [value, shape.output[0]], [name])]

    def _choose(
        self,
        owner: onnx.NodeProto,
        graphs: Sequence[onnx.GraphProto],
        number: int,
        names: tuple[str, str],
        shown: Shown,
    ) -> None:
        """What branch ``number`` makes, or no rows."""
        inner, outer = names
        for place, graph in enumerate(graphs):
            made = inner
            if place != number:
                none = self._none(inner, shown)
                graph.node.append(none)
                made = none.output[0]
            graph.output.append(_value(made, shown))
        owner.output.append(outer)

    def _collect(
        self,
        owner: onnx.NodeProto,
        graph: onnx.GraphProto,
        names: tuple[str, str],
        shown: Shown,
    ) -> onnx.NodeProto:
        """Let every iteration add its rows; returns what makes no rows to begin with."""
        inner, outer = names
        before, after = self._fresh(inner), self._fresh(inner)
        none = self._none(outer, shown)
        owner.input.extend("" for _ in range(len(owner.input), 2))
        states = len(owner.input) - 2
        owner.input.append(none.output[0])
        owner.output.insert(states, outer)
        graph.input.append(_value(before, shown))
        graph.output.insert(states + 1, _value(after, shown))
        graph.node.append(helper.make_node("Concat", [before, inner], [after], axis=0))
        return none

    def _join(
        self,
        owner: onnx.NodeProto,
        graph: onnx.GraphProto,
        names: tuple[str, str],
        shown: Shown,
    ) -> list[onnx.NodeProto]:
        """Join what all steps make; returns what does it."""
        inner, outer = names
        steps = self._fresh(inner)
        owner.output.extend("" for _ in range(len(owner.output), len(graph.output)))
        owner.output.append(steps)
        graph.output.append(_value(inner, shown))
        for attribute in owner.attribute:
            if attribute.name in {"scan_output_axes", "scan_output_directions"}:
                attribute.ints.append(0)
        if len(shown.shape) <= 2:
            return self._rows(steps, outer, shown)
        names_ = [self._fresh(outer) for _ in range(3)]
        axes = self._constant(outer, np.arange(2, len(shown.shape) + 1))
        all_ = self._constant(outer, np.array([-1]))
        return [
            axes,
            all_,
            helper.make_node("Shape", [steps], [names_[0]]),
            helper.make_node("Gather", [names_[0], axes.output[0]], [names_[1]]),
            helper.make_node("Concat", [all_.output[0], names_[1]], [names_[2]], axis=0),
            helper.make_node("Reshape", [steps, names_[2]], [outer]),
        ]

    def _none(self, name: str, shown: Shown) -> onnx.NodeProto:
        tensor = helper.make_tensor("", shown.elem_type, shown.shape, b"", raw=True)
        return helper.make_node("Constant", [], [self._fresh(name)], value=tensor)

    def _constant(self, name: str, values: NDArray[np.int64]) -> onnx.NodeProto:
        tensor = numpy_helper.from_array(values.astype(np.int64))
        return helper.make_node("Constant", [], [self._fresh(name)], value=tensor)

    def _fresh(self, name: str) -> str:
        self._taken += 1
        return f"{name.partition('//rows//')[0]}//rows//{self._taken}"


def _value(name: str, shown: Shown) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, shown.elem_type, [None] * len(shown.shape))
