"""What a rewrite left of a model, compared proto by proto and independently of the passes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from onnx_decompose.metadata import read_decomposition
from onnx_decompose.model_io import external_bytes, load_model

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import onnx

    from onnx_decompose.model_io import Model

__all__ = ["untouched_faults"]

_ORIGIN = "onnx_decompose.from"
_CONSTANT_PRODUCERS = {
    "Constant",
    "Identity",
    "Transpose",
    "Cast",
    "Reshape",
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
    *("opset_import", "functions", "training_info"),
)


def untouched_faults(original: Path, rewritten: Path) -> list[str]:
    """Everything that the rewrite had no business to change and changed; empty if all is as it was.

    A node that is gone must be the origin of a new one, be a bias or scale right behind such a node, or have made
    constants that nothing reads any more. A node may read what the metadata says is its own constant with the units in
    another order. A tensor that is gone must have no reader. All others must be equal, byte for byte, with their
    external data.
    """
    before, after = load_model(original), load_model(rewritten)
    return [
        *_model_faults(before.proto, after.proto),
        *_node_faults(before.proto.graph, after.proto.graph, _reordered(after)),
        *_tensor_faults(before, after),
    ]


def _reordered(model: Model) -> set[str]:
    """Tensors that stand for one tensor of the original, with its units in another order."""
    decomposition = read_decomposition(model.proto, model.label)
    if decomposition is None:
        return set()
    whole = {
        s.blocks[0].initializer for s in decomposition.sites.values() if len(s.blocks) == 1
    }
    return whole | decomposition.reordered.keys()


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
    before: onnx.GraphProto, after: onnx.GraphProto, reordered: set[str]
) -> Iterator[str]:
    kept = set(_bytes(after.node))
    made = {tuple(node.output): node for node in after.node}
    read = _names_read(after)
    origins = {
        entry.value
        for node in after.node
        for entry in node.metadata_props
        if entry.key == _ORIGIN
    }
    rewritten: set[str] = set()
    for node in before.node:
        if _bytes([node])[0] in kept:
            continue
        # A bias or a scale may go into the operator before it.
        inside = node.op_type in {"Add", "Mul"} and rewritten.intersection(node.input)
        if {node.name, *node.output} & origins or inside:
            rewritten.update(node.output)
            continue
        if node.op_type in _CONSTANT_PRODUCERS and not read.intersection(node.output):
            continue
        if _reads_reordered(node, made.get(tuple(node.output)), reordered):
            continue
        yield f"node {node.name or node.output[0]} ({node.op_type}) changed"


def _reads_reordered(
    node: onnx.NodeProto, other: onnx.NodeProto | None, reordered: set[str]
) -> bool:
    """Whether ``other`` is ``node`` in everything but constants in another order."""
    if other is None or len(other.input) != len(node.input):
        return False
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
