"""Shapes of a model's values, as far as they can be inferred: an aid, never a precondition."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import onnx
from onnx.external_data_helper import uses_external_data

if TYPE_CHECKING:
    from collections.abc import Mapping

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

    Its weights are only declared, so they are neither copied nor read.
    """
    declared = skeleton(proto)
    try:
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
