"""What a rewrite left of a model, compared proto by proto and independently of the passes."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from onnx_decompose.model.metadata import read_decomposition
from onnx_decompose.model.model_io import external_bytes, load_model

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import onnx

    from onnx_decompose.model.model_io import Model

__all__ = ["untouched_faults"]

_ORIGIN = "onnx_decompose.from"
_CONSTANT_PRODUCERS = {
    "Constant",
    "Identity",
    "Transpose",
    "Cast",
    "Reshape",
    "Slice",
    "Squeeze",
    "Unsqueeze",
}
_FIELDS = (
    *(
        "ir_version",
        "producer_name",
        "producer_version",
        "domain",
        "model_version",
        "doc_string",
    ),
    "training_info",
)


def untouched_faults(original: Path, rewritten: Path) -> list[str]:
    """Everything that the rewrite had no business to change and changed; empty if all is as it was.

    A node that is gone must be the origin of a new one, be a bias or scale right behind such a node, have made
    constants that nothing reads any more, or be a call of a function or a product in another form with new nodes named
    after it (``name/`` and ``name//``). A node may
    read what the metadata says is its own constant with the units in another order. A tensor that is gone must have no
    reader, and a function no call. All others must be equal, byte for byte, with their external data; bodies of nodes
    are compared as the main graph is.
    """
    before, after = load_model(original), load_model(rewritten)
    found = _Rewritten(
        frozenset(_reordered(after)),
        frozenset(_origins(after.proto.graph)),
        frozenset((f.domain, f.name) for f in before.proto.functions),
        frozenset(_names(after.proto.graph)),
    )
    return [
        *_import_faults(before.proto, after.proto),
        *_model_faults(before.proto, after.proto),
        *_function_faults(before.proto, after.proto),
        *_node_faults(before.proto.graph, after.proto.graph, found),
        *_tensor_faults(before, after),
    ]


@dataclasses.dataclass(frozen=True, slots=True)
class _Rewritten:
    """What a rewritten model says of itself.

    Attributes:
        reordered: tensors that stand for one tensor of the original, with its units in another order.
        origins: the nodes that new ones stand for.
        functions: domain and name of the original's own.
        names: of all nodes.
    """

    reordered: frozenset[str]
    origins: frozenset[str]
    functions: frozenset[tuple[str, str]]
    names: frozenset[str]

    def replaces(self, node: onnx.NodeProto) -> bool:
        """Whether new nodes stand for ``node``, or for some inside the function that it calls."""
        names = {node.name, *node.output} - {""}
        # What is inside a body or a function is named by where it is.
        paths = {origin[start:] for origin in self.origins for start in _starts(origin)}
        # What it came to is named after it.
        mark = "/" if (node.domain, node.op_type) in self.functions else "//"
        after = tuple(f"{name}{mark}" for name in names)
        return bool(names & paths) or any(name.startswith(after) for name in self.names)


def _starts(origin: str) -> Iterator[int]:
    yield 0
    for index, letter in enumerate(origin):
        if letter == "/":
            yield index + 1


def _origins(graph: onnx.GraphProto) -> Iterator[str]:
    for node in graph.node:
        for entry in node.metadata_props:
            if entry.key == _ORIGIN:
                yield from entry.value.split("\n")
        for inner in _bodies(node):
            yield from _origins(inner)


def _names(graph: onnx.GraphProto) -> Iterator[str]:
    for node in graph.node:
        yield node.name
        for inner in _bodies(node):
            yield from _names(inner)


def _bodies(node: onnx.NodeProto) -> list[onnx.GraphProto]:
    return [
        graph
        for attribute in node.attribute
        for graph in ([attribute.g] if attribute.HasField("g") else attribute.graphs)
    ]


def _function_faults(before: onnx.ModelProto, after: onnx.ModelProto) -> Iterator[str]:
    kept = {(f.domain, f.name): _bytes([f]) for f in after.functions}
    pending = [*after.graph.node, *(node for f in after.functions for node in f.node)]
    called: set[tuple[str, str]] = set()
    while pending:
        node = pending.pop()
        called.add((node.domain, node.op_type))
        pending.extend(inner for graph in _bodies(node) for inner in graph.node)
    for function in before.functions:
        key = (function.domain, function.name)
        if kept.get(key, _bytes([function]) if key not in called else None) != _bytes(
            [function]
        ):
            yield f"function {function.name} changed"


def _reordered(model: Model) -> set[str]:
    """Tensors that stand for one tensor of the original, with its units in another order."""
    decomposition = read_decomposition(model.proto, model.label)
    if decomposition is None:
        return set()
    whole = {
        s.blocks[0].initializer for s in decomposition.sites.values() if len(s.blocks) == 1
    }
    names = whole | decomposition.reordered.keys()
    # Those of a body are named by where they are.
    return names | {name.rpartition("//")[2] for name in names}


def _import_faults(before: onnx.ModelProto, after: onnx.ModelProto) -> Iterator[str]:
    imports = _bytes(before.opset_import)
    if (
        _bytes(after.opset_import)[: len(imports)] != imports
    ):  # a new operator may bring a domain
        yield "model field opset_import changed"


def _model_faults(before: onnx.ModelProto, after: onnx.ModelProto) -> Iterator[str]:
    for field in _FIELDS:
        if _bytes(getattr(before, field)) != _bytes(getattr(after, field)):
            yield f"model field {field} changed"
    for field in (
        "name",
        "doc_string",
        "input",
        "output",
        "metadata_props",
    ):
        if _bytes(getattr(before.graph, field)) != _bytes(getattr(after.graph, field)):
            yield f"graph field {field} changed"
    kept = {entry.key: entry.value for entry in after.metadata_props}
    for entry in before.metadata_props:
        if kept.get(entry.key) != entry.value:
            yield f"metadata {entry.key} changed"
    for field in ("value_info", "quantization_annotation"):
        named = {_name(item): _bytes([item]) for item in getattr(before.graph, field)}
        for item in getattr(after.graph, field):
            if _name(item) in named and named[_name(item)] != _bytes([item]):
                yield f"{field} of {_name(item)} changed"


def _node_faults(
    before: onnx.GraphProto, after: onnx.GraphProto, found: _Rewritten
) -> Iterator[str]:
    kept = set(_bytes(after.node))
    made = {tuple(node.output): node for node in after.node}
    named = {node.name: node for node in after.node if node.name}
    read = _names_read(after)
    rewritten: set[str] = set()
    for node in before.node:
        if _bytes([node])[0] in kept:
            continue
        # A bias or a scale may go into the operator before it.
        inside = node.op_type in {"Add", "Mul"} and rewritten.intersection(node.input)
        if found.replaces(node) or inside:
            rewritten.update(node.output)
            continue
        if node.op_type in _CONSTANT_PRODUCERS and not read.intersection(node.output):
            continue
        other = made.get(tuple(node.output)) or named.get(node.name)
        if _reads_reordered(node, other, found.reordered):
            continue
        if other is None or not _bodies(node) or _bare(node) != _bare(other):
            yield f"node {node.name or node.output[0]} ({node.op_type}) changed"
            continue
        for first, second in zip(_bodies(node), _bodies(other), strict=True):
            yield from _body_faults(first, second, found)


def _body_faults(
    before: onnx.GraphProto, after: onnx.GraphProto, found: _Rewritten
) -> Iterator[str]:
    for field in ("name", "doc_string", "input", "output", "metadata_props"):
        if _bytes(getattr(before, field)) != _bytes(getattr(after, field)):
            yield f"graph field {field} of a body changed"
    read = _names_read(after)
    for field in ("initializer", "sparse_initializer", "value_info"):
        kept = {_bytes([item])[0] for item in getattr(after, field)}
        for item in getattr(before, field):
            if _bytes([item])[0] not in kept and _name(item) in read:
                yield f"{field} {_name(item)} of a body changed"
    yield from _node_faults(before, after, found)


def _bare(node: onnx.NodeProto) -> Any:
    """A node without its bodies, in a form that compares."""
    copy = type(node)()
    copy.CopyFrom(node)
    for attribute in copy.attribute:
        attribute.ClearField("g")
        attribute.ClearField("graphs")
    return _bytes([copy])


def _reads_reordered(
    node: onnx.NodeProto, other: onnx.NodeProto | None, reordered: frozenset[str]
) -> bool:
    """Whether ``other`` is ``node``, or the product that it comes to, in everything but constants in another order."""
    if other is None or len(other.input) != len(node.input):
        return False
    forms = {"Einsum", "Gemm", "MatMul"}
    if {node.op_type, other.op_type} <= forms and node.name == other.name:
        return not reordered.isdisjoint(other.input)
    restored = type(node)()
    restored.CopyFrom(other)
    for position, name in enumerate(other.input):
        if name in reordered:
            restored.input[position] = node.input[position]
    return bool(_bytes([restored]) == _bytes([node]))


def _tensor_faults(before: Model, after: Model) -> Iterator[str]:
    stored = {tensor.name: tensor for tensor in after.proto.graph.initializer}
    read = _names_read(after.proto.graph)
    for tensor in before.proto.graph.initializer:
        other = stored.get(tensor.name)
        if other is None:
            if tensor.name in read:
                yield f"tensor {tensor.name} is gone, and still read"
        elif not _equal(before, tensor, after, other):
            yield f"tensor {tensor.name} changed"
    sparse = set(_bytes(after.proto.graph.sparse_initializer))
    for entry in before.proto.graph.sparse_initializer:
        if entry.values.name in read and _bytes([entry])[0] not in sparse:
            yield f"sparse tensor {entry.values.name} changed"


def _equal(
    before: Model, tensor: onnx.TensorProto, after: Model, other: onnx.TensorProto
) -> bool:
    """Protos equal but for where external data lies, and that data equal too."""
    if not tensor.external_data and not other.external_data:
        return _bytes([tensor]) == _bytes([other])
    fields = ("name", "data_type", "dims", "doc_string", "data_location", "metadata_props")
    if any(_bytes(getattr(tensor, f)) != _bytes(getattr(other, f)) for f in fields):
        return False
    return bool((external_bytes(before, tensor) == external_bytes(after, other)).all())


def _names_read(graph: onnx.GraphProto) -> set[str]:
    names = {value.name for value in graph.output}
    for node in graph.node:
        names.update(node.input)
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                names |= _names_read(inner)
    return names


def _name(item: Any) -> str:
    if hasattr(item, "values"):
        return str(item.values.name)
    return str(item.name if hasattr(item, "name") else item.tensor_name)


def _bytes(value: Any) -> list[Any]:
    """A field's content in a form that compares: serialized messages, or plain values."""
    items: list[Any] = [value] if isinstance(value, str | int) else list(value)
    return [
        item.SerializeToString(deterministic=True)
        if hasattr(item, "SerializeToString")
        else item
        for item in items
    ]
