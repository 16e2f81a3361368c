"""What onnxruntime must be kept from doing with some models: faults of its own that end the process without a word."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import onnx

from onnx_decompose.graph.sites import attribute_values

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

__all__ = ["FUSES_HALF_WEIGHTS", "unsafe_optimizers"]

FUSES_HALF_WEIGHTS = "FuseFp16InitializerToFp32NodeTransformer"
"""onnxruntime's rewrite that stores a float16 weight in float32 where an operator has no float16 kernel.

On a product that its fusions made of MatMul and a Transpose before it which moves the first axis behind others, it is a
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
    functions = {(f.domain, f.name, f.overload): f for f in proto.functions}
    return {FUSES_HALF_WEIGHTS} if _is_unsafe(proto.graph, set(), functions) else set()


def _is_unsafe(
    graph: onnx.GraphProto | onnx.FunctionProto,
    moved: set[str],
    functions: Mapping[tuple[str, str, str], onnx.FunctionProto],
) -> bool:
    """Whether a product reads what hangs on a value with its first axis moved, and no stack.

    onnxruntime pushes a Transpose through whatever comes after it, so that it need not stand right before the product.

    Args:
        graph: where to look.
        moved: values in it that hang on such a one; those that it makes are added.
        functions: that it may call.
    """
    stacks = {t.name for t in getattr(graph, "initializer", ()) if len(t.dims) > 2}
    for node in graph.node:
        inner = [g for a in node.attribute for g in (a.g, *a.graphs) if g.node]
        if any(_is_unsafe(g, moved, functions) for g in inner):
            return True
        called = functions.get((node.domain, node.op_type, node.overload))
        if called is not None:
            given = zip(called.input, node.input, strict=False)
            inside = {formal for formal, value in given if value in moved}
            if _is_unsafe(called, inside, functions):
                return True
            made = zip(called.output, node.output, strict=False)
            moved.update(value for formal, value in made if formal in inside)
        elif node.op_type == "MatMul" and any(
            value in moved and other not in stacks
            for value, other in itertools.permutations(node.input)
        ):
            return True
        elif (node.op_type == "Transpose" and _moves_first(node)) or _hangs(node, inner, moved):
            moved.update(node.output)
    return False


def _hangs(node: onnx.NodeProto, inner: Sequence[onnx.GraphProto], moved: set[str]) -> bool:
    """Whether a node, or a graph inside it, reads or makes one of the values."""
    return not moved.isdisjoint(node.input) or any(
        not moved.isdisjoint((*n.input, *n.output)) for g in inner for n in g.node
    )


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
