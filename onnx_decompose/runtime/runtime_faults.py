"""What onnxruntime must be kept from doing with some models: faults of its own that end the process without a word."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx

from onnx_decompose.graph.sites import attribute_values

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["FUSES_HALF_WEIGHTS", "unsafe_optimizers"]

FUSES_HALF_WEIGHTS = "FuseFp16InitializerToFp32NodeTransformer"
"""onnxruntime's rewrite that stores a float16 weight in float32 where an operator has no float16 kernel.

On a product that its fusions made of MatMul and a Transpose which moves the first axis behind others, it is a
segmentation fault at load (1.32, CPU; float32 models and the level under ``ORT_ENABLE_ALL`` are fine).
"""


def unsafe_optimizers(model: bytes | Path) -> set[str]:
    """Names of onnxruntime's optimizers that end the process on ``model``, serialized or at a path.

    Anything that is no model has none: the runtime says what is wrong with it.
    """
    content = model if isinstance(model, bytes) else model.read_bytes()
    if b"Transpose" not in content or b"MatMul" not in content:
        return set()
    try:
        proto = onnx.ModelProto.FromString(content)
    except Exception:  # protobuf's errors share no public base class
        return set()
    graphs = [proto.graph, *proto.functions]
    if not any(half for graph in graphs for half in _holds_half(graph)):
        return set()
    return {FUSES_HALF_WEIGHTS} if any(map(_is_unsafe, graphs)) else set()


def _is_unsafe(graph: onnx.GraphProto | onnx.FunctionProto) -> bool:
    """Whether a MatMul of ``graph``, or of one inside it, reads a value with its first axis moved, and no stack."""
    stacks = {t.name for t in getattr(graph, "initializer", ()) if len(t.dims) > 2}
    moved: set[str] = set()
    for node in graph.node:
        if any(_is_unsafe(inner) for a in node.attribute for inner in (a.g, *a.graphs)):
            return True
        if (node.op_type == "Transpose" and _moves_first(node)) or (
            node.op_type in {"Cast", "Identity"} and moved.intersection(node.input)
        ):
            moved.update(node.output)
        elif node.op_type == "MatMul":
            first, second = node.input
            pairs = ((first, second), (second, first))
            if any(value in moved and other not in stacks for value, other in pairs):
                return True
    return False


def _moves_first(node: onnx.NodeProto) -> bool:
    """Whether a Transpose of three axes or more makes the first axis one of the last two."""
    order = list(attribute_values(node).get("perm", ()))
    return len(order) > 2 and 0 in order[-2:]


def _holds_half(graph: onnx.GraphProto | onnx.FunctionProto) -> Iterator[bool]:
    """Whether each tensor that ``graph`` and those inside it hold is of float16."""
    for tensor in getattr(graph, "initializer", ()):
        yield tensor.data_type == onnx.TensorProto.FLOAT16
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _holds_half(inner)
            yield attribute.t.data_type == onnx.TensorProto.FLOAT16
            yield node.op_type == "Cast" and attribute.i == onnx.TensorProto.FLOAT16
