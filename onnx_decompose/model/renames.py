"""New names for the values that a node reads and makes, those that its subgraphs capture included."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

__all__ = ["all_nodes", "defined_names", "function_key", "renamed", "subgraphs"]


def renamed(node: onnx.NodeProto, rename: Callable[[str], str]) -> onnx.NodeProto:
    """A copy of ``node`` with other values; missing ones stay missing."""
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    _rename(copy, lambda name: rename(name) if name else name)
    copy.output[:] = [rename(name) if name else name for name in node.output]
    return copy


def subgraphs(node: onnx.NodeProto) -> Iterator[tuple[str, onnx.GraphProto]]:
    """The graphs that are attributes of ``node``, each with what messages call it."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.name, attribute.g
        for position, graph in enumerate(attribute.graphs):
            yield f"{attribute.name}.{position}", graph


def all_nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """``nodes`` and those of the graphs inside them."""
    for node in nodes:
        yield node
        for _, graph in subgraphs(node):
            yield from all_nodes(graph.node)


def function_key(node: onnx.NodeProto) -> tuple[str, str, str]:
    """What ``node`` calls, if that is a function of the model: its domain, name and overload."""
    return node.domain, node.op_type, node.overload


def defined_names(graph: onnx.GraphProto) -> Iterator[str]:
    """The values that ``graph`` itself brings: inputs, initializers and what its nodes make."""
    yield from (value.name for value in graph.input)
    yield from (tensor.name for tensor in graph.initializer)
    yield from (sparse.values.name for sparse in graph.sparse_initializer)
    for node in graph.node:
        yield from filter(None, node.output)


def _rename(node: onnx.NodeProto, rename: Callable[[str], str]) -> None:
    node.input[:] = [rename(name) for name in node.input]
    for _, graph in subgraphs(node):
        own = set(defined_names(graph))

        def captured(name: str, own: set[str] = own) -> str:
            return name if name in own else rename(name)

        for inner in graph.node:
            _rename(inner, captured)
        for value in graph.output:
            value.name = captured(value.name)
