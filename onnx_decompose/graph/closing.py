"""From a changed flat graph back to the model: bodies go into their nodes, and untouched calls become calls again."""

from __future__ import annotations

import collections
import dataclasses
from typing import TYPE_CHECKING, Any

import onnx

from onnx_decompose.graph.disjoint_sets import DisjointSets
from onnx_decompose.graph.flat import CLOSED_DOMAIN, Flat, flat_name, marker
from onnx_decompose.graph.regions import reads
from onnx_decompose.model.external_data import external_tensors
from onnx_decompose.model.model_io import Model
from onnx_decompose.model.renames import (
    all_nodes,
    defined_names,
    function_key,
    renamed,
    subgraphs,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping

__all__ = ["Segment", "parsed", "restore"]


def restore(flat: Flat, changed: Model) -> Model:
    """The model that ``changed``, another version of ``flat.model``, stands for.

    Args:
        flat: what the source was opened to.
        changed: as the passes made it; used up.
    """
    if changed is flat.model:
        return flat.source
    if not flat.opened:
        return changed
    return Model(_Closer(flat, changed.proto).proto(), changed.path)


@dataclasses.dataclass(slots=True, eq=False)
class Segment:
    """What lies between two markers: nodes, and other segments among them."""

    number: int
    items: list[onnx.NodeProto | Segment] = dataclasses.field(default_factory=list)

    def nodes(self) -> Iterator[onnx.NodeProto]:
        """All nodes, in order."""
        for item in self.items:
            yield from item.nodes() if isinstance(item, Segment) else (item,)

    def segments(self) -> Iterator[Segment]:
        """All segments inside this one, at any depth."""
        for item in self.items:
            if isinstance(item, Segment):
                yield item
                yield from item.segments()

    def content(self) -> list[bytes]:
        """The nodes in a form that compares."""
        return [node.SerializeToString(deterministic=True) for node in self.nodes()]


class _Closer:
    """Closes one changed flat graph."""

    def __init__(self, flat: Flat, changed: onnx.ModelProto) -> None:
        self._flat = flat
        self._changed = changed
        self._main = parsed(changed.graph)
        now = {segment.number: segment for segment in self._main.segments()}
        self._untouched = _closable(flat, parsed(flat.model.proto.graph), now)
        self._bodies: dict[tuple[str, ...], list[Segment]] = {}
        for number, opened in enumerate(flat.opened):
            if opened.body is not None:
                self._bodies.setdefault(tuple(opened.owner.output), []).append(now[number])
        self._moved: set[str] = set()
        self._taken = set(defined_names(changed.graph))
        source = flat.source.proto
        for node in all_nodes(source.graph.node):
            for _, graph in subgraphs(node):
                self._taken.update(defined_names(graph))
        flat_names = set(defined_names(flat.model.proto.graph))
        # A body's new tensors are not written to a data file.
        stays = next(external_tensors(source), None) is not None
        self._new = {
            tensor.name: tensor
            for tensor in changed.graph.initializer
            if tensor.name not in flat_names and not stays
        }
        self._readers = collections.Counter(
            name for node in changed.graph.node for name in set(reads(node))
        )
        self._left = {
            field: {_name(item) for item in getattr(changed.graph, field)} for field in _NAMED
        }

    def proto(self) -> onnx.ModelProto:
        """The model."""
        source, result = self._flat.source.proto, self._changed
        nodes = _without_unread(list(self._closed(self._main)), source.graph)
        graph = result.graph
        del graph.node[:]
        graph.node.extend(nodes)
        for field in _NAMED:
            inner = {_name(item) for item in getattr(self._flat.model.proto.graph, field)}
            inner -= {_name(item) for item in getattr(source.graph, field)}
            _drop_named(getattr(graph, field), inner | self._moved)
        for field in ("input", "output", "metadata_props"):
            del getattr(graph, field)[:]
            getattr(graph, field).extend(getattr(source.graph, field))
        _drop(result.opset_import, lambda entry: entry.domain == CLOSED_DOMAIN)
        gone = _called(source) - _called(result)
        _drop(result.functions, lambda f: (f.domain, f.name, f.overload) in gone)
        return result

    def _closed(self, segment: Segment) -> Iterator[onnx.NodeProto]:
        """The nodes of a segment with everything closed that was opened there."""
        for item in segment.items:
            if isinstance(item, onnx.NodeProto):
                yield self._owner(item) if item.domain == CLOSED_DOMAIN else item
                continue
            opened = self._flat.opened[item.number]
            if opened.body is not None:
                continue  # its node follows
            if item.number in self._untouched:
                yield opened.owner
            else:
                yield from self._closed(item)

    def _owner(self, stand_in: onnx.NodeProto) -> onnx.NodeProto:
        """The node that ``stand_in`` stands for, with its bodies."""
        bodies = self._bodies[tuple(stand_in.output)]
        owner = self._flat.opened[bodies[0].number].owner
        if self._untouched.issuperset(body.number for body in bodies):
            return owner
        copy = onnx.NodeProto()
        copy.CopyFrom(owner)
        for body, (_, graph) in zip(bodies, subgraphs(copy), strict=True):
            if body.number not in self._untouched:
                self._fill(graph, body)
        return copy

    def _fill(self, graph: onnx.GraphProto, body: Segment) -> None:
        """Put the nodes of a segment into the body that it stands for, and leave there what they read."""
        opened = self._flat.opened[body.number]
        nodes = list(self._closed(body))
        names = dict(opened.values)
        for node in nodes:
            for name in filter(None, node.output):
                if name not in names:
                    names[name] = self._short(name, opened.label)
        for tensor in self._own_tensors(body, opened.label):
            names[tensor.name] = self._short(tensor.name, opened.label)
            own = graph.initializer.add()
            own.CopyFrom(tensor)
            own.name = names[tensor.name]
        changed: list[onnx.NodeProto] = []
        for node in nodes:
            copy = renamed(node, lambda name: names.get(name, name))
            name = opened.nodes.get(node.name, node.name.removeprefix(f"{opened.label}/"))
            copy.ClearField("name")
            if name is not None:
                copy.name = name
            changed.append(copy)
        left = _without_unread(changed, graph)
        del graph.node[:]
        graph.node.extend(left)
        for field in _NAMED:
            gone = opened.values.keys() - self._left[field]
            _drop_named(getattr(graph, field), {opened.values[flat] for flat in gone})

    def _own_tensors(self, body: Segment, label: str) -> list[onnx.TensorProto]:
        """The new tensors that are named after values of a body and that nothing outside it reads.

        Some of onnxruntime's fusions look for a weight in the graph of its node alone.
        """
        inside = collections.Counter(name for node in body.nodes() for name in set(reads(node)))
        found = [
            tensor
            for name, tensor in self._new.items()
            if name not in self._moved
            and _inside(name, label) != name
            and _inside(name, label) not in self._taken
            and inside[name] == self._readers[name]
        ]
        self._moved.update(tensor.name for tensor in found)
        return found

    def _short(self, name: str, label: str) -> str:
        """The name of a new value of a body: without the body's label, unless another value has that name."""
        short = _inside(name, label)
        if short in self._taken:
            return name
        self._taken.add(short)
        return short


def _inside(name: str, label: str) -> str:
    """The name in a body that has this flat name; the flat name itself where none has."""
    short = name.removeprefix(f"{label}//").removeprefix(f"{label}/")
    return short if flat_name(label, short) == name else name


_NAMED = ("initializer", "sparse_initializer", "value_info", "quantization_annotation")
"""Fields of a graph that say something of a value."""


def _name(item: Any) -> str:
    """The value that an entry of such a field is about."""
    if isinstance(item, onnx.SparseTensorProto):
        return str(item.values.name)
    return str(getattr(item, "tensor_name", None) or item.name)


def parsed(graph: onnx.GraphProto) -> Segment:
    """The segments of a flat graph; the outermost one is the main graph."""
    stack = [Segment(-1)]
    for node in graph.node:
        mark = marker(node)
        if mark is None:
            stack[-1].items.append(node)
        elif mark[1]:
            done = stack.pop()
            stack[-1].items.append(done)
        else:
            stack.append(Segment(mark[0]))
    (main,) = stack
    return main


def _closable(flat: Flat, before: Segment, now: Mapping[int, Segment]) -> set[int]:
    """The segments that are as they were, and so is everything inside them and all that reads values from inside."""
    around: dict[int, frozenset[int]] = {}
    place: dict[str, int] = {}
    readers: list[tuple[str, int]] = []

    def visit(segment: Segment, outer: frozenset[int]) -> None:
        around[segment.number] = inside = outer | {segment.number}
        for item in segment.items:
            if isinstance(item, Segment):
                visit(item, inside)
            else:
                place.update(dict.fromkeys(item.output, segment.number))
                readers.extend((name, segment.number) for name in item.input)

    visit(before, frozenset())
    for opened in flat.opened:
        if opened.body is None:  # what it makes is there too when it is closed
            for name in opened.owner.output:
                place.pop(name, None)
    linked = DisjointSets()
    for name, reader in readers:
        maker = place.get(name)
        if maker is not None and maker not in around[reader]:
            linked.join(str(maker), str(reader))
    segments = list(before.segments())
    open_sets = {
        linked.find(str(segment.number))
        for segment in segments
        if segment.content() != now[segment.number].content()
    }
    open_ones = {
        outer
        for segment in segments
        if linked.find(str(segment.number)) in open_sets
        for outer in around[segment.number]
    }
    return {segment.number for segment in segments} - open_ones


def _without_unread(
    nodes: list[onnx.NodeProto], before: onnx.GraphProto
) -> list[onnx.NodeProto]:
    """``nodes`` without each Transpose that nothing reads any more, as something did in ``before`` if it was there."""
    there = {name for node in before.node for name in node.output}
    there -= {name for node in before.node for name in reads(node)}
    count = collections.Counter(name for node in nodes for name in reads(node))
    count.update(value.name for value in before.output)
    kept: list[onnx.NodeProto] = []
    for node in reversed(nodes):
        gone = node.op_type == "Transpose" and not any(
            count[name] or name in there for name in node.output
        )
        if gone:
            count.subtract(node.input)
        else:
            kept.append(node)
    return kept[::-1]


def _called(proto: onnx.ModelProto) -> set[tuple[str, str, str]]:
    """The model's own functions that are called, directly or by others that are."""
    functions = {(f.domain, f.name, f.overload): f for f in proto.functions}
    called: set[tuple[str, str, str]] = set()
    pending = [proto.graph.node]
    while pending:
        for node in all_nodes(pending.pop()):
            key = function_key(node)
            if key in functions and key not in called:
                called.add(key)
                pending.append(functions[key].node)
    return called


def _drop_named(field: Any, names: Collection[str]) -> None:
    """Take out what a repeated field says of the values ``names``."""
    _drop(field, lambda item: _name(item) in names)


def _drop(field: Any, gone: Callable[[Any], bool]) -> None:
    """Take entries out of a repeated field, without a copy of the others."""
    for index in reversed(range(len(field))):
        if gone(field[index]):
            del field[index]
