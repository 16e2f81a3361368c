"""Putting rewritten nodes into a model whose other protos stay exactly as they are.

The graph IR of the passes (onnx-graphsurgeon) drops node metadata, some value_info and model properties on its round
trip. So only new nodes pass through it; everything else is kept as the proto that was read.
"""

from __future__ import annotations

import dataclasses
import hashlib
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.exporters.onnx_exporter import OnnxExporter

from onnx_decompose.graph.flat import RESERVED_KEY

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

    from numpy.typing import NDArray

__all__ = [
    "ORIGIN_KEY",
    "Fresh",
    "Placed",
    "constant_nodes",
    "origins_of",
    "splice",
    "with_nodes",
]

ORIGIN_KEY = "onnx_decompose.from"
"""Node metadata: the name of the node that a rewritten node stands for; of several, one name a line."""

_CONSTANT_PRODUCERS = {
    *("Cast", "Concat", "Constant", "ConstantOfShape", "Expand", "Identity", "Reshape"),
    *("Shape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"),
}


_RELEASED = np.empty(0, np.uint8)


class Fresh:
    """Names and initializers that some graphs do not have yet."""

    def __init__(self, *graphs: onnx.GraphProto) -> None:
        self._names = set[str]().union(*map(_names_in_use, graphs))
        self._stored: dict[tuple[str, str, tuple[int, ...], bytes], gs.Constant] = {}

    def name(self, wanted: str) -> str:
        """``wanted``, or the first ``wanted_N`` that nothing in the model has."""
        candidate, number = wanted, 1
        while candidate in self._names:
            candidate, number = f"{wanted}_{number}", number + 1
        self._names.add(candidate)
        return candidate

    def constant(
        self, wanted: str, values: NDArray[Any], *, shared: bool = True
    ) -> gs.Constant:
        """A new initializer; equal values that are wanted under one name are stored once, unless not ``shared``."""
        stored = np.ascontiguousarray(values)
        if not shared:
            return gs.Constant(self.name(wanted), stored)
        digest = hashlib.sha256(stored.tobytes()).digest()
        key = (wanted, stored.dtype.name, stored.shape, digest)
        if key not in self._stored:
            self._stored[key] = gs.Constant(self.name(wanted), stored)
        return self._stored[key]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Placed:
    """A new node and its place.

    Attributes:
        node: in the graph IR.
        place: index of the original node whose place it takes.
        source: the original node that it stands for, whose metadata it keeps; None for helpers.
        is_copy: whether it is that node on other values, with the same operator, and with those of its attributes that
            the new node does not have.
        others: further original nodes that it stands for: like the first one, on other constants.
    """

    node: gs.Node
    place: int
    source: onnx.NodeProto | None
    is_copy: bool = True
    others: Sequence[onnx.NodeProto] = ()


def splice(
    proto: onnx.ModelProto,
    removed: Iterable[int],
    placed: Sequence[Placed],
    unchanged: Collection[str],
    *,
    others: Sequence[onnx.NodeProto] | None = None,
    more: Iterable[gs.Constant] = (),
) -> onnx.ModelProto:
    """A copy of ``proto`` with some nodes replaced.

    Args:
        proto: the model to copy.
        others: the model's nodes, some of them changed, in their places; the model's own by default.
        more: initializers to add besides those of ``placed``.
        removed: indices of the nodes to take out.
        placed: the nodes to put in, in an order that works at each place.
        unchanged: values of removed nodes that ``placed`` makes again just as they were.
    """
    gone = set(removed)
    by_place: dict[int, list[onnx.NodeProto]] = {}
    tensors: dict[str, gs.Constant] = {tensor.name: tensor for tensor in more}
    for item in placed:
        by_place.setdefault(item.place, []).append(_export(item))
        tensors |= {t.name: t for t in item.node.inputs if isinstance(t, gs.Constant)}
    nodes: list[onnx.NodeProto] = []
    remade: set[str] = set()
    for index, node in enumerate(proto.graph.node if others is None else others):
        nodes.extend(by_place.get(index, ()))
        if index in gone:
            remade.update(node.output)
        else:
            nodes.append(node)
    result = with_nodes(proto, nodes, tensors.values(), changed=remade.difference(unchanged))
    imported = {entry.domain for entry in result.opset_import}
    for domain in {item.node.domain for item in placed} - imported - {None, ""}:
        result.opset_import.add(domain=domain, version=1)
    return result


def with_nodes(
    proto: onnx.ModelProto,
    nodes: Sequence[onnx.NodeProto],
    tensors: Iterable[gs.Constant],
    changed: Collection[str] = (),
) -> onnx.ModelProto:
    """A copy of ``proto`` with other nodes and more initializers.

    Initializers and constant nodes that only the old nodes read go, and so does what is said of values that are gone.

    Args:
        proto: the model to copy.
        nodes: all nodes of the new main graph, in order.
        tensors: the initializers to add; their values are released one after another, never all held twice.
        changed: values that are no longer what value_info and quantization_annotation say of them.
    """
    nodes, unread = _without_unread(proto.graph, nodes)
    result = onnx.ModelProto()
    result.CopyFrom(proto)
    graph = result.graph
    del graph.node[:]
    graph.node.extend(nodes)
    inputs = {value.name for value in graph.input}
    _delete(graph.initializer, "name", unread - inputs)
    for index in reversed(range(len(graph.sparse_initializer))):
        if graph.sparse_initializer[index].values.name in unread - inputs:
            del graph.sparse_initializer[index]
    for tensor in tensors:
        graph.initializer.append(OnnxExporter.export_tensor_proto(tensor))
        tensor.values = _RELEASED
    made = inputs.union(*(node.output for node in nodes))
    stale = (unread - made).union(changed)
    _delete(graph.value_info, "name", stale)
    _delete(graph.quantization_annotation, "tensor_name", stale)
    return result


def constant_nodes(graph: onnx.GraphProto) -> set[int]:
    """Indices of the nodes that may go when nothing reads them any more."""
    constants = _constant_values(graph)
    return {
        index
        for index, node in enumerate(graph.node)
        if node.op_type in _CONSTANT_PRODUCERS or constants.issuperset(node.output)
    }


def _constant_values(graph: onnx.GraphProto) -> set[str]:
    """What is stored, and what nodes make of that alone."""
    stored = {tensor.name for tensor in graph.initializer}
    stored -= {value.name for value in graph.input}
    for node in graph.node:
        if node.op_type == "Constant" or (
            node.input and stored.issuperset(filter(None, _names_read([node])))
        ):
            stored.update(node.output)
    return stored


def _export(item: Placed) -> onnx.NodeProto:
    node: onnx.NodeProto = OnnxExporter.export_node(item.node)
    if item.source is None:
        return node
    copy = onnx.NodeProto()
    copy.CopyFrom(item.source)
    if not item.is_copy:
        copy.op_type = node.op_type
        del copy.attribute[:]
    copy.name = node.name
    copy.input[:] = node.input
    copy.output[:] = node.output
    _delete(copy.attribute, "name", {attribute.name for attribute in node.attribute})
    copy.attribute.extend(node.attribute)
    if item.others:  # what was said of one of them does not hold for all
        copy.ClearField("doc_string")
        del copy.metadata_props[:]
    if ORIGIN_KEY not in {entry.key for entry in copy.metadata_props}:
        stands_for = (name for n in (item.source, *item.others) for name in origins_of(n))
        copy.metadata_props.add(key=ORIGIN_KEY, value="\n".join(dict.fromkeys(stands_for)))
    return copy


def origins_of(node: onnx.NodeProto) -> list[str]:
    """The names of the original nodes that ``node`` stands for, or is."""
    noted = next(
        (entry.value for entry in node.metadata_props if entry.key == ORIGIN_KEY), None
    )
    return [node.name or node.output[0]] if noted is None else noted.split("\n")


def _without_unread(
    graph: onnx.GraphProto, nodes: Sequence[onnx.NodeProto]
) -> tuple[Sequence[onnx.NodeProto], set[str]]:
    """``nodes`` without constant nodes that only the nodes of ``graph`` read, and all values that only those read."""
    outputs = {value.name for value in graph.output}
    before = _names_read(graph.node) | outputs
    constants = _constant_values(graph)
    while True:
        unread = before - _names_read(nodes) - outputs
        kept = [
            node
            for node in nodes
            if not (node.op_type in _CONSTANT_PRODUCERS or constants.issuperset(node.output))
            or not unread.issuperset(node.output)
        ]
        if len(kept) == len(nodes):
            return kept, unread
        nodes = kept


def _names_read(nodes: Iterable[onnx.NodeProto]) -> set[str]:
    """Every value that one of ``nodes`` reads, or hands on or captures in a subgraph."""
    names: set[str] = set()
    for node in nodes:
        names.update(node.input)
        for graph in _subgraphs(node):
            names |= _names_read(graph.node)
            names.update(value.name for value in graph.output)
    return names


def _names_in_use(graph: onnx.GraphProto) -> set[str]:
    """Every value and node name of ``graph``, those of its subgraphs included."""
    names = {tensor.name for tensor in graph.initializer}
    names.update(*(p.value.split("\n") for p in graph.metadata_props if p.key == RESERVED_KEY))
    names.update(sparse.values.name for sparse in graph.sparse_initializer)
    names.update(value.name for value in (*graph.input, *graph.output, *graph.value_info))
    for node in graph.node:
        names.update((node.name, *node.input, *node.output))
        for inner in _subgraphs(node):
            names |= _names_in_use(inner)
    return names


def _subgraphs(node: onnx.NodeProto) -> Iterable[onnx.GraphProto]:
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def _delete(field: Any, key: str, names: Collection[str]) -> None:
    """Take the protos whose ``key`` is one of ``names`` out of a repeated field, without a copy of the others."""
    for index in reversed(range(len(field))):
        if getattr(field[index], key) in names:
            del field[index]
