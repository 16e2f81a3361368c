"""A model whose quantizers see slightly other values.

A quantizer makes a whole step of a last bit where a value lies half way between two steps. How far an output moves
then depends on all that follows, so it is measured: the model is run with everything that it quantizes moved by a
thousandth, up or down, which sends a few values in a hundred to the next step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx
from onnx import helper

from onnx_decompose.model.model_io import Model
from onnx_decompose.model.renames import subgraphs
from onnx_decompose.model.shapes import opset_of

if TYPE_CHECKING:
    from collections.abc import Iterator, MutableSequence

__all__ = ["nudged"]

SHARE = 2.0**-10
"""Largest share of a value that it is moved by."""

_QUANTIZERS = {"DynamicQuantizeLinear", "QuantizeLinear"}
_CASTS_LIKE_FROM = 19
"""Operator set from which other floats than float32 are quantized."""


def nudged(model: Model) -> Model | None:
    """``model`` with its quantizers' inputs x turned into ``x * (1 + SHARE * cos(x / SHARE))``; None without any."""
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    count = _nudge(proto.graph.node, opset_of(proto), 0)
    for function in proto.functions:
        count = _nudge(function.node, opset_of(proto), count)
    return Model(proto, model.path) if count else None


def _nudge(nodes: MutableSequence[onnx.NodeProto], opset: int, count: int) -> int:
    """Change a repeated field of nodes and those inside them; returns ``count`` and how many were changed."""
    kept = list(nodes)
    result: list[onnx.NodeProto] = []
    for node in kept:
        for _, graph in subgraphs(node):
            count = _nudge(graph.node, opset, count)
        if node.op_type in _QUANTIZERS and node.domain in {"", "ai.onnx"}:
            prefix = f"onnx_decompose.nudged.{count}"
            result.extend(_moved(node.input[0], prefix, opset))
            copy = onnx.NodeProto()
            copy.CopyFrom(node)
            copy.input[0] = prefix
            result.append(copy)
            count += 1
        else:
            result.append(node)
    del nodes[:]
    nodes.extend(result)
    return count


def _moved(value: str, name: str, opset: int) -> Iterator[onnx.NodeProto]:
    """The nodes that make ``name`` of ``value``."""
    constants: list[str] = []
    for number, content in enumerate((1 / SHARE, SHARE, 1.0)):
        constant = f"{name}.{number}"
        tensor = helper.make_tensor(constant, onnx.TensorProto.FLOAT, [], [content])
        yield helper.make_node("Constant", [], [constant], value=tensor)
        if opset >= _CASTS_LIKE_FROM:
            yield helper.make_node("CastLike", [constant, value], [f"{constant}.cast"])
            constant += ".cast"
        constants.append(constant)
    steep, share, one = constants
    yield helper.make_node("Mul", [value, steep], [f"{name}.angle"])
    yield helper.make_node("Cos", [f"{name}.angle"], [f"{name}.sign"])
    yield helper.make_node("Mul", [f"{name}.sign", share], [f"{name}.share"])
    yield helper.make_node("Add", [f"{name}.share", one], [f"{name}.factor"])
    yield helper.make_node("Mul", [value, f"{name}.factor"], [name])
