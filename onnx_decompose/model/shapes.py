"""Shapes of a model's values, as far as they can be inferred: an aid, never a precondition."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import onnx
from onnx.external_data_helper import uses_external_data

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

logger = logging.getLogger(__name__)

__all__ = [
    "Dim",
    "infer_shapes",
    "infer_values",
    "inferred",
    "known_values",
    "opset_of",
    "skeleton",
]

Dim = int | str | None
"""A size, a symbolic name, or unknown."""

_SMALL = 1024  # bytes: shape arithmetic reads constants of a few entries, never a weight

_LISTS = frozenset({"Add", "Cast", "Concat", "Gather", "Mul", "Slice", "Sub", "Unsqueeze"})
"""Operators whose results inference lists entry by entry where they have one axis, whatever their type."""

_MOST_LISTED = 1 << 21
"""Entries of all such lists together; each takes inference some 70 bytes."""


def infer_shapes(proto: onnx.ModelProto) -> Mapping[str, tuple[Dim, ...]]:
    """Shapes by value name; values of unknown rank are left out."""
    shapes: dict[str, tuple[Dim, ...]] = {
        t.name: tuple(t.dims) for t in proto.graph.initializer
    }
    for name, value in infer_values(proto).items():
        if value.type.tensor_type.HasField("shape"):
            shapes[name] = tuple(_dim(d) for d in value.type.tensor_type.shape.dim)
    return shapes


def infer_values(proto: onnx.ModelProto) -> Mapping[str, onnx.ValueInfoProto]:
    """Type and shape by value name, as far as they are known."""
    return known_values(inferred(proto).graph)


def known_values(graph: onnx.GraphProto) -> Mapping[str, onnx.ValueInfoProto]:
    """What a graph itself says of its values."""
    return {value.name: value for value in (*graph.value_info, *graph.input, *graph.output)}


def inferred(proto: onnx.ModelProto) -> onnx.ModelProto:
    """A skeleton of the model that says of its values, those of its subgraphs included, all that can be inferred.

    Its weights are only declared, so they are neither copied nor read. Values are followed into shapes unless that
    would take a lot of memory.
    """
    declared = skeleton(proto)
    try:
        known = onnx.shape_inference.infer_shapes(declared)
        if _listed(known) > _MOST_LISTED:
            logger.info(
                "values of many entries on one axis: shapes are inferred without values"
            )
            return known
        return onnx.shape_inference.infer_shapes(declared, data_prop=True)
    except (
        onnx.shape_inference.InferenceError,
        onnx.checker.ValidationError,  # of functions that call themselves
        RuntimeError,
        ValueError,
    ) as error:
        logger.info(
            "shape inference failed, going on without it: %s", str(error).splitlines()[0]
        )
        return declared


def skeleton(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The model with its initializers declared as inputs: what inference and the checker look at, without the bytes."""
    declared = onnx.ModelProto(
        ir_version=proto.ir_version, opset_import=proto.opset_import, functions=proto.functions
    )
    graph = declared.graph
    graph.name = proto.graph.name
    graph.node.extend(proto.graph.node)
    graph.input.extend(proto.graph.input)
    graph.output.extend(proto.graph.output)
    graph.value_info.extend(proto.graph.value_info)
    inputs = {value.name for value in proto.graph.input}
    # Inference knows no sparse initializers; to every reader they are dense tensors.
    graph.input.extend(
        onnx.helper.make_tensor_value_info(
            sparse.values.name, sparse.values.data_type, list(sparse.dims)
        )
        for sparse in proto.graph.sparse_initializer
        if sparse.values.name not in inputs
    )
    for tensor in proto.graph.initializer:
        if tensor.ByteSize() <= _SMALL and not uses_external_data(tensor):
            graph.initializer.append(tensor)
        elif tensor.name not in inputs:
            graph.input.append(
                onnx.helper.make_tensor_value_info(
                    tensor.name, tensor.data_type, list(tensor.dims)
                )
            )
    _forget_negative_sizes(graph)
    return declared


def _listed(known: onnx.ModelProto) -> int:
    """About how many entries inference would list: of each list its length, of joined ones that of all."""
    functions = {(f.domain, f.name, f.overload): f for f in known.functions}

    def count(nodes: Iterable[onnx.NodeProto], lengths: dict[str, int]) -> int:
        total = 0
        for node in nodes:
            read = [lengths.get(name, 0) for name in node.input]
            called = functions.get((node.domain, node.op_type, node.overload))
            if called is not None:
                inside = dict(zip(called.input, read, strict=False))
                total += count(called.node, inside)
                read = [inside.get(name, 0) for name in called.output]
            elif node.op_type in _LISTS:
                made = sum(read) if node.op_type == "Concat" else max(read, default=0)
                total += sum(read) + made
                read = [made]
            else:
                read = []
            for name, length in zip(node.output, read, strict=False):
                lengths[name] = max(length, lengths.get(name, 0))
            for attribute in node.attribute:
                for inner in (attribute.g, *attribute.graphs):
                    total += count(inner.node, lengths | _lengths(inner))
            if total > _MOST_LISTED:
                break
        return total

    return count(known.graph.node, _lengths(known.graph))


def _lengths(graph: onnx.GraphProto) -> dict[str, int]:
    """The sizes of the values of one axis, as far as they are known."""
    shapes = {name: value.type.tensor_type.shape for name, value in known_values(graph).items()}
    sizes = {
        name: shape.dim[0].dim_value for name, shape in shapes.items() if len(shape.dim) == 1
    }
    return sizes | {t.name: t.dims[0] for t in graph.initializer if len(t.dims) == 1}


def _forget_negative_sizes(graph: onnx.GraphProto) -> None:
    """Leave out sizes below zero, as some exporters write for unknown ones: on them inference may end the process."""
    for value in (*graph.input, *graph.output, *graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_value < 0:
                dim.Clear()
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                _forget_negative_sizes(inner)


def opset_of(proto: onnx.ModelProto) -> int:
    """Version of the standard operator set that ``proto`` imports."""
    return next(
        (entry.version for entry in proto.opset_import if entry.domain in {"", "ai.onnx"}), 1
    )


def _dim(dim: onnx.TensorShapeProto.Dimension) -> Dim:
    if dim.HasField("dim_value"):
        return dim.dim_value
    return dim.dim_param or None
